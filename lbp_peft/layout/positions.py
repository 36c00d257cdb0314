"""Positions: integers that say where in a model's input each element of a tensor comes from.

A position encodes the input, the image (or text) of the batch, and the row and column in it. A tensor of positions has
the shape of the tensor it describes, so any operation that moves data (reshape, permute, cat, roll, slices, ...) can be
applied to the positions unchanged. Rows and columns are counted in quarters of a pixel, so that upsampled feature maps
have positions of their own.

Tensors of positions are mostly expanded views, since all channels of a token have the same position. Expanding takes no
memory, and functions of positions work on what is not expanded ([`compact`]). An operation that copies its input also
copies what was expanded, so its result goes through [`condense`].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The position of an element that does not come from the input, such as a learned token or padding.
NOWHERE = -1
# The position of an element whose place is not known, or that comes from many places at once.
LOST = -2

# Inputs with this number or a higher one are texts; the others are images.
FIRST_TEXT = 8

UNITS_PER_PIXEL = 4
# Tensors of fewer elements are not condensed, which would take longer than it saves.
_FEW = 2**14
_BITS = 20
_MASK = 2**_BITS - 1


def encode(source: int, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Positions of elements, int64.

    Args:
        source: The number of the input, 0 to 15.
        image: The number of the image in the batch, below 2**18.
        row, column: The row and column in pixels, or in tokens of a text, below 2**18.
    """
    return ((source << 18) + image << 2 * _BITS) + (row * UNITS_PER_PIXEL << _BITS) + column * UNITS_PER_PIXEL


def renumber(positions: Tensor, first: int) -> Tensor:
    """The positions, with images numbered from `first` on instead of from 0."""
    if first == 0:
        return positions
    compacted = compact(positions)
    return torch.where(compacted < 0, compacted, compacted + (first << 2 * _BITS)).expand(positions.shape)


def image_of(positions: Tensor) -> Tensor:
    """Which image of which input, as one integer; negative where there is no position."""
    return positions >> 2 * _BITS


def source_of(positions: Tensor) -> Tensor:
    """The number of the input; negative where there is no position."""
    return positions >> 2 * _BITS + 18


def number_of(positions: Tensor) -> Tensor:
    """The number of the image in its input, where there is a position."""
    return image_of(positions) & 2**18 - 1


def row_of(positions: Tensor) -> Tensor:
    """The row, in quarters of a pixel, where there is a position."""
    return positions >> _BITS & _MASK


def column_of(positions: Tensor) -> Tensor:
    """The column, in quarters of a pixel, where there is a position."""
    return positions & _MASK


def place_in_image(positions: Tensor) -> Tensor:
    """Row and column as one integer; negative positions stay as they are."""
    return torch.where(positions < 0, positions, positions & 2 ** (2 * _BITS) - 1)


