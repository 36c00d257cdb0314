"""Positions after an axis is sampled or resized, as by convolutions, pooling and interpolation."""

from __future__ import annotations

import torch
from torch import Tensor

from .positions import LOST, column_of, compact, image_of, row_of, smallest_step, with_place


def sample(positions: Tensor, axis: int, places: Tensor) -> Tensor:
    """The positions at the given indices along an axis; indices out of range are clamped."""
    shape = list(positions.shape)
    shape[axis] = len(places)
    if positions.stride(axis) == 0:
        return positions.narrow(axis, 0, 1).expand(shape)
    places = places.clamp(0, positions.shape[axis] - 1).to(positions.device)
    return compact(positions).index_select(axis, places).expand(shape)


def sample_mixtures(positions: Tensor, axis: int, first: Tensor, length: int, places: Tensor) -> Tensor:
    """The positions of mixtures of several elements in a row: those of one of them.

    They are LOST where the elements are not neighbours in the image, as after rows were reordered.

    Args:
        positions: The positions.
        axis: The axis along which elements are mixed.
        first: The index of the first element of each mixture; indices out of range are padding.
        length: The number of elements of a mixture.
        places: The index of the element whose position each mixture has.
    """
    result = sample(positions, axis, places)
    if (
        length < 2
        or positions.shape[axis] == 1
        or positions.stride(axis) == 0
        or not _turns_back(compact(positions), axis)
    ):
        return result
    compacted, last = compact(positions), positions.shape[axis] - 1
    row_step, column_step = (smallest_step(compacted, coordinate) for coordinate in (row_of, column_of))
    is_apart = torch.zeros((), dtype=torch.bool, device=positions.device)
    for i in range(length - 1):
        index = (first + i).to(positions.device)
        a, b = (compacted.index_select(axis, place.clamp(0, last)) for place in (index, index + 1))
        is_pair = (a >= 0) & (b >= 0) & (image_of(a) == image_of(b))
        is_far = ((row_of(a) - row_of(b)).abs() > row_step) | ((column_of(a) - column_of(b)).abs() > column_step)
        is_apart = is_apart | is_pair & is_far
    chosen = compact(result)
    return torch.where(is_apart & (chosen >= 0), LOST, chosen).expand(result.shape)


def _turns_back(positions: Tensor, axis: int) -> bool:
    """Whether the rows, or the columns, of one image both rise and fall along an axis."""
    size = positions.shape[axis]
    a, b = positions.narrow(axis, 0, size - 1), positions.narrow(axis, 1, size - 1)
    is_pair = (a >= 0) & (b >= 0) & (image_of(a) == image_of(b))
    steps = [torch.where(is_pair, coordinate(b) - coordinate(a), 0) for coordinate in (row_of, column_of)]
    return any(bool(((step > 0).any(axis) & (step < 0).any(axis)).any()) for step in steps)


def resample(positions: Tensor, axis: int, size: int) -> Tensor:
    """The positions after an axis is resized: a sample of them if it shrinks, linear interpolation if it grows.

    Where neighbours along the axis are not neighbours in the image, positions of mixtures of them are LOST.
    """
    old = positions.shape[axis]
    if old == size or old == 1 or positions.stride(axis) == 0:
        return sample(positions, axis, torch.zeros(size, dtype=torch.int64) if old == 1 else torch.arange(size))
    if size < old:
        first = torch.arange(size) * old // size
        return sample_mixtures(positions, axis, first, -(-old // size), first + (old // size - 1) // 2)
    shape = list(positions.shape)
    shape[axis] = size
    positions = compact(positions)
    scaled = torch.arange(size) * old  # in units of 1 / size
    left = (scaled // size).clamp(max=old - 2)
    a, b = sample(positions, axis, left), sample(positions, axis, left + 1)
    view = [-1 if d == axis % positions.dim() else 1 for d in range(positions.dim())]
    rest = (scaled - left * size).to(positions.device).view(view)
    nearest = sample(positions, axis, scaled // size)
    row, column = (_interpolate(coordinate(a), coordinate(b), rest, old, size) for coordinate in (row_of, column_of))
    between = with_place(a, row, column)
    if _turns_back(positions, axis):  # for instance, nothing lies between two halves that were swapped
        between = torch.where(rest == 0, a, LOST)
    return torch.where((a >= 0) & (b >= 0) & (image_of(a) == image_of(b)), between, nearest).expand(shape)


def _interpolate(a: Tensor, b: Tensor, rest: Tensor, old: int, size: int) -> Tensor:
    """Interpolate rows, or columns, from a to b at the fraction `rest / size`, where `old` elements become `size`.

    Each new element gets the first row of the part that it covers, so that flipping an axis does not change its rows.
    """
    return (a * size + (b - a) * rest + (a - b).clamp(min=0) * (size - old)) // size
