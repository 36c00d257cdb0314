"""What the kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED
from .blocks import Blocks


def tuned_over(*configs: triton.Config) -> list[triton.Config]:
    """What autotuning may choose from; it cannot time anything in the interpreter."""
    return list(configs[:1] if INTERPRETED else configs)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def product_precision(tensor: Tensor) -> str:
    """How [`product`] multiplies float32: three products in TF32 keep its digits, and run on the matrix units."""
    if INTERPRETED:
        return "interpreted"
    has_tf32 = torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return "tf32x3" if has_tf32 else "ieee"


def num_parts(blocks: Blocks, num_outside: int) -> int:
    """Programs for a tile of channels of one image: one a block, then as many as copy the tokens outside the grid."""
    return len(blocks.matrix) + triton.cdiv(num_outside, blocks.places.shape[1])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Of two matrices, summed in float32."""
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of bfloat16 as if they were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def locate(channels, num_parts, BLOCK_C: tl.constexpr):
    """Of this program: image, part of the image, channels."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(channels, BLOCK_C)
    image = (tile // tiles // num_parts).to(tl.int64)  # an offset of 32 bits could overflow
    return image, tile // tiles % num_parts, tile % tiles * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def copy_outside(
    source, target, first, prefix, outside, skipped_in_source, skipped_in_target, channel, channels, T: tl.constexpr
):
    """Copy T of the tokens outside the grid from `first` on, which come before and after the skipped ones."""
    token = (first + tl.arange(0, T)).to(tl.int64)
    mask = (token < outside)[:, None] & (channel < channels)[None, :]
    read = token + tl.where(token < prefix, 0, skipped_in_source)
    written = token + tl.where(token < prefix, 0, skipped_in_target)
    values = tl.load(source + read[:, None] * channels + channel[None, :], mask=mask)
    tl.store(target + written[:, None] * channels + channel[None, :], values, mask=mask)
