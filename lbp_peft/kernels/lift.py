"""Lift coefficients in one pass: every one is read once, and every token is written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import blocks
from .common import copy_outside, locate, num_parts, on_device_of, product, product_precision, tuned_over


@triton.autotune(
    tuned_over(*(triton.Config({"BLOCK_C": tile}, num_warps=warps) for tile in (64, 128, 32) for warps in (4, 2, 8))),
    key=["channels", "R", "T"],
)
@triton.jit
def lift_kernel(
    coefficients,
    tokens,
    matrices,
    places,
    starts,
    length,
    kept,
    channels,
    prefix,
    outside,
    num_blocks,
    num_parts,
    R: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program handles some channels of one block of one image, or of tokens outside the grid."""
    image, part, channel = locate(channels, num_parts, BLOCK_C)
    tokens += image * length * channels
    coefficients += image * kept * channels
    if part < num_blocks:
        row = tl.load(starts + part) + tl.arange(0, R)
        z = tl.load(
            coefficients + row[:, None] * channels + channel[None, :],
            mask=(row < tl.load(starts + part + 1))[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        transposed = tl.load(matrices + part * R * T + tl.arange(0, T)[:, None] + tl.arange(0, R)[None, :] * T)
        found = product(transposed, z, PRECISION)
        place = tl.load(places + part * T + tl.arange(0, T))
        tl.store(
            tokens + place[:, None] * channels + channel[None, :],
            found.to(tokens.dtype.element_ty),
            mask=(place >= 0)[:, None] & (channel < channels)[None, :],
        )
    else:
        on_grid, on_bases = length - outside, kept - outside
        first = (part - num_blocks) * T
        copy_outside(coefficients, tokens, first, prefix, outside, on_bases, on_grid, channel, channels, T)


@torch.library.custom_op("lbp_peft::lift", mutates_args=(), schema=f"(Tensor coefficients, {blocks.SCHEMA}) -> Tensor")
def lift(coefficients: Tensor, *plain: Any) -> Tensor:
    """(N, k, C) -> (N, L, C), contiguous; float32, float16 or bfloat16."""
    layout, bases = blocks.described(*plain)
    table = blocks.synthesis(layout, bases, coefficients.dtype, coefficients.device)
    (batch, kept, channels), length = coefficients.shape, layout.num_tokens
    found = coefficients.new_empty(batch, length, channels)
    parts = num_parts(table, layout.num_outside)
    num_blocks, R, T = table.matrix.shape
    with on_device_of(coefficients):
        lift_kernel[lambda meta: (batch * parts * triton.cdiv(channels, meta["BLOCK_C"]),)](
            coefficients,
            found,
            table.matrix,
            table.places,
            table.starts,
            length,
            kept,
            channels,
            layout.num_prefix_tokens,
            layout.num_outside,
            num_blocks,
            parts,
            R=R,
            T=T,
            PRECISION=product_precision(coefficients),
        )
    return found


@lift.register_fake
def _(coefficients: Tensor, *plain: Any) -> Tensor:
    layout, _ = blocks.described(*plain)
    return coefficients.new_empty(coefficients.shape[0], layout.num_tokens, coefficients.shape[2])


@register_flop_formula(torch.ops.lbp_peft.lift)
def _flops(coefficients_shape: torch.Size, *plain: Any, out_shape: object = None, **_: object) -> int:
    table = blocks.synthesis(*blocks.described(*plain), torch.float32, torch.device("cpu"))
    return 2 * coefficients_shape[0] * table.multiply_adds * coefficients_shape[2]
