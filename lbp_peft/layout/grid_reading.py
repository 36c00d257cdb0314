"""Finds the grid that tokens lie on, from their positions in rows of the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..bases.grids import TokenLayout, TokenOrder
from .positions import LOST, NOWHERE


class UnknownLayoutError(ValueError):
    """The positions of the tokens do not form one grid. The text of the error is the reason.

    Attributes:
        remedy: What the user can do about it.
    """

    remedy = "Set grid_size (and num_prefix_tokens) if they lie on a grid."


class SeveralImagesError(UnknownLayoutError):
    """Images whose tokens come one after another do not all have the same grid."""

    remedy = "Give the model images of one size at a time to have them low-rank."


class NoTokensError(UnknownLayoutError):
    """None of the tokens comes from a place of the input."""


class SingleTokenError(UnknownLayoutError):
    """There is one token of each image, so that a low-rank backward pass gains nothing."""


@dataclass(frozen=True)
class Grid:
    """A grid that the tokens of each row lie on.

    Attributes:
        shape: (H, W).
        before, after: The numbers of tokens before and after the grid.
        order: The order of the tokens on the grid; None: row by row.
        spacing: The smallest distance between successive tokens, in quarters of a pixel.
        source: The number of the input that the tokens come from.
        packed: The number of such grids that come one after another.
    """

    shape: tuple[int, int]
    before: int
    after: int
    order: TokenOrder | None
    spacing: int
    source: int
    packed: int = 1

    @property
    def num_tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    def layout(self) -> TokenLayout:
        return TokenLayout(self.shape, self.before, self.after, self.order)


@dataclass(frozen=True)
class GridSequence:
    """Several grids, one after another."""

    parts: tuple[Grid, ...]
    source: int

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)


def read_rows(rows: np.ndarray) -> Grid | GridSequence:
    """The grid, or the grids one after another, that the tokens of each row (rows, tokens) lie on."""
    try:
        return _read_grid(rows)
    except (NoTokensError, SingleTokenError):
        raise
    except UnknownLayoutError:
        grids = _read_several(rows)
        if grids is None:
            raise
        return grids


def _read_several(rows: np.ndarray) -> Grid | GridSequence | None:
    """The grids that come one after another: of several images, windows with tokens of their own, or several scales."""
    if (rows == LOST).any():
        return None
    rows, source = _keep_one_source(np.unique(rows, axis=0))
    image = np.where(rows < 0, -1, rows >> 40)
    parts: list[Grid] = []
    for piece in _split(rows, (image[:, 1:] != image[:, :-1]) & ((image[:, 1:] < 0) | (image[:, :-1] >= 0))):
        if (piece < 0).all() and parts:  # at the end
            parts[-1] = replace(parts[-1], after=parts[-1].after + piece.shape[1])
            continue
        row = piece >> 20 & 2**20 - 1
        known = piece >= 0
        of_scales = _split(piece, (row[:, 1:] < row[:, :-1]) & known[:, 1:] & known[:, :-1])
        grids = _read_all([piece]) or _read_all(of_scales)
        if not grids:
            return None
        parts += grids
    if len(parts) < 2:
        return None
    return replace(parts[0], packed=len(parts)) if len(set(parts)) == 1 else GridSequence(tuple(parts), source)


def _split(rows: np.ndarray, begins: np.ndarray) -> list[np.ndarray]:
    """Split rows (rows, tokens) after each token that a new piece follows in all rows."""
    return np.split(rows, np.flatnonzero(begins.all(axis=0)) + 1, axis=1)


def _read_all(pieces: list[np.ndarray]) -> list[Grid]:
    """The grid of each piece; an empty list if a piece does not lie on a single grid."""
    grids = []
    for piece in pieces:
        try:
            grid = _read_grid(piece)
        except UnknownLayoutError:
            return []
        if grid.packed > 1:
            return []
        grids.append(replace(grid, spacing=0))
    return grids


def _read_grid(rows: np.ndarray) -> Grid:
    """The grid that the tokens of each row (rows, tokens) lie on, which is the same for all rows."""
    if (count := _num_packed(rows)) > 1:
        return replace(_read_grid(rows.reshape(len(rows) * count, -1)), packed=count)
    rows, source = _keep_one_source(np.unique(rows, axis=0))
    known = rows >= 0
    if not known.any(axis=1).all():
        raise UnknownLayoutError("some of its images have no tokens from a place of the input")
    columns = np.flatnonzero(known.any(axis=0))
    before, after = int(columns[0]), int(rows.shape[1] - 1 - columns[-1])
    inner = rows[:, before : rows.shape[1] - after]
    why = "its tokens do not form a grid"
    parts = [(inner, (before, after)), (rows, (0, 0))]  # windows may reach over the border
    if (inner == NOWHERE).any():
        parts.reverse()
    for part, ends in parts:
        if part.shape[1] < 2:
            raise SingleTokenError("its input has a single token")
        _check_same_image(part)
        if (part == LOST).any():
            why = "it is not known where some of its tokens lie"
            continue
        if (shape := _grid_of(part)) is not None:
            return Grid(shape, *ends, None, _spacing(part), source)
        if (part >= 0).all() and (order := _common_order(part)) is not None:
            ordered = part[:, np.argsort(order)]
            if (shape := _grid_of(ordered)) is not None:
                return Grid(shape, *ends, TokenOrder(order.tolist()), _spacing(ordered), source)
            if (np.diff(ordered & 2**40 - 1, axis=1) == 0).any():
                why = "several of its tokens lie at the same place"
        elif (shape := _grid_of(part, rotated=True)) is not None:  # windows that were shifted over the border
            return Grid(shape, *ends, None, _spacing(part), source)
        else:
            why = "its tokens do not lie in the same order in all images"
    raise UnknownLayoutError(why)


def _num_packed(rows: np.ndarray) -> int:
    """The number of images, all with the same number of tokens, that come one after another in each row."""
    if (rows < 0).any():
        return 1
    images = rows >> 40
    changes = np.diff(images, axis=1) != 0
    count = int(changes[0].sum()) + 1
    if count == 1 or rows.shape[1] % count:
        return 1
    length = rows.shape[1] // count
    if length == 1:
        raise SingleTokenError("its input has a single token of each image")
    expected = np.arange(1, rows.shape[1]) % length == 0
    return count if (changes == expected).all() else 1


def _keep_one_source(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Keep the tokens of one input, images before texts, and treat those of other inputs as NOWHERE."""
    sources = rows[rows >= 0] >> 58
    if len(sources) == 0:
        raise NoTokensError("none of its tokens is at a place of the input")
    values = np.unique(sources)
    if len(values) == 1:
        return rows, int(values[0])
    # The first source is that of an image if there is one, since texts have larger numbers: see `inputs.py`.
    return np.where((rows >= 0) & (rows >> 58 != values[0]), -1, rows), int(values[0])


