"""Rounding to few bits, and blockwise Hadamard transforms along the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lbp_peft.bases.walsh import walsh_functions

BLOCK = 16  # the order of the Hadamard transforms in HLQ and HOT


def quantize(x: Tensor, bits: int, axes: tuple[int, ...], stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """Round x to symmetric integers, in int8 for up to 8 bits and in int32 for more, with scales in the dtype of x.

    Args:
        x: A tensor of any shape and floating dtype.
        bits: The number of bits of an integer.
        axes: The axes of x that share a scale.
        stochastic: Whether values are rounded up with the probability of their fraction, so that the mean of the result
            is x, instead of to the nearest integer.
    """
    largest = 2 ** (bits - 1) - 1
    scales = x.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / largest
    steps = x / scales
    steps = (steps + torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    return steps.clamp_(-largest, largest).to(torch.int8 if bits <= 8 else torch.int32), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """The inverse of [`quantize`], up to rounding."""
    return values.to(scales.dtype) * scales


def lowest_sequencies(x: Tensor, rank: int, prefix: int = 0) -> Tensor:
    """The first Walsh coefficients of each 16 tokens: (B, L, C) -> (B, prefix + ceil((L - prefix) / 16) * rank, C).

    The last block is padded with zeros. At rank 16, inner products along the tokens stay the same.

    Args:
        x: The tokens.
        rank: The number of coefficients of each 16 tokens.
        prefix: The number of tokens before the blocks. They stay as they are.
    """
    before, x = x[:, :prefix], x[:, prefix:]
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % BLOCK))
    functions = torch.from_numpy(walsh_functions(BLOCK)[:rank] * BLOCK**-0.5).to(x)
    return torch.cat((before, (functions @ x.unflatten(1, (-1, BLOCK))).flatten(1, 2)), 1)
