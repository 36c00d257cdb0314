"""INSTANT: low-rank products in bases that are calibrated on the data, one for x and one for g.

Source: T.-K. Doan, T.-H. Tran, E. Tartaglione, N. Simidjievski, V.-T. Nguyen, "INSTANT: Compressing Gradients and
Activations for Resource-Efficient Training", ICLR 2026 (OpenReview P2q6Y7UweV).

P (R_x, L) and Q (R_y, L) are leading eigenvectors of the autocorrelations C_X = E[x x^T] and C_G = E[g g^T] along the
tokens, the same for all images. With the eigenvalues s_i of C, k is the smallest rank with sum_{i<=k} s_i^2 at least
the share `energy` of sum s_i^2; `oversampling` more are taken against the drift of the bases in training. Then
dW = (P g)^T (P x) and dx = Q^T ((Q g) W). Kept, in place of x: P x (B, R_x, C).

Exact: the forward pass and db. Approximated: dx and dW.

Our reading: the compensation for the discarded energy divides the squares of P and Q by the share of sum s_i^2 that
they keep, so it vanishes at full rank; bases are calibrated on one batch, every `every`-th, and used from that batch
on; 5 is the oversampling of the published code. P and Q belong to the layer and are not counted as saved activations.
Differs from the paper: convolutions are not covered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hosvd import rank_for
from .linear import BackwardRule


class INSTANT(BackwardRule):
    """
    Args:
        energy: Share of the squared eigenvalues to keep, above 0 and at most 1.
        oversampling: Further bases.
        every: Backward passes from one calibration to the next.
        compensate: Whether the discarded energy is made up for.
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
        self.passes += 1  # the last that a backward pass computes
        return (self.of_input @ g).flatten(0, 1).T @ kept[0].flatten(0, 1)

    def calibrated(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (R, L)"""
        values, vectors = torch.linalg.eigh((x @ x.mT).mean(0))
        squares, vectors = values.flip(0).square(), vectors.flip(1)
        rank = rank_for(squares, self.energy) + self.oversampling
        share = squares[:rank].sum() / squares.sum()
        scale = share.rsqrt() if self.compensate and share > 0 else 1
        return vectors[:, :rank].T.contiguous() * scale
