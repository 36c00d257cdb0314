"""A Walsh basis whose functions are listed one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .grids import LayoutError
from .separable import WalshBasis


@dataclass(frozen=True)
class ListedBasis(WalshBasis):
    """The Walsh functions (i, j) of a list, the same in every block of `block_size` x `block_size` patches.

    Pair (i, j) is the product of the i-th function down the rows and the j-th along the columns. In blocks that the
    border crops, functions that become linearly dependent are left out, and so are the pairs with them. On a sequence,
    that is, on a grid of 1 x L, blocks are `block_size**2` tokens long, and only pairs (0, j) exist.

    Attributes:
        pairs: The pairs, each once, from 0 to block_size - 1 (j to block_size**2 - 1 for sequences).
        block_size: Order of the transform along each side, a power of two.
        boundary: See [`BasisSet`].

    Raises:
        ValueError: the list is empty, or a pair is out of range or occurs twice.
    """

    pairs: tuple[tuple[int, int], ...]
    block_size: int = 8
    boundary: str = "orthogonal"

    def __post_init__(self) -> None:
        pairs = tuple((int(i), int(j)) for i, j in self.pairs)
        object.__setattr__(self, "pairs", pairs)
        if not pairs:
            raise ValueError("A listed basis needs at least one pair (i, j) of Walsh functions.")
        for pair in pairs:
            largest = self.block_size if pair[0] else self.block_size**2
            if not (0 <= pair[0] < self.block_size and 0 <= pair[1] < largest):
                raise ValueError(f"There is no pair {pair} of Walsh functions for block_size={self.block_size}.")
        if len(set(pairs)) < len(pairs):
            (twice, _), *_ = Counter(pairs).most_common(1)
            raise ValueError(f"The pair {twice} of Walsh functions is listed twice.")

    def select(self, rows: Sequence[int], columns: Sequence[int]) -> list[tuple[int, int]]:
        row_at, column_at = ({sequency: at for at, sequency in enumerate(axis)} for axis in (rows, columns))
        found = [(row_at[i], column_at[j]) for i, j in self.pairs if i in row_at and j in column_at]
        if not found:
            raise LayoutError(
                f"none of the listed Walsh functions exists on a block of {len(rows)} x {len(columns)} tokens",
                "List (0, 0) too, which exists on every block.",
            )
        return found

    def num_selected(self, rows: Sequence[int], columns: Sequence[int]) -> int:
        return len(self.select(rows, columns))

    def _settings(self) -> tuple:
        return self.pairs, self.block_size, self.boundary

    @property
    def keeps_constant(self) -> bool:
        return (0, 0) in self.pairs
