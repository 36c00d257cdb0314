"""Layouts: the places of the tokens of a layer's input on the patch grid."""

from __future__ import annotations

from dataclasses import dataclass


class LayoutError(ValueError):
    """Low-rank backpropagation is not possible for a layer's input.

    Attributes:
        why: The reason.
        remedy: What the user can do about it.
    """

    def __init__(self, why: str, remedy: str):
        super().__init__(f"{why}. {remedy}")
        self.why, self.remedy = why, remedy


class TokenOrder(tuple):
    """The index of each token when the tokens of the grid are sorted row by row.

    It is a tuple of ints whose hash is computed only once, since layouts are looked up in every step.
    """

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash


@dataclass(frozen=True)
class TokenLayout:
    """The places of the tokens of a layer's input.

    Attributes:
        grid: (H, W) of the patch grid, whose tokens come row by row. (1, L): a sequence of L tokens, such as words.
        num_prefix_tokens: The number of tokens before the grid's ([CLS], distillation, registers), which pass through
            exactly.
        num_suffix_tokens: The number of tokens after the grid's (YOLOS's detection tokens), likewise.
        order: The order of the grid's tokens if it is not row by row. Hiera (arXiv 2306.00989), for example, has the
            patches at the same place of its units next to each other.
        axes: The axes of the input (..., C) that run over tokens, the last one fastest; the other axes count as images.
            None: all axes but the first.
        packed: The number of images, each with one grid, that are concatenated along these axes.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    order: TokenOrder | None = None
    axes: tuple[int, ...] | None = None
    packed: int = 1

    @property
    def num_outside(self) -> int:
        """The number of tokens before and after the grid."""
        return self.num_prefix_tokens + self.num_suffix_tokens

    @property
    def num_tokens(self) -> int:
        """L, the number of tokens of one image."""
        return self.num_outside + self.grid[0] * self.grid[1]
