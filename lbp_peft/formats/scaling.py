"""Scaling of tensors to the range of an 8-bit dtype by their largest magnitude.

All tensors in 8 bits are scaled by these functions. Only the Triton kernels scale by themselves, with the same ranges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Range(NamedTuple):
    """The range of a dtype.

    Attributes:
        largest: The largest number of the dtype.
        second_factor: A power of two. The factor of a row, largest / its largest magnitude, exceeds float32 if the row
            is near the smallest normal number. So it is applied in two steps: the second, by this power of two, leaves
            the first within the range and changes no bit of the result.
    """

    largest: float
    second_factor: float


RANGES = {torch.int8: Range(127.0, 32.0), torch.float8_e4m3fn: Range(448.0, 128.0)}
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def largest_magnitude(tensor: Tensor, dim: int) -> Tensor:
    """The largest absolute value along a dimension, of size 1 there; float32, at least the smallest normal number."""
    largest = torch.maximum(tensor.amax(dim, keepdim=True), tensor.amin(dim, keepdim=True).neg_()).float()
    return largest.clamp_(min=SMALLEST_NORMAL)  # so that zeros stay zero


def scaled_to_range(tensor: Tensor, largest: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The tensor scaled such that `largest` becomes the largest number of an 8-bit dtype; float32, not rounded."""
    range_ = RANGES[dtype]
    return torch.mul(tensor, range_.largest / range_.second_factor / largest, out=out).mul_(range_.second_factor)
