"""Makes projections, and chooses the fastest way to project."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import heuristics, kernels
from ..bases.base import Basis
from ..bases.grids import TokenLayout
from ..bases.packed import PackedLayout
from ..bases.separable import SeparableBasis, WalshBasis
from ..bounded import BoundedCache
from ..instructions import product_dtype
from ..transforms import must_be_functional
from .base import Float32Projection, Projection
from .dense import DenseProjection
from .packed import PackedProjection
from .separable import SeparableProjection

# The heuristics that chose a projection are kept with it, so that their id is not used again.
_made: BoundedCache[tuple, tuple[Projection | None, heuristics.Heuristics]] = BoundedCache(64)


def num_coefficients(layout: TokenLayout, basis: Basis | None) -> int:
    """k, the number of rows that represent the L = `layout.num_tokens` tokens, including those outside the grid.

    It is L, and nothing is saved, if `basis` is None or has at least L functions.

    Raises:
        LayoutError: the basis does not exist for this layout.
    """
    if basis is None:
        return layout.num_tokens
    if isinstance(layout, PackedLayout):
        return sum(num_coefficients(part, basis) for part in layout.parts)
    return min(basis.num_coefficients(layout), layout.num_tokens)


def projection(
    layout: TokenLayout | None,
    basis: Basis | None,
    dtype: torch.dtype,
    device: torch.device,
    padding_mask: Tensor | None = None,
) -> Projection | None:
    """The fastest [`Projection`] on a basis; None if it would be the identity.

    Raises:
        ValueError: there is a basis but no layout.
        LayoutError: the basis does not exist for this layout.
    """
    if basis is None:
        return None
    if layout is None:
        raise ValueError("To project tokens on a basis, their positions have to be known: give a layout.")
    # Walsh bases are plain values. Other bases might change.
    if padding_mask is not None or must_be_functional() or not isinstance(basis, WalshBasis):
        return _new_projection(layout, basis, dtype, device, padding_mask)
    active = heuristics.active()
    key = (layout, basis, dtype, device, kernels.IN_USE, product_dtype(dtype, device), id(active))
    made = _made.get(key)
    if made is None:  # in small layers, making a projection takes longer than projecting
        made = _new_projection(layout, basis, dtype, device, None), active
        if made[0] is None or made[0].may_be_kept:
            _made[key] = made
    return made[0]


def _new_projection(
    layout: TokenLayout, basis: Basis, dtype: torch.dtype, device: torch.device, padding_mask: Tensor | None
) -> Projection | None:
    kept = num_coefficients(layout, basis)
    if kept == layout.num_tokens:
        return None
    if isinstance(layout, PackedLayout):
        return _packed_projection(layout, basis, dtype, device, padding_mask)
    if not kernels.IN_USE and product_dtype(dtype, device) != dtype:
        wide = projection(layout, basis, torch.float32, device, padding_mask)
        assert wide is not None  # since the projection is not the identity
        return Float32Projection(wide, dtype)
    if not isinstance(basis, SeparableBasis):
        return DenseProjection(layout, basis, dtype, device, padding_mask)
    is_dense = not kernels.IN_USE and (
        basis.outgrows_tokens(layout) or heuristics.active().use_dense_projection(kept, dtype, device)
    )
    return (DenseProjection if is_dense else SeparableProjection)(layout, basis, dtype, device, padding_mask)


def _packed_projection(
    layout: PackedLayout, basis: Basis, dtype: torch.dtype, device: torch.device, padding_mask: Tensor | None
) -> PackedProjection:
    lengths = [part.num_tokens for part in layout.parts]
    masks = [None] * len(lengths) if padding_mask is None else padding_mask.split(lengths, dim=1)
    parts = [projection(part, basis, dtype, device, mask) for part, mask in zip(layout.parts, masks, strict=True)]
    return PackedProjection(layout, basis, dtype, device, padding_mask, parts)
