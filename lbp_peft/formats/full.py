"""Full precision: g W in the dtype of g."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import instructions
from ..instructions import product_dtype
from .base import NumberFormat, Quantized, edges

CASTING_TO_BF16 = 40  # time per element, in units of a multiply-add of float32
GPU_RATE_IN_16_BITS = 15.0  # how many times faster than float32, according to data sheets


class FullPrecision(NumberFormat):
    """The dtype of g itself: nothing is quantized."""

    name = "full"

    def quantize(self, tensor: Tensor, dim: int) -> Quantized:
        return Quantized(tensor)

    def multiply(self, g: Tensor, weight: Quantized, hadamard_size: int) -> Tensor:
        return product_of_one_dtype(g, weight.values.to(g.dtype))

    def cost(
        self, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> float | None:
        if device.type == "cuda":
            return 1.0 if dtype.itemsize >= 4 else 1 / GPU_RATE_IN_16_BITS
        if device.type != "cpu" or dtype != torch.bfloat16:
            return 1.0
        rate = 1 / instructions.cpu_rates()[0]
        is_slow = product_dtype(dtype, device) != dtype  # so that it is multiplied in float32
        return rate + CASTING_TO_BF16 * edges(rows, out_features, in_features) if is_slow else rate


def product_of_one_dtype(left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right in their dtype, by way of float32 if the device has no instructions for that dtype.

    Args:
        left: Shape (..., m, k).
        right: Shape (k, n).

    Returns:
        Shape (..., m, n).
    """
    dtype = product_dtype(left.dtype, left.device)
    if dtype == left.dtype:
        return _times_matrix(left, right)
    with without_autocast(left.device):
        return _times_matrix(left.to(dtype), right.to(dtype)).to(left.dtype)


def _times_matrix(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as one product. PyTorch would copy `right` for each image if the rows of `left` are not adjacent."""
    return left @ right if left.dim() == 2 else (left.flatten(0, -2) @ right).view(*left.shape[:-1], right.shape[1])


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, under which a backward pass may have been called."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
