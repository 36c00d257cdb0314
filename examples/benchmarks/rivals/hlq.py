"""HLQ: quantised input gradients and low-rank weight gradients, both by Hadamard transforms.

Source: S. Kim, E. Park, "HLQ: Fast and Efficient Backpropagation via Hadamard Low-rank Quantization" (arXiv
2406.15102).

dx = (g H)(H^T W) with a blockwise Hadamard matrix H of order 16 along the output channels; both factors are rounded to
4 bits. dW = (A g)^T (A x), where A keeps the lowest 8 of 16 sequencies of each 16 tokens; both factors are rounded to
8 bits. Kept, in place of x: A x in 8 bits, an eighth of x in float32.

Exact: the forward pass and db. Approximated: dx and dW.

Our reading, since only the abstract and the authors' published code of HOT were at hand: order 16 and 8 of 16
sequencies; A runs over the tokens row by row, [CLS] first, in one dimension; A x is what is kept and has 8 bits; g is
rounded stochastically and the rest to the nearest; one scale for each image (W: one). Differs: the products of integers
are computed in float32 on the rounded values, so their number of bits shows in the accuracy and not in the time, and
4-bit values are never stored. An addition of ours is `prefix`: a [CLS] that the model is read out at carries much of g,
and loses half of its energy where it is one of the 16 tokens of a block.
"""

from __future__ import annotations

from torch import Tensor

from lbp_peft.formats.hadamard import fitting_size, rotate

from .linear import BackwardRule
from .rounding import BLOCK, lowest_sequencies, restored, rounded

PER_IMAGE = (1, 2)  # the axes of (B, L, C) that share a scale


class HLQ(BackwardRule):
    """
    Args:
        bits: Of the factors of dx.
        weight_bits: Of the factors of dW, the kept input among them.
        rank: How many of each 16 sequencies dW keeps; 16 keeps all.
        prefix: Tokens before the grid whose part of dW is not low-rank.
    """

    def __init__(self, bits: int = 4, weight_bits: int = 8, rank: int = 8, prefix: int = 0):
        if not (2 <= bits <= 24 and 2 <= weight_bits <= 24 and 1 <= rank <= BLOCK and prefix >= 0):
            raise ValueError(f"bits must be from 2 to 24, rank from 1 to {BLOCK} and prefix at least 0")
        self.bits, self.weight_bits, self.rank, self.prefix = bits, weight_bits, rank, prefix

    def kept(self, x: Tensor) -> list[Tensor]:
        return list(rounded(lowest_sequencies(x, self.rank, self.prefix), self.weight_bits, PER_IMAGE))

    def grad_input(self, g: Tensor, weight: Tensor) -> Tensor:
        size = fitting_size(BLOCK, g.shape[-1])
        turned, of_weight = (rotate(g, size), rotate(weight.T, size).T) if size > 1 else (g, weight)
        return self.rounded_gradient("dx", turned, self.bits) @ restored(*rounded(of_weight, self.bits, (0, 1)))

    def grad_weight(self, g: Tensor, kept: list[Tensor]) -> Tensor:
        x = restored(kept[0], kept[1])
        small = self.rounded_gradient("dW", lowest_sequencies(g, self.rank, self.prefix), self.weight_bits)
        return small.flatten(0, 1).T @ x.flatten(0, 1)

    def rounded_gradient(self, product: str, g: Tensor, bits: int) -> Tensor:
        """g as one of the two products gets it."""
        return restored(*rounded(g, bits, PER_IMAGE, stochastic=True))
