"""HOT: HLQ with a kept input in few bits and a choice of scales for each layer.

Source: S. Kim, J. Shin, S. Woo, E. Park, "HOT: Hadamard-based Optimized Training", CVPR 2025 (arXiv 2503.21261), and
the settings of its published code.

Both products are those of HLQ (see hlq.py): dx from 4-bit factors after a Hadamard transform, dW from the lower half of
the sequencies in 8 bits. The activation buffer compression of the paper is that A x is transformed and rounded in the
forward pass and kept so. The layer-wise quantiser selection is that g has one scale for each token instead of one for
each image, in the layers and products where outlying tokens call for it.

Our reading: a layer chooses in its first backward pass, and takes one scale for each token if that lowers the squared
error of rounding to the nearest by more than half. Differs as hlq.py says.
"""

from __future__ import annotations

from torch import Tensor

from .hlq import HLQ, PER_IMAGE
from .rounding import restored, rounded

PER_TOKEN = (2,)


class HOT(HLQ):
    """
    Args:
        bits, weight_bits, rank, prefix: As of HLQ.
        threshold: Share of the squared error that one scale for each token has to save to be chosen.
    """

    def __init__(self, bits: int = 4, weight_bits: int = 8, rank: int = 8, prefix: int = 0, threshold: float = 0.5):
        super().__init__(bits, weight_bits, rank, prefix)
        self.threshold = threshold
        self.axes: dict[str, tuple[int, ...]] = {}  # product -> axes that share a scale

    def rounded_gradient(self, product: str, g: Tensor, bits: int) -> Tensor:
        if product not in self.axes:
            of_image, of_token = (
                (restored(*rounded(g, bits, axes)) - g).square().sum() for axes in (PER_IMAGE, PER_TOKEN)
            )
            self.axes[product] = PER_TOKEN if of_token < (1 - self.threshold) * of_image else PER_IMAGE
        return restored(*rounded(g, bits, self.axes[product], stochastic=True))