def with_place(positions: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The positions with another row and column, in quarters of a pixel, of the same images."""
    return (image_of(positions) << 2 * _BITS) + (row << _BITS) + column


def spacing(first: Tensor, second: Tensor) -> int:
    """The smallest nonzero distance along either axis between pairs of positions, in quarters of a pixel."""
    known = (first >= 0) & (second >= 0)
    steps = torch.cat(
        [(coordinate(first) - coordinate(second)).abs()[known].flatten() for coordinate in (row_of, column_of)]
    )
    steps = steps[steps > 0]
    return int(steps.min()) if len(steps) else 0


def compact(positions: Tensor) -> Tensor:
    """The tensor with every expanded axis reduced to a single element."""
    for axis, (size, stride) in enumerate(zip(positions.shape, positions.stride(), strict=True)):
        if size > 1 and stride == 0:
            positions = positions.narrow(axis, 0, 1)
    return positions


def condense(positions: Tensor) -> Tensor:
    """The same positions, expanded along each axis along which they do not vary."""
    compacted = compact(positions)
    if compacted.numel() < _FEW:
        return positions
    for axis, size in enumerate(compacted.shape):
        first, last = compacted.narrow(axis, 0, 1), compacted.narrow(axis, -1, 1)
        if size > 1 and torch.equal(first, last) and bool((compacted == first).all()):
            compacted = first
    return positions if compacted.shape == compact(positions).shape else compacted.clone().expand(positions.shape)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of positions have the same shape and elements."""
    return a is b or (a.shape == b.shape and bool((compact(a) == compact(b)).all()))


def same_places(a: Tensor, b: Tensor) -> bool:
    """Whether positions that can be broadcast to each other have the same places, though perhaps in other images."""
    return bool((place_in_image(compact(a)) == place_in_image(compact(b))).all())


def join(tensors: list[Tensor], axis: int) -> Tensor:
    """Concatenate positions as `torch.cat` concatenates the tensors that they belong to."""
    first = tensors[0]
    if any(p.dim() != first.dim() for p in tensors):  # `torch.cat` skips empty vectors
        return torch.cat(tensors, axis)
    axis %= first.dim()
    shape = list(first.shape)
    shape[axis] = sum(p.shape[axis] for p in tensors)
    if all(p.shape[axis] == 1 or (p.shape[axis] > 1 and p.stride(axis) == 0) for p in tensors):
        slices = [p.narrow(axis, 0, 1) for p in tensors]
        if all(equal(p, slices[0]) for p in slices):
            return slices[0].expand(shape)
    for d, size in enumerate(first.shape):
        if d != axis and size > 1 and all(p.stride(d) == 0 for p in tensors):
            tensors = [p.narrow(d, 0, 1) for p in tensors]
    return torch.cat(tensors, axis).expand(shape)


def mix(positions: Tensor, axis: int) -> Tensor:
    """The positions of mixtures of all elements along an axis, which has size 1 afterwards.

    A mixture of elements of one image gets the smallest row and the smallest column of them: the corner of a patch. If
    all mixtures have the same place in their images, as after global pooling, they are LOST.
    """
    if positions.shape[axis] == 0:
        return positions.new_full(
            [1 if a == axis % positions.dim() else n for a, n in enumerate(positions.shape)], LOST
        )
    if positions.shape[axis] == 1 or positions.stride(axis) == 0:
        return positions.narrow(axis, 0, 1)
    shape = list(positions.shape)
    shape[axis] = 1
    positions = compact(positions)
    first = positions.narrow(axis, 0, 1)
    if bool((positions == first).all()):
        return first.expand(shape)
    positions = _without_repetitions(positions, axis)
    known = positions >= 0
    far = 2**62

    def smallest(values: Tensor) -> Tensor:
        return torch.where(known, values, far).amin(axis, keepdim=True)

    image = smallest(image_of(positions))
    same_image = torch.where(known, image_of(positions), image).eq(image).all(axis, keepdim=True)
    corner = (image << 2 * _BITS) + (smallest(row_of(positions)) << _BITS) + smallest(column_of(positions))
    is_lost = (positions == LOST).any(axis, keepdim=True)
    result = torch.where(known.any(axis, keepdim=True), corner, NOWHERE)
    result = torch.where(is_lost | ~same_image & known.any(axis, keepdim=True), LOST, result)
    known_places = result[result >= 0].unique()
    if len(known_places) and len(known_places) == len(image_of(known_places).unique()):  # one place for each image
        result = torch.where(result >= 0, LOST, result)
    return result.expand(shape)


def mix_channels(positions: Tensor | None, size: int, axis: int = -1) -> Tensor | None:
    """The positions of a result in which each of `size` output channels is a mixture of all input channels."""
    if positions is None:
        return None
    shape = list(positions.shape)
    shape[axis] = size
    return mix(positions, axis).expand(shape)


def _without_repetitions(positions: Tensor, axis: int) -> Tensor:
    """The positions without those that equal the ones before them along an axis."""
    size, axis = positions.shape[axis], axis % positions.dim()
    differ = positions.narrow(axis, 1, size - 1) != positions.narrow(axis, 0, size - 1)
    others = [d for d in range(positions.dim()) if d != axis]
    begins = differ.any(others) if others else differ
    indices = torch.cat((begins.new_ones(1), begins)).nonzero().flatten()
    return positions if len(indices) == size else positions.index_select(axis, indices)


def merge(operands: list[Tensor], shape: torch.Size) -> Tensor:
    """The positions of an element-wise function of several operands with known positions, in the shape of its result.

    Operands that are broadcast are ignored if there is one that is not, since they say nothing about the axes along
    which they are broadcast. If only one operand has a position, the result has that one. If two have different
    positions, the operand with more distinct positions wins. If both have equally many (tokens of different images, or
    resized feature maps of different resolutions), the first one wins, provided that the elements are at the same or at
    neighbouring places of their images or in the same order; otherwise the position is LOST.
    """
    whole = [p for p in operands if _covers(p, shape)]
    if not whole:
        expanded = [p.expand(shape) for p in operands]
        return (
            expanded[0] if all(equal(p, expanded[0]) for p in expanded) else expanded[0].new_tensor(LOST).expand(shape)
        )
    result = whole[0].expand(shape)
    for other in whole[1:]:
        result = _merge_pair(result, other.expand(shape))
    return result


def _covers(positions: Tensor, shape: torch.Size) -> bool:
    sizes = [1] * (len(shape) - positions.dim()) + list(positions.shape)
    return all(size == full for size, full in zip(sizes, shape, strict=True))


def _merge_pair(a: Tensor, b: Tensor) -> Tensor:
    shape = a.shape
    a, b = compact(a), compact(b)
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape:
        return a.expand(shape)
    differ = (a != b) & (a >= 0) & (b >= 0)
    either = torch.where(a < 0, torch.where(b < 0, torch.minimum(a, b), b), a)
    if bool(differ.any()):
        a_places, b_places = len(a.unique()), len(b.unique())
        if a_places != b_places:
            return (a if a_places > b_places else b).expand(shape)
        far = differ & (_distance(a, b) > _step(a))
        if bool(far.any()) and not _in_same_order(a, b):
            either = torch.where(far, LOST, either)
    return either.expand(shape)


def _in_same_order(a: Tensor, b: Tensor) -> bool:
    a, b = (p.flatten().argsort(stable=True) for p in torch.broadcast_tensors(a, b))
    return torch.equal(a, b)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum((row_of(a) - row_of(b)).abs(), (column_of(a) - column_of(b)).abs())


def _step(positions: Tensor) -> int:
    """The smallest distance between two rows, or two columns, that occur."""
    return min(
        (step for coordinate in (row_of, column_of) if (step := smallest_step(positions, coordinate))), default=0
    )


def smallest_step(positions: Tensor, coordinate: Callable[[Tensor], Tensor]) -> int:
    """The smallest distance between two rows that occur, or two columns; 0 if there is only one."""
    values = coordinate(positions[positions >= 0]).unique()
    return int(values.diff().min()) if len(values) > 1 else 0
