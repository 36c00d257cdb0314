"""HOT: HLQ with an input that is kept in few bits, and with scales that are chosen for each layer.

Source: S. Kim, J. Shin, S. Woo, E. Park, "HOT: Hadamard-based Optimized Training", CVPR 2025 (arXiv 2503.21261), and
the settings of its published code.

The two products are the same as in HLQ (see hlq.py): dx is computed from factors in 4 bits after a Hadamard transform,
and dW from the lower half of the sequencies in 8 bits. What the paper calls activation buffer compression means that x
is transformed and quantized in the forward pass already. What it calls layer-wise quantizer selection means that g has
one scale for each token, instead of one for each image, in the layers and products in which single tokens are far
larger than the others.

It is our reading that a layer chooses in its first backward pass, and that it takes one scale for each token if this
reduces the squared error of rounding to the nearest number by more than half. The differences from the paper are those
that hlq.py lists.
"""

from __future__ import annotations

from torch import Tensor

from .hlq import HLQ, PER_IMAGE
from .rounding import dequantize, quantize

PER_TOKEN = (2,)


class HOT(HLQ):
    """HLQ with one scale for each token where that is much more accurate.

    Args:
        bits, weight_bits, rank, prefix: As in [`HLQ`].
        threshold: The share of the squared error by which one scale for each token has to reduce it, to be chosen.
    """

    def __init__(self, bits: int = 4, weight_bits: int = 8, rank: int = 8, prefix: int = 0, threshold: float = 0.5):
        super().__init__(bits, weight_bits, rank, prefix)
        self.threshold = threshold
        self.axes: dict[str, tuple[int, ...]] = {}  # the axes that share a scale, by product

    def rounded_gradient(self, product: str, g: Tensor, bits: int) -> Tensor:
        if product not in self.axes:
            of_image, of_token = (
                (dequantize(*quantize(g, bits, axes)) - g).square().sum() for axes in (PER_IMAGE, PER_TOKEN)
            )
            self.axes[product] = PER_TOKEN if of_token < (1 - self.threshold) * of_image else PER_IMAGE
        return dequantize(*quantize(g, bits, self.axes[product], stochastic=True))
