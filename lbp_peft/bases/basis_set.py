"""Which bases span the small space, for any patch grid.

A grid is cut into blocks of `block_size` along each axis. Everything here is separable: one matrix for the rows of the
grid, one for its columns, and the list of (row function, column function) pairs that are kept. That holds at the
border too. Gram-Schmidt in sequency order only mixes a function with those of lower sequency, and every selection we
offer keeps (a, b) before (i, j) when a <= i and b <= j; so orthonormalising along each axis and taking products spans
the same space as orthonormalising the cropped two-dimensional bases themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .walsh import basis_order, walsh_functions

BOUNDARIES = ("orthogonal", "reflect")


class LayoutError(ValueError):
    """Low-rank backpropagation cannot be had for some tokens.

    Attributes:
        why: The reason.
        remedy: What the user can do about it.
    """

    def __init__(self, why: str, remedy: str):
        super().__init__(f"{why}. {remedy}")
        self.why, self.remedy = why, remedy


@dataclass(frozen=True)
class BasisSet:
    """Which Walsh bases to keep; says nothing yet about a grid.

    Attributes:
        r: Bases kept in each block, 1 to block_size**2. A block with fewer tokens keeps at most its tokens.
        block_size: Order of the transform along each side, a power of two.
        selection: Which r come first, see [`basis_order`].
        boundary: What happens on a grid that is no multiple of block_size. "orthogonal": the cropped functions are
            orthonormalised, a true projection, exact at full rank. "reflect": the grid is padded by reflection and
            what is lifted is cropped, as the paper's reference code does; no projection.
    """

    r: int
    block_size: int = 8
    selection: str = "lp_l1"
    boundary: str = "orthogonal"


class TokenOrder(tuple):
    """Of each token in turn, the place that it has when the tokens of its grid are put row by row.

    A tuple of ints that is hashed only once, since layouts are looked up in every step.
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
        grid: (H, W) of the patch grid; its tokens come row by row. (1, L): a sequence of L tokens, as of words.
        num_prefix_tokens: Tokens before the grid's ([CLS], distillation, registers). They pass through exactly.
        num_suffix_tokens: Tokens after the grid's (YOLOS's detection tokens). They pass through exactly too.
        order: Not row by row but in this order, as Hiera's (arXiv 2306.00989), which has the patches at equal places
            of its units together.
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
        """Of one image."""
        return self.num_outside + self.grid[0] * self.grid[1]


def bases_along(grid: tuple[int, int], bases: BasisSet) -> BasisSet:
    """The bases for a grid. Along a single row, blocks are as many tokens long as square ones have tokens."""
    return replace(bases, block_size=bases.block_size**2) if 1 in grid else bases


@dataclass(frozen=True)
class AxisBlock:
    """One block along one axis, and the functions on it.

    `sequencies` (functions,) is what they had before cropping. `analysis` (functions, side) reads the block's
    coefficients off a whole side, `synthesis` (functions, side) puts them back. Rows have squared norm `block_size`,
    so that uncropped functions stay exactly +-1 in every precision.
    """

    sequencies: tuple[int, ...]
    analysis: np.ndarray
    synthesis: np.ndarray


@dataclass(frozen=True)
class GridBases:
    """The bases on one grid in separable form, float64.

    Row functions a and column functions b make coefficients  sum_hw row_analysis[a, h] column_analysis[b, w] z[h, w]
    of a grid z (H, W). Those kept are, in order, the ones at the flat positions `kept` of the (a, b) table.
    """

    row_analysis: np.ndarray
    row_synthesis: np.ndarray
    column_analysis: np.ndarray
    column_synthesis: np.ndarray
    kept: np.ndarray

    def dense_analysis(self) -> np.ndarray:
        """Shape (kept, H * W)."""
        return np.kron(self.row_analysis, self.column_analysis)[self.kept]

    def dense_synthesis(self) -> np.ndarray:
        """Shape (kept, H * W); equal to the analysis for boundary="orthogonal"."""
        return np.kron(self.row_synthesis, self.column_synthesis)[self.kept]


def _orthogonalised(functions: np.ndarray, squared_norm: float) -> tuple[list[int], np.ndarray]:
    """Gram-Schmidt over the rows in their order. Which rows are independent of those before them, and the result."""
    independent: list[int] = []
    kept: list[np.ndarray] = []
    for index, function in enumerate(functions):
        residual = function.copy()
        for _ in range(2):  # once more for the round-off of the first pass
            for other in kept:
                residual -= other * (other @ residual) / (other @ other)
        if residual @ residual > 1e-9 * (function @ function):
            independent.append(index)
            kept.append(residual)
    return independent, np.stack([row * np.sqrt(squared_norm / (row @ row)) for row in kept])


