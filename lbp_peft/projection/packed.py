"""Projection of the concatenated tokens of several grids, such as images of several sizes in one sequence.

The basis is block-diagonal. It is applied grid by grid, without a matrix over all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bases.base import Basis
from ..bases.packed import PackedLayout
from .base import Projection


class PackedProjection(Projection):
    """Projects the tokens of each grid by itself, see [`Projection`].

    The coefficients of the grids are concatenated too. The tokens of a grid are kept if a projection would have as many
    coefficients.

    Args:
        parts: The projection of each grid; None: its tokens are kept.
    """

    layout: PackedLayout

    def __init__(
        self,
        layout: PackedLayout,
        basis: Basis,
        dtype: torch.dtype,
        device: torch.device,
        padding_mask: Tensor | None,
        parts: Sequence[Projection | None],
    ):
        self._parts = list(parts)
        self._lengths = [part.num_tokens for part in layout.parts]
        self._kept = [
            length if part is None else part.num_coefficients for part, length in zip(parts, self._lengths, strict=True)
        ]
        super().__init__(layout, basis, dtype, device, padding_mask)

    def _make_matrices(self) -> None:
        """Do nothing: the parts have the matrices."""

    def of_dtype(self, dtype: torch.dtype) -> Projection:
        if self.dtype == dtype:
            return self
        parts = [part and part.of_dtype(dtype) for part in self._parts]
        return PackedProjection(self.layout, self.basis, dtype, self.device, self.padding_mask, parts)

    @property
    def num_coefficients(self) -> int:
        return sum(self._kept)

    @property
    def may_be_kept(self) -> bool:
        return all(part is None or part.may_be_kept for part in self._parts)

    def sum(self, coefficients: Tensor) -> Tensor:
        return torch.stack(
            [
                values.sum(dim=(0, 1)) if part is None else part.sum(values)
                for part, values in zip(self._parts, coefficients.split(self._kept, dim=1), strict=True)
            ]
        ).sum(dim=0)

    def project(self, tokens: Tensor) -> Tensor:
        return self._apply("project", tokens, self._lengths)

    def _project(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)

    def project_gradient(self, tokens: Tensor) -> Tensor:
        return self._apply("project_gradient", tokens, self._lengths)

    def lift(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift", coefficients, self._kept)

    def project_image(self, image: Tensor) -> Tensor:
        raise NotImplementedError("Images are never packed.")

    def lift_image(self, coefficients: Tensor) -> Tensor:
        raise NotImplementedError("Images are never packed.")

    def _apply(self, name: str, values: Tensor, lengths: list[int]) -> Tensor:
        pieces = zip(self._parts, values.split(lengths, dim=1), strict=True)
        return torch.cat([piece if part is None else getattr(part, name)(piece) for part, piece in pieces], dim=1)
