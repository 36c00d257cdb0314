"""Functions that the kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED
from .blocks import Blocks


def tuned_over(*configs: triton.Config) -> list[triton.Config]:
    """The configurations for autotuning: only the first in the interpreter, which cannot be timed."""
    return list(configs[:1] if INTERPRETED else configs)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """A context in which a tensor's device is the current one, on which Triton runs kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def product_precision(tensor: Tensor) -> str:
    """How [`product`] multiplies float32. Three products in TF32 have its accuracy and use the matrix units."""
    if INTERPRETED:
        return "interpreted"
    has_tf32 = torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return "tf32x3" if has_tf32 else "ieee"


def num_parts(blocks: Blocks, num_outside: int) -> int:
    """The number of programs for a tile of channels of one image: one for each block, and some for other tokens."""
    return len(blocks.matrix) + triton.cdiv(num_outside, blocks.places.shape[1])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """The product of two matrices, summed in float32."""
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of bfloat16 as if they were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def locate(channels, num_parts, BLOCK_C: tl.constexpr):
    """The image, the part of the image and the channels of this program."""
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
