"""The Walsh basis of the paper: the first r functions of a selection in each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .grids import LayoutError, TokenLayout
from .separable import WalshBasis
from .walsh import basis_order

__all__ = ["BasisSet", "LayoutError", "TokenLayout"]


@dataclass(frozen=True)
class BasisSet(WalshBasis):
    """The first r Walsh functions of a selection, the same in every block of `block_size` x `block_size` patches.

    Attributes:
        r: The number of functions in each block, 1 to block_size**2. A block with fewer tokens has at most as many.
        block_size: Order of the transform along each side, a power of two.
        selection: The order of the functions, see [`basis_order`].
        boundary: The treatment of a grid that is not a multiple of block_size. "orthogonal": the cropped functions are
            orthonormalised, which gives a true projection, exact at full rank. "reflect": the grid is padded by
            reflection and the lifted result is cropped, as in the paper's reference code; this is not a projection.
    """

    r: int
    block_size: int = 8
    selection: str = "lp_l1"
    boundary: str = "orthogonal"

    def select(self, rows: Sequence[int], columns: Sequence[int]) -> list[tuple[int, int]]:
        return basis_order(self.selection, rows, columns)[: self.r]

    def num_selected(self, rows: Sequence[int], columns: Sequence[int]) -> int:
        return min(self.r, len(rows) * len(columns))

    def _settings(self) -> tuple:
        return self.r, self.block_size, self.selection, self.boundary

    @property
    def keeps_constant(self) -> bool:
        return True  # (0, 0) comes first in every selection, which [`basis_order`] checks