def _cropped_functions(length: int, offset: int, block_size: int) -> tuple[list[int], np.ndarray]:
    """Sequencies and values of the functions on a block of which the border leaves `length` tokens from `offset` on.

    Half a block or less is served by a smaller order, whose functions are all independent.
    """
    order = block_size
    while order // 2 >= length:
        order //= 2
    if order < block_size:
        offset = (order - length + 1) // 2
    functions = walsh_functions(order)[:, offset : offset + length]
    if length == order:
        return list(range(order)), functions * np.sqrt(block_size / order)
    return _orthogonalised(functions, squared_norm=block_size)


def check_side(side: int, block_size: int, boundary: str) -> None:
    """Raise LayoutError where boundary="reflect" cannot be had: a reflection reaches over less than a whole side."""
    before = (-side % block_size + 1) // 2
    if boundary == "reflect" and before >= side:
        raise LayoutError(
            f"a side of {side} patches is too short to be padded by {before} by reflection",
            f'Use boundary="orthogonal", or a block_size smaller than {block_size}.',
        )


@lru_cache(maxsize=1024)
def axis_blocks(side: int, block_size: int, boundary: str) -> tuple[AxisBlock, ...]:
    """Cut one side of the grid into blocks.

    The side is padded to a multiple of block_size, ceil(pad / 2) tokens before its start, as the reference code cuts:
    14 = 7 + 7, 12 = 6 + 6, 9 = 4 + 5.

    Raises:
        LayoutError: boundary="reflect" on a side too short to be reflected.
    """
    check_side(side, block_size, boundary)
    padding = -side % block_size
    before = (padding + 1) // 2
    # Position p of the padded side shows token reflected[p] of the true one.
    positions = np.arange(side + padding) - before
    reflected = np.abs(positions)
    reflected = np.where(reflected >= side, 2 * (side - 1) - reflected, reflected)

    blocks = []
    for first in range(0, side + padding, block_size):
        start, stop = max(first - before, 0), min(first + block_size - before, side)
        if boundary == "reflect":
            functions = walsh_functions(block_size)
            analysis = np.zeros((block_size, side))
            for column, token in enumerate(reflected[first : first + block_size]):
                analysis[:, token] += functions[:, column]
            sequencies = list(range(block_size))
            functions = functions[:, start - first + before : stop - first + before]
        else:
            sequencies, functions = _cropped_functions(stop - start, start - first + before, block_size)
        synthesis = np.zeros((len(functions), side))
        synthesis[:, start:stop] = functions
        blocks.append(AxisBlock(tuple(sequencies), analysis if boundary == "reflect" else synthesis, synthesis))
    return tuple(blocks)


@lru_cache(maxsize=4096)
def num_bases(grid: tuple[int, int], bases: BasisSet) -> int:
    """How many bases [`grid_bases`] keeps on a grid: the sum over blocks of min(r, tokens of the block)."""
    bases = bases_along(grid, bases)
    rows, columns = (axis_blocks(side, bases.block_size, bases.boundary) for side in grid)
    return sum(min(bases.r, len(row.sequencies) * len(column.sequencies)) for row in rows for column in columns)


@lru_cache(maxsize=256)
def grid_bases(grid: tuple[int, int], bases: BasisSet) -> GridBases:
    """The kept bases on a grid, block by block, each block's in the order of its selection.

    Args:
        grid: (H, W) in patches.
        bases: What to keep.

    Raises:
        ValueError: unknown selection.
        LayoutError: a side too short for boundary="reflect".
    """
    bases = bases_along(grid, bases)
    rows, columns = (axis_blocks(side, bases.block_size, bases.boundary) for side in grid)
    row_starts = np.cumsum([0] + [len(block.sequencies) for block in rows])
    column_starts = np.cumsum([0] + [len(block.sequencies) for block in columns])
    pairs = [
        (row_starts[a] + i, column_starts[b] + j)
        for a, row in enumerate(rows)
        for b, column in enumerate(columns)
        for i, j in basis_order(bases.selection, row.sequencies, column.sequencies)[: bases.r]
    ]
    # Functions that no kept pair uses would only cost time.
    used_rows, row_index = np.unique([i for i, _ in pairs], return_inverse=True)
    used_columns, column_index = np.unique([j for _, j in pairs], return_inverse=True)

    def stacked(blocks: tuple[AxisBlock, ...], field: str, used: np.ndarray) -> np.ndarray:
        return np.concatenate([getattr(block, field) for block in blocks])[used]

    scale = 1.0 / bases.block_size  # both axes carry squared norm block_size: together one, as orthonormal bases have
    return GridBases(
        row_analysis=scale * stacked(rows, "analysis", used_rows),
        row_synthesis=scale * stacked(rows, "synthesis", used_rows),
        column_analysis=stacked(columns, "analysis", used_columns),
        column_synthesis=stacked(columns, "synthesis", used_columns),
        kept=row_index * len(used_columns) + column_index,
    )
