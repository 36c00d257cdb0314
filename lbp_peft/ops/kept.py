"""Tensors that a compiled graph keeps from the forward pass to the backward pass.

`torch.compile` decides by itself what to keep, and could compute a rounded tensor again from the exact one, which it
would then keep. An operation that it knows nothing of is not computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lbp_peft::keep", mutates_args=())
def _keep(x: Tensor) -> Tensor:
    return x.clone()


@_keep.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep(x: Tensor) -> Tensor:
    """x, which a compiled graph keeps as it is if the backward pass reads it. Outside of one it does nothing."""
    return _keep(x) if torch.compiler.is_compiling() else x
