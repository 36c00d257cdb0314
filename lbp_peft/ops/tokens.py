"""The axes of tokens: (N, ..., C) as (N, L, C), and sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.grids import TokenLayout
from ..projection import Projection
from .leading_tokens import LeadingTokens


def as_tokens(x: Tensor, layout: TokenLayout | None = None) -> Tensor:
    """(N, ..., C) -> (N, L, C). If there is a layout, its axes run over the tokens, and packed images are separated."""
    if layout is None or (layout.axes is None and layout.packed == 1):
        return x if x.dim() == 3 else x.flatten(1, -2)
    order = _images_first(x.dim() - 1, layout)
    return x.permute(*order, -1).reshape(-1, layout.num_tokens, x.shape[-1])


def from_tokens(tokens: Tensor, shape: torch.Size, layout: TokenLayout | None = None) -> Tensor:
    """The inverse of [`as_tokens`]: (N, L, C) -> `shape`, with C as its last axis."""
    if layout is None or layout.axes is None:
        return tokens.reshape(*shape[:-1], tokens.shape[-1])
    order = _images_first(len(shape) - 1, layout)
    ordered = tokens.reshape(*(shape[axis] for axis in order), tokens.shape[-1])
    return ordered.permute(*(order.index(axis) for axis in range(len(order))), -1)


def _images_first(num_axes: int, layout: TokenLayout) -> list[int]:
    axes = tuple(range(1, num_axes)) if layout.axes is None else layout.axes
    return [*(axis for axis in range(num_axes) if axis not in axes), *axes]


def sum_of_tokens(g: Tensor, g_hat: Tensor | None, projection: Projection | LeadingTokens | None) -> Tensor:
    """The gradient of a bias: the sum of g over images and tokens, shape (C,).

    Args:
        g: The gradient of the outputs, shape (N, L, C).
        g_hat: Its projection, shape (N, k, C); None: it was not computed.
        projection: The projection. If it preserves sums, the sum is computed from the k coefficients.
    """
    if g_hat is not None and projection is not None and projection.preserves_sums and g.dtype.itemsize >= 4:
        return projection.sum(g_hat)
    return g.sum(dim=(0, 1))
