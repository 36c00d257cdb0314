"""Rules for operations that pick or replace elements by an index.

An index that depends on the input, or a random one, differs in each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..positions import FIRST_TEXT, NOWHERE, compact, merge, place_in_image, same_places, source_of
from .registry import Result, Tracer, are_constant, positions_or_nowhere, rule


@rule("__getitem__")
def _getitem(tracer: Tracer, x: Tensor, index: Any) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    picked = _axes_of_index(index, x.dim(), tracer)
    return positions[index] if _have_same_places(positions, picked) else None


def _axes_of_index(index: object, num_axes: int, tracer: Tracer) -> list[int]:
    """The axes along which an index may pick other places in the next pass."""
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(_num_axes_of(part) for part in parts)
    axis = 0
    picked: list[int] = []
    for part in parts:
        if part is Ellipsis:
            axis += num_axes - consumed
            continue
        width = _num_axes_of(part)
        # Numbers, and lists of them, were chosen by Python code: see `dependencies.py`.
        if not are_constant(tracer, part):
            picked += range(axis, axis + width)
        axis += width
    return picked


def _num_axes_of(part: object) -> int:
    """The number of axes of the tensor that one part of an index applies to."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _have_same_places(positions: Tensor, axes: list[int]) -> bool:
    """Whether elements with different indices along these axes alone have one place, perhaps in different images."""
    compacted = place_in_image(compact(positions))
    return all(compacted.shape[axis] <= 1 or bool((compacted == compacted.narrow(axis, 0, 1)).all()) for axis in axes)


@rule("__setitem__")
def _setitem(tracer: Tracer, x: Tensor, index: Any, value: Any) -> Result:
    positions = positions_or_nowhere(tracer, x)
    if not isinstance(value, Tensor):  # replacing elements by a number does not move them
        return positions
    new = positions_or_nowhere(tracer, value)
    picked = _axes_of_index(index, x.dim(), tracer)
    if picked and not (_have_same_places(positions, picked) and same_places(positions[index], new)):
        return None if bool((compact(new) >= 0).any()) else positions
    positions = positions.clone()
    positions[index] = new.to(positions.device)
    return positions


@rule("index_select", "take_along_dim", "gather")
def _index_select(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    positions, name = tracer.positions(x), tracer.current_name
    if positions is None:
        return None
    order = ("indices", "dim") if name == "take_along_dim" else ("dim", "index")
    named = dict(zip(order, args, strict=False)) | kwargs
    index, axis = named.get("index", named.get("indices")), named.get("dim")
    if index is None or axis is None or not (tracer.is_constant(index) or _have_same_places(positions, [axis])):
        return None
    others = {key: value for key, value in kwargs.items() if key != "sparse_grad"}
    selected: Tensor = getattr(torch, name)(positions, *args, **others)
    return selected


@rule("index_fill", "masked_fill")
def _index_fill(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Elements that get other values keep their positions."""
    return tracer.positions(x)


@rule("index_add", "index_reduce")
def _index_add(tracer: Tracer, x: Tensor, dim: int, index: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Result:
    return _add_at_index(tracer, x, dim, index, source, Tensor.index_copy)


@rule("scatter_add")
def _scatter_add(tracer: Tracer, x: Tensor, dim: int, index: Tensor, src: Tensor) -> Result:
    return _add_at_index(tracer, x, dim, index, src, Tensor.scatter)


def _add_at_index(
    tracer: Tracer, x: Tensor, axis: int, index: Tensor, source: Tensor, put: Callable[..., Tensor]
) -> Result:
    """The positions of a sum. As in other sums, they are those of x if it is not known which elements are added where.

    Args:
        put: The operation that puts elements in these places instead of adding them.
    """
    positions, added = tracer.positions(x), tracer.positions(source)
    if positions is None or added is None or not tracer.is_constant(index):
        return positions
    return merge([positions, put(torch.full(x.shape, NOWHERE, device=x.device), axis, index, added)], x.shape)


@rule("index_copy", "index_put", "masked_scatter", "scatter", "scatter_reduce")
def _index_put(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Elements of a source take the places of others. Image features that are put into a text become its words."""
    positions = tracer.positions(x)
    sources = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and tracer.trail(t) is not None]
    if positions is not None and (not sources or bool((source_of(compact(positions)) >= FIRST_TEXT).any())):
        return positions
    if tracer.current_name != "index_copy" or len(args) != 3:
        return None
    axis, index, source = args
    moved = positions_or_nowhere(tracer, source)
    is_same_in_each_pass = tracer.is_constant(index) or _have_same_places(moved, [axis])
    return positions_or_nowhere(tracer, x).index_copy(axis, index, moved) if is_same_in_each_pass else None
