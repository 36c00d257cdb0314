"""Layouts of several grids: images of several sizes whose tokens are concatenated in one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from .grids import TokenLayout


@dataclass(frozen=True)
class PackedLayout(TokenLayout):
    """The layout of the concatenated tokens of several grids, such as images of several sizes.

    Each grid has bases of its own, so that the bases of all tokens are block-diagonal.

    Attributes:
        parts: The layout of each grid, with the tokens before and after it.
        grid: Unused: (0, 0).
        axes: As in [`TokenLayout`].
    """

    parts: tuple[TokenLayout, ...] = ()

    @staticmethod
    def of(parts: tuple[TokenLayout, ...], axes: tuple[int, ...] | None = None) -> PackedLayout:
        """The layout of concatenated grids."""
        return PackedLayout((0, 0), axes=axes, parts=parts)

    @property
    def num_outside(self) -> int:
        """The number of tokens before and after the grids."""
        return sum(part.num_outside for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all grids."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of each grid."""
        return tuple(part.grid for part in self.parts)
