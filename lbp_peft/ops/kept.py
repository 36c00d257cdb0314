"""What operations save for the backward pass, under `torch.compile` and in checkpointed blocks.

The compiler decides by itself what to save, and might save the exact tensor and round it again in the backward pass. It
never runs an operation again that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.in_groups import quantize_groups, shape_of_scales
from .checkpointing import empty, saved_tensors_are_discarded


@torch.library.custom_op("lbp_peft::keep", mutates_args=())
def _keep(x: Tensor) -> Tensor:
    return x.clone()


@_keep.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep(x: Tensor) -> Tensor:
    """Return x, which a compiled graph then saves as it is if its backward pass reads it."""
    return _keep(x) if torch.compiler.is_compiling() else x


def keep_quantized(x: Tensor, offset: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x, to be saved in 8 bits, see [`lbp_peft.formats.in_groups.quantize_groups`].

    The first pass of gradient checkpointing throws away what is saved, so nothing is computed in it.

    Args:
        x: Shape (..., C).
        offset: Returns what is subtracted from x before it is rounded. None: nothing is.
    """
    if saved_tensors_are_discarded():
        return empty(x, x.shape, torch.int8), empty(x, shape_of_scales(x.shape), torch.float32)
    values, scales = quantize_groups(x, None if offset is None else offset(x))
    return keep(values), keep(scales)
