"""Layouts that the configuration gives."""

from __future__ import annotations

from ..bases.grids import TokenLayout
from .records import LayoutRecord


class GridMismatchError(ValueError):
    """A `grid_size` or `num_prefix_tokens` from the configuration does not fit the number of tokens."""


def given_layout(
    num_tokens: int, record: LayoutRecord, grid_size: tuple[int, int], before: int | None, after: int | None
) -> TokenLayout:
    """The layout for a grid given in the configuration.

    Raises:
        GridMismatchError: the grid does not fit the number of tokens.
    """
    rest = num_tokens - grid_size[0] * grid_size[1]
    if before is None and after is None:
        traced = record.layout
        if rest == 0:
            before = after = 0
        elif traced is not None and traced.num_outside == rest:
            before, after = traced.num_prefix_tokens, traced.num_suffix_tokens
    else:
        before, after = before or 0, after or 0
    if before is None or after is None or before + after != rest:
        settings = [f"grid_size={grid_size}"]
        settings += [f"num_prefix_tokens={before}"] if before else []
        settings += [f"num_suffix_tokens={after}"] if after else []
        total = num_tokens - rest + (before or 0) + (after or 0)
        hint = (
            f"If {rest} of them come before the grid, set num_prefix_tokens to that; else "
            if before is None and rest > 0
            else ""
        )
        raise GridMismatchError(
            f"{' and '.join(settings)} makes {total} tokens, but {num_tokens} arrived. {hint}"
            "correct grid_size, or leave it out to have the grid found from the model and the image."
        )
    return TokenLayout(grid_size, before, after)
