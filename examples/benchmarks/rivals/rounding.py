"""Rounding to few bits, and blockwise Hadamard transforms along the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lbp_peft.bases.walsh import walsh_functions

BLOCK = 16  # the order of the Hadamard transforms in HLQ and HOT


def rounded(x: Tensor, bits: int, axes: tuple[int, ...], stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """x -> symmetric integers, in int8 for up to 8 bits, else int32; and scales in x's dtype.

    Args:
        axes: Axes of x that share a scale.
        stochastic: Round up with the probability of the fraction, so that the mean is x, instead of to the nearest.
    """
    largest = 2 ** (bits - 1) - 1
    scales = x.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / largest
    steps = x / scales
    steps = (steps + torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    return steps.clamp_(-largest, largest).to(torch.int8 if bits <= 8 else torch.int32), scales


def restored(values: Tensor, scales: Tensor) -> Tensor:
    return values.to(scales.dtype) * scales


def lowest_sequencies(x: Tensor, rank: int, prefix: int = 0) -> Tensor:
    """(B, L, C) -> (B, prefix + ceil((L - prefix) / 16) * rank, C): of each 16 tokens, the first Walsh coefficients.

    The last block is filled up with zeros. At rank 16 inner products along the tokens stay the same.

    Args:
        prefix: Tokens before the blocks, which stay as they are.
    """
    before, x = x[:, :prefix], x[:, prefix:]
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % BLOCK))
    functions = torch.from_numpy(walsh_functions(BLOCK)[:rank] * BLOCK**-0.5).to(x)
    return torch.cat((before, (functions @ x.unflatten(1, (-1, BLOCK))).flatten(1, 2)), 1)
