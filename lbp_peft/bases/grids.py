"""Layouts: where the tokens of a layer's input lie on the patch grid."""

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
    """For each token in turn, its place when the tokens of its grid are arranged row by row.

    A tuple of ints whose hash is computed only once, since layouts are looked up in every step.
    """

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a layer's input lie.

    Attributes:
        grid: (H, W) of the patch grid, whose tokens come row by row. (1, L): a sequence of L tokens, such as words.
        num_prefix_tokens: Tokens before the grid's ([CLS], distillation, registers). They pass through exactly.
        num_suffix_tokens: Tokens after the grid's (YOLOS's detection tokens). They pass through exactly too.
        order: The order of the grid's tokens, if it is not row by row, such as Hiera's (arXiv 2306.00989), which puts
            the patches at equal places of its units together.
        axes: The axes of the input (..., C) along which the tokens lie, the last running fastest; the others count as
            images. None: all but the first.
        packed: Images, of one grid each, that come one after another along these axes.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    order: TokenOrder | None = None
    axes: tuple[int, ...] | None = None
    packed: int = 1

    @property
    def num_outside(self) -> int:
        """Tokens before and after the grid."""
        return self.num_prefix_tokens + self.num_suffix_tokens

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return self.num_outside + self.grid[0] * self.grid[1]
