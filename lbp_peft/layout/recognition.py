"""Derives the layout of a layer's input from its positions: the axes of the tokens, their grid and their order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..bases.grids import TokenLayout
from ..bases.packed import PackedLayout
from ..bounded import BoundedCache
from .grid_reading import Grid, GridSequence, NoTokensError, SingleTokenError, UnknownLayoutError, read_rows


@dataclass(frozen=True)
class RecognisedLayout:
    """The layout of a layer's input, and where its tokens come from.

    Attributes:
        layout: The layout of each item of the batch.
        source: The number of the model's input that the tokens come from.
    """

    layout: TokenLayout
    source: int


def read_layout(positions: Tensor) -> RecognisedLayout:
    """The layout of tokens.

    Args:
        positions: The positions of all tokens of a layer's input, in its shape without channels. Some axes run over
            tokens, the others over images, windows or heads.

    Raises:
        UnknownLayoutError: the tokens do not form one grid.
    """
    key = (positions.shape, positions.cpu().numpy().tobytes())  # shared by most layers of a model
    result = _results.get(key)
    if result is None:
        try:
            result = _read_layout(positions)
        except UnknownLayoutError as error:
            result = _Failure.of(error)
        _results[key] = result
    if isinstance(result, _Failure):
        raise result.error()
    return result


@dataclass(frozen=True)
class _Failure:
    """An error without its traceback, which would keep the frames of the whole pass and their tensors alive."""

    kind: type[UnknownLayoutError]
    message: str

    @classmethod
    def of(cls, error: UnknownLayoutError) -> _Failure:
        return cls(type(error), str(error))

    def error(self) -> UnknownLayoutError:
        return self.kind(self.message)


def _is_specific(failure: _Failure) -> bool:
    return not issubclass(failure.kind, (NoTokensError, SingleTokenError))


_results: BoundedCache[tuple, RecognisedLayout | _Failure] = BoundedCache(16)


def _read_layout(positions: Tensor) -> RecognisedLayout:
    if not bool((positions >= 0).any()):
        raise NoTokensError("none of its tokens is at a place of the input")
    long_axes = [axis for axis, size in enumerate(positions.shape) if size > 1]
    if not long_axes:
        raise SingleTokenError("its input has a single token")
    candidates, failures = [], []
    for count in range(1, len(long_axes) + 1):
        for token_axes in itertools.combinations(long_axes, count):
            others = [axis for axis in range(positions.dim()) if axis not in token_axes]
            moved = positions.permute(*others, *token_axes)
            rows = moved.reshape(-1, math.prod(positions.shape[axis] for axis in token_axes))
            try:
                grid = read_rows(rows.cpu().numpy())
            except UnknownLayoutError as error:
                failures.append(_Failure.of(error))
                continue
            candidates.append((grid, token_axes))
    if not candidates:
        raise max(failures, key=_is_specific).error()
    usual = tuple(range(1, positions.dim()))

    def preference(item: tuple[Grid | GridSequence, tuple[int, ...]]) -> tuple:
        """Prefer a single grid, row-by-row order, unpacked images, the usual axes, and neighbours in the image."""
        grid, token_axes = item
        is_unusual = token_axes != usual
        if isinstance(grid, GridSequence):
            return True, any(part.order is not None for part in grid.parts), True, is_unusual, 0, -grid.num_tokens
        return False, grid.order is not None, grid.packed > 1, is_unusual, grid.spacing, -grid.num_tokens

    grid, token_axes = min(candidates, key=preference)
    axes = None if token_axes == usual else token_axes
    if isinstance(grid, GridSequence):
        return RecognisedLayout(PackedLayout.of(tuple(part.layout() for part in grid.parts), axes), grid.source)
    return RecognisedLayout(replace(grid.layout(), axes=axes, packed=grid.packed), grid.source)
