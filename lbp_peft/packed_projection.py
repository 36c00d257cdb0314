"""Projection of tokens that lie on several grids, one after another: images of several sizes in one sequence.

The bases are block-diagonal. They are applied grid by grid, so that the cost is that of the grids alone, and no matrix
over all tokens is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bases.packed import PackedLayout
from .projection import Projection, num_kept, projection


class PackedProjection(Projection):
    """The linear maps between the L tokens of several grids and their k coefficients, see [`Projection`].

    The coefficients of each grid come one after another, too. All tokens of a grid are kept as they are where a
    projection would not make them fewer.
    """

    layout: PackedLayout

    def _make_matrices(self) -> None:
        parts = self.layout.parts
        paddings = [None] * len(parts) if self.padding is None else self.padding.split(self._lengths, dim=1)
        self._parts = [
            projection(part, self.bases, self.dtype, self.device, padding)
            for part, padding in zip(parts, paddings, strict=True)
        ]

    @property
    def _lengths(self) -> list[int]:
        return [part.num_tokens for part in self.layout.parts]

    @property
    def _kept(self) -> list[int]:
        return [num_kept(part, self.bases) for part in self.layout.parts]

    def of_dtype(self, dtype: torch.dtype) -> Projection:
        if self.dtype == dtype:
            return self
        return PackedProjection(self.layout, self.bases, dtype, self.device, self.padding)

    def sum(self, coefficients: Tensor) -> Tensor:
        return torch.stack(
            [
                values.sum(dim=(0, 1)) if part is None else part.sum(values)
                for part, values in zip(self._parts, coefficients.split(self._kept, dim=1), strict=True)
            ]
        ).sum(dim=0)

    def project(self, tokens: Tensor) -> Tensor:
        return self._apply("project", tokens, self._lengths)

    def project_gradient(self, tokens: Tensor) -> Tensor:
        return self._apply("project_gradient", tokens, self._lengths)

    def lift(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift", coefficients, self._kept)

    def _apply(self, name: str, values: Tensor, lengths: list[int]) -> Tensor:
        pieces = zip(self._parts, values.split(lengths, dim=1), strict=True)
        return torch.cat([piece if part is None else getattr(part, name)(piece) for part, piece in pieces], dim=1)
