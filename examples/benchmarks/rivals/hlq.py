"""HLQ: quantized input gradients and low-rank weight gradients, both by Hadamard transforms.

Source: S. Kim, E. Park, "HLQ: Fast and Efficient Backpropagation via Hadamard Low-rank Quantization" (arXiv
2406.15102).

dx = (g H)(H^T W) with a blockwise Hadamard matrix H of order 16 along the output channels; both factors are quantized
to 4 bits. dW = (A g)^T (A x), where A keeps the lowest 8 of 16 sequencies of each 16 tokens; both factors are quantized
to 8 bits. A x is kept in place of x, and takes an eighth of the memory of x in float32.

The forward pass and db are exact. dx and dW are approximations.

Only the paper's abstract and the authors' published code of HOT were available. The following is our reading of them:
the order 16 and the 8 of 16 sequencies; A takes the tokens row by row, [CLS] first, in one dimension; A x is kept, in 8
bits; g is rounded stochastically, and all else to the nearest number; each image has one scale, and so has W. In
contrast to the paper, products of integers are computed in float32 from the quantized values, so that the number of
bits affects the accuracy but not the time, and values of 4 bits are never stored. The setting `prefix` is our addition:
the token [CLS], if the model is read there, has much of the energy of g, and loses half of it as one of the 16 tokens
of a block.
"""

from __future__ import annotations

from torch import Tensor

from lbp_peft.formats.hadamard import fitting_size, rotate

from .linear import GradientRule
from .rounding import BLOCK, dequantize, lowest_sequencies, quantize

PER_IMAGE = (1, 2)  # the axes of (B, L, C) that share a scale


class HLQ(GradientRule):
    """Quantizes the factors of dx and dW after Hadamard transforms, and keeps few sequencies of those of dW.

    Args:
        bits: The number of bits of the factors of dx.
        weight_bits: The number of bits of the factors of dW, one of which is the kept input.
        rank: The number of sequencies, of 16, that dW keeps; 16 keeps all.
        prefix: The number of tokens before the grid whose part of dW is not low-rank.
    """

    def __init__(self, bits: int = 4, weight_bits: int = 8, rank: int = 8, prefix: int = 0):
        if not (2 <= bits <= 24 and 2 <= weight_bits <= 24 and 1 <= rank <= BLOCK and prefix >= 0):
            raise ValueError(f"bits must be from 2 to 24, rank from 1 to {BLOCK} and prefix at least 0")
        self.bits, self.weight_bits, self.rank, self.prefix = bits, weight_bits, rank, prefix

    def kept(self, x: Tensor) -> list[Tensor]:
        return list(quantize(lowest_sequencies(x, self.rank, self.prefix), self.weight_bits, PER_IMAGE))

    def grad_input(self, g: Tensor, weight: Tensor) -> Tensor:
        size = fitting_size(BLOCK, g.shape[-1])
        if size > 1:
            g, weight = rotate(g, size), rotate(weight.T, size).T
        return self.rounded_gradient("dx", g, self.bits) @ dequantize(*quantize(weight, self.bits, (0, 1)))

    def grad_weight(self, g: Tensor, kept: list[Tensor]) -> Tensor:
        x = dequantize(kept[0], kept[1])
        g_hat = self.rounded_gradient("dW", lowest_sequencies(g, self.rank, self.prefix), self.weight_bits)
        return g_hat.flatten(0, 1).T @ x.flatten(0, 1)

    def rounded_gradient(self, product: str, g: Tensor, bits: int) -> Tensor:
        """The rounded factor g of one of the two products, "dx" or "dW"."""
        return dequantize(*quantize(g, bits, PER_IMAGE, stochastic=True))