def _check_same_image(rows: np.ndarray) -> None:
    known = rows >= 0
    image = np.where(known, rows >> 40, -1).max(axis=1, keepdims=True)
    if (known & (rows >> 40 != image)).any():
        raise SeveralImagesError("tokens of several images or frames, not all of one grid, lie in one row")


def _grid_of(rows: np.ndarray, rotated: bool = False) -> tuple[int, int] | None:
    """(H, W) if in each row the tokens lie row by row on a grid of this shape; its rows may be the image's columns."""
    count, known = rows.shape[1], rows >= 0
    for row_axis, column_axis in ((2, 1), (1, 2)):
        fitting = []
        for height in (h for h in range(1, count + 1) if count % h == 0):
            shape = (len(rows), height, count // height)
            down, across = ((rows >> bits & 2**20 - 1).reshape(shape) for bits in (20, 0))
            k = known.reshape(shape)
            if _is_axis(down, k, row_axis, rotated) and _is_axis(across, k, column_axis, rotated):
                fitting.append(shape[1:])
        if len(fitting) > 1:  # where many places are unknown
            fitting = [shape for shape in fitting if shape[0] == shape[1]]
        if fitting:
            return fitting[0]
    return None


def _is_axis(value: np.ndarray, known: np.ndarray, constant_axis: int, rotated: bool) -> bool:
    """Whether values (rows, H, W) are the same along one axis and differ, in one direction, along the other.

    Rotated: there may be a step back from the last place to the first.
    """
    low = np.where(known, value, 2**20).min(axis=constant_axis)
    high = np.where(known, value, -1).max(axis=constant_axis)
    if (high > low).any():
        return False
    if high.shape[1] == 1:
        return True
    if not (high >= 0).all():
        return bool((high >= 0).any()) and all(_is_in_one_direction(line[line >= 0][None], rotated) for line in high)
    return _is_in_one_direction(high, rotated)


def _is_in_one_direction(lines: np.ndarray, rotated: bool) -> bool:
    """Whether each of several lines (lines, length) rises, or each falls, from place to place."""
    steps = np.diff(lines, axis=1)
    up, down = (steps > 0).sum(axis=1), (steps < 0).sum(axis=1)
    strictly = (up == steps.shape[1]) | (down == steps.shape[1])
    if not rotated:
        return bool(strictly.all())
    back = lines[:, 0] - lines[:, -1] if lines.shape[1] else np.zeros(len(lines))
    rises = (up == steps.shape[1] - 1) & (down == 1) & (back > 0)
    falls = (down == steps.shape[1] - 1) & (up == 1) & (back < 0)
    return bool((strictly | rises | falls).all())


def _common_order(rows: np.ndarray) -> np.ndarray | None:
    """The index of each token in row-by-row order; None if it differs between rows."""
    places = rows & 2**40 - 1
    sorted_by = np.argsort(places, axis=1, kind="stable")
    if (sorted_by != sorted_by[0]).any():
        return None
    return np.argsort(sorted_by[0])


def _spacing(rows: np.ndarray) -> int:
    """The smallest distance between successive tokens along either axis of the image."""
    both = (rows[:, 1:] >= 0) & (rows[:, :-1] >= 0)
    smallest = []
    for bits in (20, 0):
        values = rows >> bits & 2**20 - 1
        steps = np.abs(np.diff(values, axis=1))[both]
        steps = steps[steps > 0]
        if len(steps):
            smallest.append(int(steps.min()))
    return min(smallest, default=0)
