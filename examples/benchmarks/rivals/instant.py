"""INSTANT: low-rank products in bases that are calibrated on the data, one for x and one for g.

Source: T.-K. Doan, T.-H. Tran, E. Tartaglione, N. Simidjievski, V.-T. Nguyen, "INSTANT: Compressing Gradients and
Activations for Resource-Efficient Training", ICLR 2026 (OpenReview P2q6Y7UweV).

The rows of P (R_x, L) and Q (R_y, L) are the leading eigenvectors of the autocorrelations C_X = E[x x^T] and
C_G = E[g g^T] along the tokens. They are the same for all images. With the eigenvalues s_i of C, the rank k is the
smallest one at which sum_{i<=k} s_i^2 is at least the share `energy` of the sum of all s_i^2. `oversampling` further
eigenvectors are taken, since the best bases change during training. Then dW = (P g)^T (P x) and dx = Q^T ((Q g) W).
P x (B, R_x, C) is kept in place of x.

The forward pass and db are exact. dx and dW are approximations.

The following is our reading of the paper: the compensation for the discarded energy divides the squares of P and Q by
the share of the sum of s_i^2 that they keep, so that there is none at full rank; the bases are calibrated on one batch
of every `every`, and used from that batch on. The oversampling of 5 is that of the published code. P and Q belong to
the layer, and do not count as saved activations. Convolutions are not supported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hosvd import rank_for
from .linear import GradientRule


class INSTANT(GradientRule):
    """Computes low-rank gradients in calibrated bases.

    Args:
        energy: The share of the squared eigenvalues that is kept, above 0 and at most 1.
        oversampling: The number of further eigenvectors.
        every: The number of backward passes from one calibration to the next.
        compensate: Whether the gradients are scaled up to compensate for the discarded energy.
    """

    def __init__(self, energy: float = 0.95, oversampling: int = 5, every: int = 100, compensate: bool = True):
        if not 0 < energy <= 1 or oversampling < 0 or every < 1:
            raise ValueError("energy must be above 0 and at most 1, oversampling at least 0, and every at least 1")
        self.energy, self.oversampling, self.every, self.compensate = energy, oversampling, every, compensate
        self.passes = 0
        self.of_input = self.of_gradient = torch.empty(0, 0)

    def kept(self, x: Tensor) -> list[Tensor]:
        if self.passes % self.every == 0:
            self.of_input = self.calibrated(x)
        return [self.of_input @ x]

    def grad_input(self, g: Tensor, weight: Tensor) -> Tensor:
        if self.passes % self.every == 0:
            self.of_gradient = self.calibrated(g)
        return self.of_gradient.T @ ((self.of_gradient @ g) @ weight)

    def grad_weight(self, g: Tensor, kept: list[Tensor]) -> Tensor:
        self.passes += 1  # a backward pass computes this gradient last
        return (self.of_input @ g).flatten(0, 1).T @ kept[0].flatten(0, 1)

    def calibrated(self, x: Tensor) -> Tensor:
        """The leading eigenvectors of the tokens' autocorrelation, scaled: (B, L, C) -> (R, L)."""
        values, vectors = torch.linalg.eigh((x @ x.mT).mean(0))
        squares, vectors = values.flip(0).square(), vectors.flip(1)
        rank = rank_for(squares, self.energy) + self.oversampling
        share = squares[:rank].sum() / squares.sum()
        scale = share.rsqrt() if self.compensate and share > 0 else 1
        return vectors[:, :rank].T.contiguous() * scale
