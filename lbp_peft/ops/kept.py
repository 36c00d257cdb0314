"""Tells `torch.compile` to save a rounded tensor for the backward pass.

The compiler decides by itself what to save, and might save the exact tensor and round it again in the backward pass. It
does not compute an operation again that it does not know.
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
    """Return x, which a compiled graph then saves as it is if its backward pass reads it."""
    return _keep(x) if torch.compiler.is_compiling() else x
