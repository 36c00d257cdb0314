"""Activation compression by a truncated higher-order SVD.

Source: L.-T. Nguyen, A. Quelennec, E. Tartaglione, S. Tardieu, V.-T. Nguyen, "Activation Map Compression through Tensor
Decomposition for Deep Learning", NeurIPS 2024 (arXiv 2411.06346).

Kept, in place of x (B, L, C): a core S (r1, r2, r3) and orthonormal factors U1 (B, r1), U2 (L, r2), U3 (C, r3), the
leading left singular vectors of the three unfoldings of x. Along each axis, the ranks are the smallest whose squared
singular values make up the share `energy` of all.

Exact: the forward pass, dx, db. Approximated: dW, which is that of x projected onto the three subspaces, computed
without building x again.

Differs from the paper: it has convolutions with four axes, this has linear layers with three. The singular vectors are
found as eigenvectors of an unfolding's Gram matrix, or where that is larger than the other side, of the triangle of
its QR decomposition; both give the same subspace. The order of contraction in the backward pass is ours: tokens,
images, channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import BackwardRule


class HOSVD(BackwardRule):
    """
    Args:
        energy: Share of the energy that each axis keeps, above 0 and at most 1, where everything is kept.
    """

    def __init__(self, energy: float = 0.9):
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
        self.energy = energy

    def kept(self, x: Tensor) -> list[Tensor]:
        factors = [leading_vectors(x.movedim(axis, 0).flatten(1), self.energy) for axis in range(3)]
        images, tokens, channels = factors
        core = x @ channels
        core = tokens.T @ core  # (B, r2, r3)
        core = (images.T @ core.flatten(1)).unflatten(1, core.shape[1:])
        return [core, *factors]

    def grad_weight(self, g: Tensor, kept: list[Tensor]) -> Tensor:
        core, images, tokens, channels = kept
        small = tokens.T @ g  # (B, r2, C_out)
        small = (images.T @ small.flatten(1)).unflatten(1, small.shape[1:])
        return small.flatten(0, 1).T @ core.flatten(0, 1) @ channels.T


def leading_vectors(matrix: Tensor, energy: float) -> Tensor:
    """(M, N) -> the left singular vectors (M, r) that hold the share of the energy; all min(M, N) at a share of 1."""
    rows, columns = matrix.shape
    basis, small = torch.linalg.qr(matrix) if rows > columns else (None, matrix)
    squares, vectors = torch.linalg.eigh(small @ small.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    vectors = vectors[:, : rank_for(squares, energy)]
    return vectors if basis is None else basis @ vectors


def rank_for(energies: Tensor, share: float) -> int:
    """How many of the energies, in descending order, make up the share of their sum; at a share of 1 all."""
    if share >= 1:
        return len(energies)
    reached = energies.cumsum(0) >= share * energies.sum()
    return int(reached.int().argmax()) + 1
