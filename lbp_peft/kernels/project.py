"""Project tokens in one pass: every token is read once, and only the kept coefficients are written."""

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
def project_kernel(
    tokens,
    coefficients,
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
        place = tl.load(places + part * T + tl.arange(0, T))
        x = tl.load(
            tokens + place[:, None] * channels + channel[None, :],
            mask=(place >= 0)[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        matrix = tl.load(matrices + part * R * T + tl.arange(0, R)[:, None] * T + tl.arange(0, T)[None, :])
        found = product(matrix, x, PRECISION)
        row = tl.load(starts + part) + tl.arange(0, R)
        tl.store(
            coefficients + row[:, None] * channels + channel[None, :],
            found.to(coefficients.dtype.element_ty),
            mask=(row < tl.load(starts + part + 1))[:, None] & (channel < channels)[None, :],
        )
    else:
        on_grid, on_bases = length - outside, kept - outside
        first = (part - num_blocks) * T
        copy_outside(tokens, coefficients, first, prefix, outside, on_grid, on_bases, channel, channels, T)


@torch.library.custom_op("lbp_peft::project", mutates_args=(), schema=f"(Tensor tokens, {blocks.SCHEMA}) -> Tensor")
def project(tokens: Tensor, *plain: Any) -> Tensor:
    """(N, L, C) -> (N, k, C), contiguous; float32, float16 or bfloat16."""
    layout, bases = blocks.described(*plain)
    table = blocks.analysis(layout, bases, tokens.dtype, tokens.device)
    (batch, length, channels), kept = tokens.shape, blocks.num_coefficients(layout, bases)
    found = tokens.new_empty(batch, kept, channels)
    parts = num_parts(table, layout.num_outside)
    num_blocks, R, T = table.matrix.shape
    with on_device_of(tokens):
        project_kernel[lambda meta: (batch * parts * triton.cdiv(channels, meta["BLOCK_C"]),)](
            tokens,
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
            PRECISION=product_precision(tokens),
        )
    return found


@project.register_fake
def _(tokens: Tensor, *plain: Any) -> Tensor:
    return tokens.new_empty(tokens.shape[0], blocks.num_coefficients(*blocks.described(*plain)), tokens.shape[2])


@register_flop_formula(torch.ops.lbp_peft.project)
def _flops(tokens_shape: torch.Size, *plain: Any, out_shape: object = None, **_: object) -> int:
    table = blocks.analysis(*blocks.described(*plain), torch.float32, torch.device("cpu"))
    return 2 * tokens_shape[0] * table.multiply_adds * tokens_shape[2]
