"""int8, with one scale per row of g and one per column of W.

    g ~ diag(a) G,   W ~ V diag(b)      G, V integers from -127 to 127
    g W ~ diag(a) (G V) diag(b)         G V summed exactly, in int32

Without instructions for int8, the same integers are multiplied in float32, in parts whose sums float32 holds exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import instructions
from ..instructions import multiplies_int8
from .base import EightBitFormat, Quantized, edges
from .hadamard import rotate
from .scaling import largest_magnitude, scaled_to_range

_ROUNDING = {torch.float32: 120, torch.bfloat16: 50}  # time per element, in units of a multiply-add of float32
# Sums of this many products of integers up to 127 are below 2^24, so float32 holds them exactly in any order.
_EXACT_TERMS = 2**24 // 127**2
_ROWS_AT_ONCE, _VALUES_AT_ONCE = 400, 2**18


class Int8(EightBitFormat):
    """g and W are rounded to integers."""

    name = "int8"
    dtype = torch.int8

    def quantize(self, tensor: Tensor, dim: int) -> Quantized:
        if tensor.dim() != 2 or tensor.device.type != "cpu" or torch.compiler.is_compiling():
            return super().quantize(tensor, dim)
        largest = largest_magnitude(tensor, dim)
        values = torch.empty(tensor.shape, dtype=torch.int8)
        _round_into(values, tensor, largest)
        return Quantized(values, self._scales(largest))

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        assert quantized.scales is not None
        return (quantized.values * quantized.scales).to(dtype)

    def _to_dtype(self, scaled: Tensor) -> Tensor:
        return scaled.round_().to(torch.int8)

    def multiply(self, g: Tensor, weight: Quantized, hadamard_size: int) -> Tensor:
        if g.device.type == "cpu" and not torch.compiler.is_compiling():
            return _multiply_by_parts(g, weight, hadamard_size)
        return super().multiply(g, weight, hadamard_size)

    def multiply_quantized(self, left: Quantized, right: Quantized) -> Tensor:
        assert left.scales is not None and right.scales is not None
        return torch.mul(_int_product(left.values, right.values), right.scales).mul_(left.scales)

    def is_faster(self, dtype: torch.dtype, device: torch.device) -> bool:
        return multiplies_int8(device)

    def cost(
        self, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> float | None:
        if device.type != "cpu" or dtype not in _ROUNDING:
            return None
        return 1 / instructions.cpu_rates()[1] + _ROUNDING[dtype] * edges(rows, out_features, in_features)


def _round_into(values: Tensor, matrix: Tensor, largest: Tensor) -> None:
    """Write the rounded matrix to `values`, in parts that stay in the cache between operations."""
    at_once = max(_VALUES_AT_ONCE // max(matrix.shape[1], 1), 1)
    buffer = torch.empty(at_once, matrix.shape[1], dtype=torch.float32)
    for start in range(0, len(matrix), at_once):
        part = slice(start, start + at_once)
        scaled = buffer[: len(values[part])]
        scaled_to_range(matrix[part], largest if len(largest) == 1 else largest[part], torch.int8, out=scaled)
        values[part] = scaled.round_()


def _multiply_by_parts(g: Tensor, weight: Quantized, hadamard_size: int) -> Tensor:
    """Multiply a few hundred rows of g at a time, so that the intermediate results stay in the cache."""
    assert weight.scales is not None
    (num_rows, inner), columns = g.shape, weight.values.shape[1]
    at_once = -(-num_rows // max(round(num_rows / _ROWS_AT_ONCE), 1))
    in_integers = multiplies_int8(g.device)
    right = weight.values if in_integers else weight.values.float()
    product = g.new_empty(num_rows, columns)
    values = g.new_empty(at_once, inner, dtype=right.dtype)
    sums = g.new_empty(at_once, columns, dtype=torch.int32)
    # Operations on two dtypes at once are slow, except for copies.
    is_wide = g.dtype == torch.float32
    size = 0 if is_wide else at_once
    wide_rows = g.new_empty(size, inner, dtype=torch.float32)
    wide_product = g.new_empty(size, columns, dtype=torch.float32)
    for part, result in zip(g.split(at_once), product.split(at_once), strict=True):
        n = len(part)
        wide = part if is_wide else wide_rows[:n].copy_(part)
        wide = rotate(wide, hadamard_size) if hadamard_size > 1 else wide
        largest = largest_magnitude(wide, dim=1)
        scaled = result if is_wide else wide_product[:n]
        if in_integers:
            _round_into(values[:n], wide, largest)
            scaled.copy_(torch._int_mm(values[:n], right, out=sums[:n]))
        else:
            scaled_to_range(wide, largest, torch.int8, out=values[:n]).round_()
            _sum_exactly(values[:n], right, sums[:n], scaled)
        # One factor after the other, so that large gradients stay in the range of float32.
        scaled.mul_(weight.scales).mul_(largest / 127)
        if not is_wide:
            result.copy_(scaled)
    return product


def _sum_exactly(left: Tensor, right: Tensor, sums: Tensor, result: Tensor) -> None:
    """Write left @ right, integers in float32, to `result`, as if rounded once; `sums` is a buffer in int32."""
    inner = left.shape[1]
    torch.mm(left[:, :_EXACT_TERMS], right[:_EXACT_TERMS], out=result)
    if inner <= _EXACT_TERMS:
        return
    sums.copy_(result)
    for start in range(_EXACT_TERMS, inner, _EXACT_TERMS):
        part = slice(start, start + _EXACT_TERMS)
        sums += torch.mm(left[:, part], right[part], out=result).to(torch.int32)
    result.copy_(sums)


def _int_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right of int8 exactly, in int32, or as the same integers in float32."""
    (rows, inner), columns = left.shape, right.shape[1]
    if not multiplies_int8(left.device):
        parts = zip(left.float().split(_EXACT_TERMS, 1), right.float().split(_EXACT_TERMS), strict=True)
        sums = [a @ b for a, b in parts]
        return sums[0] if len(sums) == 1 else sum(part.to(torch.int32) for part in sums)
    if left.device.type != "cuda":
        return torch._int_mm(left, right)
    # GPUs need more than 16 rows, and multiples of 8 along the other axes. The right factor has to be column-major: on
    # an H200, products of small matrices with a row-major one failed.
    left = F.pad(left, (0, -inner % 8, 0, max(24, rows + -rows % 8) - rows))
    right = F.pad(right.t(), (0, -inner % 8, 0, -columns % 8)).t()
    return torch._int_mm(left, right)[:rows, :columns]
