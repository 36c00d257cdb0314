"""Chooses how tokens are projected on a basis."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import heuristics, kernels
from ..bases.base import Basis
from ..bases.grids import TokenLayout
from ..bases.separable import SeparableBasis
from ..instructions import product_dtype
from .base import Projection
from .dense import DenseProjection
from .separable import SeparableProjection


def num_kept(layout: TokenLayout, basis: Basis | None) -> int:
    """k: the rows that represent the L = `layout.num_tokens` tokens, those outside the grid included.

    It is L, and nothing is saved, if `basis` is None or keeps no fewer rows than there are tokens.

    Raises:
        LayoutError: the basis does not exist for this layout.
    """
    if basis is None:
        return layout.num_tokens
    return min(basis.num_coefficients(layout), layout.num_tokens)


def projection(
    layout: TokenLayout | None,
    basis: Basis | None,
    dtype: torch.dtype,
    device: torch.device,
    padding_mask: Tensor | None = None,
) -> Projection | None:
    """The fastest [`Projection`] whose results are not larger than the tokens; None if it would be the identity.

    Raises:
        ValueError: there is a basis but no layout.
        LayoutError: the basis does not exist for this layout.
    """
    if basis is None:
        return None
    if layout is None:
        raise ValueError("To project tokens on a basis, their positions have to be known: give a layout.")
    kept = num_kept(layout, basis)
    if kept == layout.num_tokens:
        return None
    if not kernels.IN_USE and product_dtype(dtype, device) != dtype:
        return Float32Projection(layout, basis, dtype, device, padding_mask)
    if not isinstance(basis, SeparableBasis):
        return DenseProjection(layout, basis, dtype, device, padding_mask)
    is_dense = not kernels.IN_USE and (
        basis.outgrows_tokens(layout) or heuristics.active().use_dense_projection(kept, dtype, device)
    )
    return (DenseProjection if is_dense else SeparableProjection)(layout, basis, dtype, device, padding_mask)


def with_dtype(of: Projection, dtype: torch.dtype) -> Projection:
    """The same projection for tokens of another dtype."""
    if of.dtype == dtype:
        return of
    if isinstance(of, Float32Projection):
        return with_dtype(of.wide, dtype)
    kind = type(of) if product_dtype(dtype, of.device) == dtype else Float32Projection
    return kind(of.layout, of.basis, dtype, of.device, of.padding_mask)


class Float32Projection(Projection):
    """Projects tokens of a 16-bit dtype in float32: for CPUs without instructions for that dtype."""

    def _make_matrices(self) -> None:
        wide = projection(self.layout, self.basis, torch.float32, self.device, self.padding_mask)
        assert wide is not None  # since this is no identity
        self.wide = wide

    def sum(self, coefficients: Tensor) -> Tensor:
        return self._apply("sum", coefficients)

    def _project(self, tokens: Tensor) -> Tensor:
        return self._apply("_project", tokens)

    def lift(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift", coefficients)

    def project_image(self, image: Tensor) -> Tensor:
        return self._apply("project_image", image)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift_image", coefficients)

    def _apply(self, name: str, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return getattr(self.wide, name)(values.float()).to(values.dtype)
