"""Rotate and quantize rows in one pass over memory, to 8 bits and one scale for each row."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..bases.walsh import walsh_functions
from ..formats.scaling import RANGES, SMALLEST_NORMAL
from .common import on_device_of, product, product_precision, tuned_over

_UNROTATED = 128  # the number of columns of the tile that holds a row


@triton.autotune(
    tuned_over(*(triton.Config({}, num_warps=warps) for warps in (4, 1, 2, 8, 16))), key=["columns", "GROUPS", "B"]
)
@triton.jit
def quantize_kernel(
    rows,
    values,
    scales,
    hadamard,
    columns,
    factor,
    LARGEST: tl.constexpr,
    SECOND_FACTOR: tl.constexpr,
    SMALLEST_NORMAL: tl.constexpr,
    ROTATE: tl.constexpr,
    TO_INTEGERS: tl.constexpr,
    GROUPS: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program handles a row, as a tile of GROUPS x B."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, GROUPS)[:, None] * B + tl.arange(0, B)[None, :]
    x = tl.load(rows + row * columns + column, mask=column < columns, other=0.0)
    if ROTATE:
        signs = tl.load(hadamard + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
        x = product(x, signs, PRECISION) * factor
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), SMALLEST_NORMAL)  # so that zeros stay zero
    not_numbers = tl.sum(tl.sum((x != x).to(tl.int32), axis=1), axis=0)
    largest = tl.where(not_numbers > 0, float("nan"), largest)  # the maximum ignores NaN, so the row would seem finite
    x = x * (LARGEST / SECOND_FACTOR / largest) * SECOND_FACTOR
    if TO_INTEGERS:
        # Triton has no rounding to the nearest even integer, but at this size a float32 has no fraction.
        x = (x + 12582912.0) - 12582912.0
    tl.store(values + row * columns + column, x.to(values.dtype.element_ty), mask=column < columns)
    tl.store(scales + row, largest / LARGEST)


@cache
def _signs(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A Hadamard matrix, exact in every dtype."""
    with torch.inference_mode(False):
        return torch.tensor(walsh_functions(block)).to(device, dtype)


@torch.library.custom_op(
    "lbp_peft::quantize_rows",
    mutates_args=(),
    schema="(Tensor rows, int hadamard_size, ScalarType dtype) -> (Tensor, Tensor)",
)
def quantize_rows(rows: Tensor, hadamard_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M, K), contiguous, float32, float16 or bfloat16 -> values (M, K), scales (M, 1) in float32.

    Args:
        hadamard_size: The number of columns that a Hadamard matrix mixes, 16 to 128, dividing K; 0 or 1: none.
        dtype: int8 or float8_e4m3fn.
    """
    (num_rows, columns), rotate = rows.shape, hadamard_size > 1
    values, scales = _empty(rows, dtype)
    block = hadamard_size if rotate else _UNROTATED
    with on_device_of(rows):
        quantize_kernel[(num_rows,)](
            rows,
            values,
            scales,
            _signs(hadamard_size, rows.dtype, rows.device) if rotate else None,
            columns,
            block**-0.5,
            LARGEST=RANGES[dtype].largest,
            SECOND_FACTOR=RANGES[dtype].second_factor,
            SMALLEST_NORMAL=SMALLEST_NORMAL,
            ROTATE=rotate,
            TO_INTEGERS=dtype == torch.int8,
            GROUPS=triton.next_power_of_2(max(triton.cdiv(columns, block), 16 if rotate else 1)),
            B=block,
            PRECISION=product_precision(rows),
        )
    return values, scales


def _empty(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(rows.shape[0], 1, dtype=torch.float32)


@quantize_rows.register_fake
def _(rows: Tensor, hadamard_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _empty(rows, dtype)


@register_flop_formula(torch.ops.lbp_peft.quantize_rows)
def _flops(
    rows_shape: torch.Size, hadamard_size: int, dtype: torch.dtype, *, out_shape: object = None, **_: object
) -> int:
    return 2 * rows_shape[0] * rows_shape[1] * hadamard_size if hadamard_size > 1 else 0
