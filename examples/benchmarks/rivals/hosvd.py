"""Activation compression by a truncated higher-order SVD.

Source: L.-T. Nguyen, A. Quelennec, E. Tartaglione, S. Tardieu, V.-T. Nguyen, "Activation Map Compression through Tensor
Decomposition for Deep Learning", NeurIPS 2024 (arXiv 2411.06346).

In place of x (B, L, C), the method keeps a core S (r1, r2, r3) and orthonormal factors U1 (B, r1), U2 (L, r2),
U3 (C, r3), which are the leading left singular vectors of the three unfoldings of x. The rank along each axis is the
smallest at which the squared singular values make up the share `energy` of their sum.

The forward pass, dx and db are exact. dW is the weight gradient of x projected onto the three subspaces. It is computed
without building x again.

The paper adapts convolutions, whose inputs have four axes; the inputs of linear layers here have three. The singular
vectors are found as eigenvectors of an unfolding's Gram matrix. If that is larger than the unfolding's other side, they
are found from the triangle of its QR decomposition, which gives the same subspace. The order of contraction in the
backward pass (tokens, images, channels) is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import GradientRule


class HOSVD(GradientRule):
    """Keeps a truncated higher-order SVD of the input.

    Args:
        energy: The share of the energy that is kept along each axis, above 0 and at most 1. At 1, everything is kept.
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
        g_hat = tokens.T @ g  # (B, r2, C_out)
        g_hat = (images.T @ g_hat.flatten(1)).unflatten(1, g_hat.shape[1:])
        return g_hat.flatten(0, 1).T @ core.flatten(0, 1) @ channels.T


def leading_vectors(matrix: Tensor, energy: float) -> Tensor:
    """The left singular vectors (M, r) of a matrix (M, N) that keep a share of its energy; at a share of 1, all."""
    rows, columns = matrix.shape
    basis, triangle = torch.linalg.qr(matrix) if rows > columns else (None, matrix)
    squares, vectors = torch.linalg.eigh(triangle @ triangle.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    vectors = vectors[:, : rank_for(squares, energy)]
    return vectors if basis is None else basis @ vectors


def rank_for(energies: Tensor, share: float) -> int:
    """The number of energies, in descending order, that make up a share of their sum; at a share of 1, all of them."""
    if share >= 1:
        return len(energies)
    reached = energies.cumsum(0) >= share * energies.sum()
    return int(reached.int().argmax()) + 1
