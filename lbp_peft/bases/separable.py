"""Separable Walsh bases on any patch grid.

A grid is cut into blocks of `block_size` along each axis. Everything here is separable: one matrix for the rows of the
grid, one for its columns, and the list of (row function, column function) pairs that are kept. That holds at the
border too. Gram-Schmidt in sequency order mixes a function only with those of lower sequency. Every selection keeps
(a, b) before (i, j) if a <= i and b <= j, which [`basis_order`] checks. So products of functions that are
orthonormalised along each axis span the same space as the orthonormalised cropped two-dimensional functions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bounded import BoundedCache
from .base import Basis, without_transforms
from .grids import LayoutError, TokenLayout
from .walsh import walsh_functions

BOUNDARIES = ("orthogonal", "reflect")


class Factors(NamedTuple):
    """The matrices of a separable basis on the grid of a layout.

    Attributes:
        row_analysis, row_synthesis: Shape (row functions, H).
        column_analysis, column_synthesis: Shape (column functions, W).
        kept: Shape (k on the grid,), int64: flat positions in the table of (row function, column function) pairs.
    """

    row_analysis: Tensor
    row_synthesis: Tensor
    column_analysis: Tensor
    column_synthesis: Tensor
    kept: Tensor


class SeparableBasis(Basis):
    """A basis whose functions are products of one over the rows and one over the columns of the grid.

    Tokens outside the grid pass through exactly.
    """

    @abstractmethod
    def factors(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Factors:
        """The matrices along each axis."""

    @abstractmethod
    def equal_blocks(self, side: int, layout: TokenLayout) -> int:
        """The number of equal blocks of a side that the same matrix transforms; 1: the side is not divided."""

    @abstractmethod
    def outgrows_tokens(self, layout: TokenLayout) -> bool:
        """Whether there are more functions than tokens along an axis, so that intermediate results would be larger."""

    def keeps_outside(self, layout: TokenLayout) -> bool:
        return True


class WalshBasis(SeparableBasis):
    """Walsh functions on the blocks of a grid. A subclass selects the functions that are kept.

    A subclass is a frozen dataclass of plain values.

    Attributes:
        block_size: Order of the transform along each side, a power of two.
        boundary: "orthogonal" or "reflect", see [`lbp_peft.BasisSet`].
    """

    block_size: int
    boundary: str

    @abstractmethod
    def select(self, rows: Sequence[int], columns: Sequence[int]) -> list[tuple[int, int]]:
        """The functions that a block keeps, in order, as positions in `rows` and `columns`.

        Args:
            rows, columns: Sequencies of the functions that exist along the two sides of the block.
        """

    @abstractmethod
    def num_selected(self, rows: Sequence[int], columns: Sequence[int]) -> int:
        """The number of functions that a block keeps."""

    @property
    @abstractmethod
    def keeps_constant(self) -> bool:
        """Whether every block keeps the constant function (0, 0)."""

    @abstractmethod
    def _settings(self) -> tuple:
        """The arguments of its constructor as plain values, since torch.compile calls functions of constants only."""

    def size_along(self, grid: tuple[int, int]) -> int:
        """The length of a block along each side. A block of a single row has as many tokens as a square block."""
        return self.block_size**2 if 1 in grid else self.block_size

    def check(self, layout: TokenLayout) -> None:
        """Raise LayoutError if the basis does not exist for a layout."""
        for side in layout.grid:
            check_side(side, self.size_along(layout.grid), self.boundary)

    def num_coefficients(self, layout: TokenLayout) -> int:
        self.check(layout)
        on_grid = _num_bases(*layout.grid, type(self), *self._settings())
        return min(layout.num_outside + on_grid, layout.num_tokens)

    def preserves_sums(self, layout: TokenLayout) -> bool:
        return self.boundary == "orthogonal" and self.keeps_constant

    def factors(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Factors:
        types = (dtype, dtype, dtype, dtype, torch.int64)
        return Factors(*(_matrix(n, layout.grid, self, t, device) for n, t in zip(Factors._fields, types, strict=True)))

    def equal_blocks(self, side: int, layout: TokenLayout) -> int:
        # Block by block takes fewer multiply-adds, but more and smaller products. That is faster from three blocks on,
        # unless tokens outside the grid separate the grids of a batch in memory.
        blocks, rest = divmod(side, self.size_along(layout.grid))
        return blocks if rest == 0 and blocks >= 3 and layout.num_outside == 0 else 1

    def outgrows_tokens(self, layout: TokenLayout) -> bool:
        return _functions_outnumber_tokens(*layout.grid, type(self), *self._settings())

    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _whole_matrix("analysis", layout, self, dtype, device)

    def synthesis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _whole_matrix("synthesis", layout, self, dtype, device)


@dataclass(frozen=True)
class AxisBlock:
    """One block along one axis, and the functions on it.

    `sequencies` (functions,) are those before cropping. `analysis` (functions, side) computes the block's coefficients
    from a whole side, and `synthesis` (functions, side) lifts them. Rows have squared norm `block_size`, so that
    uncropped functions are exactly +-1 in every precision.
    """

    sequencies: tuple[int, ...]
    analysis: np.ndarray
    synthesis: np.ndarray


@dataclass(frozen=True)
class GridBases:
    """The bases on one grid in separable form, float64.

    The coefficient of a grid z (H, W) for row function a and column function b is
    sum_hw row_analysis[a, h] column_analysis[b, w] z[h, w]. The coefficients at the flat positions `kept` of the (a, b)
    table are kept, in that order.
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
    """Gram-Schmidt over the rows in their order: the indices of rows independent of earlier ones, and the result."""
    independent: list[int] = []
    kept: list[np.ndarray] = []
    for index, function in enumerate(functions):
        residual = function.copy()
        for _ in range(2):  # twice, because of the rounding errors of the first pass
            for other in kept:
                residual -= other * (other @ residual) / (other @ other)
        if residual @ residual > 1e-9 * (function @ function):
            independent.append(index)
            kept.append(residual)
    return independent, np.stack([row * np.sqrt(squared_norm / (row @ row)) for row in kept])


def _cropped_functions(length: int, offset: int, block_size: int) -> tuple[list[int], np.ndarray]:
    """Sequencies and values of the functions on a block that is cropped to `length` tokens from `offset` on.

    Half a block or less has functions of a smaller order, which are all independent.
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
    """Raise LayoutError if a side is too short for boundary="reflect", which reflects less than a whole side."""
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
    # Position p of the padded side has token reflected[p] of the true side.
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
def num_bases(grid: tuple[int, int], basis: WalshBasis) -> int:
    """The number of functions that [`grid_bases`] keeps on a grid."""
    size = basis.size_along(grid)
    rows, columns = (axis_blocks(side, size, basis.boundary) for side in grid)
    return sum(basis.num_selected(row.sequencies, column.sequencies) for row in rows for column in columns)


@lru_cache(maxsize=256)
def grid_bases(grid: tuple[int, int], basis: WalshBasis) -> GridBases:
    """The kept functions on a grid, block by block, each block's in the order of its selection.

    Args:
        grid: (H, W) in patches.
        basis: What to keep.

    Raises:
        ValueError: the selection is unknown, or its order is not monotone.
        LayoutError: the basis does not exist on this grid.
    """
    size = basis.size_along(grid)
    rows, columns = (axis_blocks(side, size, basis.boundary) for side in grid)
    row_starts = np.cumsum([0] + [len(block.sequencies) for block in rows])
    column_starts = np.cumsum([0] + [len(block.sequencies) for block in columns])
    pairs = [
        (row_starts[a] + i, column_starts[b] + j)
        for a, row in enumerate(rows)
        for b, column in enumerate(columns)
        for i, j in basis.select(row.sequencies, column.sequencies)
    ]
    # Functions without a kept pair are left out, since they would only cost time.
    used_rows, row_index = np.unique([i for i, _ in pairs], return_inverse=True)
    used_columns, column_index = np.unique([j for _, j in pairs], return_inverse=True)

    def stacked(blocks: tuple[AxisBlock, ...], field: str, used: np.ndarray) -> np.ndarray:
        return np.concatenate([getattr(block, field) for block in blocks])[used]

    scale = 1.0 / size  # functions along both axes have squared norm block_size: their products get norm 1
    return GridBases(
        row_analysis=scale * stacked(rows, "analysis", used_rows),
        row_synthesis=scale * stacked(rows, "synthesis", used_rows),
        column_analysis=stacked(columns, "analysis", used_columns),
        column_synthesis=stacked(columns, "synthesis", used_columns),
        kept=row_index * len(used_columns) + column_index,
    )


# torch.compile does not trace the construction of bases. It takes the results of these three functions for constants,
# for which their arguments have to be plain values.


@torch.compiler.assume_constant_result
def _num_bases(height: int, width: int, basis_class: type[WalshBasis], *settings: Any) -> int:
    return num_bases((height, width), basis_class(*settings))


@torch.compiler.assume_constant_result
def _functions_outnumber_tokens(height: int, width: int, basis_class: type[WalshBasis], *settings: Any) -> bool:
    """Whether there are more functions than tokens along an axis, as is possible with boundary="reflect"."""
    bases = grid_bases((height, width), basis_class(*settings))
    return len(bases.row_analysis) > height or len(bases.column_analysis) > width


@torch.compiler.assume_constant_result
def _values(name: str, height: int, width: int, basis_class: type[WalshBasis], *settings: Any) -> list:
    return getattr(grid_bases((height, width), basis_class(*settings)), name).tolist()


_matrices: BoundedCache[tuple, Tensor] = BoundedCache(512)


def _matrix(name: str, grid: tuple[int, int], basis: WalshBasis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One of the arrays of [`GridBases`] as a tensor, kept for later calls."""
    if torch.compiler.is_compiling():  # the compiled graph contains it as a constant
        return torch.tensor(_values(name, *grid, type(basis), *basis._settings()), dtype=dtype, device=device)
    key = (name, grid, basis, dtype, device)
    matrix = _matrices.get(key)
    if matrix is None:
        matrix = _constant(getattr(grid_bases(grid, basis), name), device, dtype)
        if type(matrix) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
            return matrix
        _matrices[key] = matrix
    return matrix


def _constant(values: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    # from_numpy, unlike torch.tensor, ignores a default device.
    return without_transforms(lambda: torch.from_numpy(values).to(device, dtype))


_orders: BoundedCache[tuple, tuple[Tensor, Tensor]] = BoundedCache(64)


def order_indices(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The indices that sort the grid's tokens row by row, and those that restore the layout's order."""
    if torch.compiler.is_compiling():  # which cannot enter the lock of the cache in torch 2.11
        back = torch.tensor([*layout.order], device=device)  # type: ignore[misc]
        return back.argsort(), back
    key = (layout, device)
    order = _orders.get(key)
    if order is None:
        back = without_transforms(lambda: torch.tensor(layout.order, device=device))
        order = _orders[key] = (without_transforms(lambda: back.argsort()), back)
    return order


_wholes: BoundedCache[tuple, Tensor] = BoundedCache(64)


def _whole_matrix(
    name: str, layout: TokenLayout, basis: WalshBasis, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The matrix (k, L) for the analysis or synthesis of all tokens, of which those outside the grid pass through."""
    if torch.compiler.is_compiling():  # made in each pass, since the graph would contain it as a list of values
        return _whole_matrix_compiled(name, layout, basis, device).to(dtype)
    key = (name, layout, basis, dtype, device)
    matrix = _wholes.get(key)
    if matrix is None:
        on_grid = getattr(grid_bases(layout.grid, basis), f"dense_{name}")()
        if layout.order:
            on_grid = on_grid[:, list(layout.order)]
        prefix, suffix = layout.num_prefix_tokens, layout.num_suffix_tokens
        whole = np.zeros((layout.num_outside + len(on_grid), layout.num_tokens))
        whole[:prefix, :prefix] = np.eye(prefix)
        whole[prefix : len(whole) - suffix, prefix : layout.num_tokens - suffix] = on_grid
        whole[len(whole) - suffix :, layout.num_tokens - suffix :] = np.eye(suffix)
        matrix = _constant(whole, device, dtype)
        if type(matrix) is not Tensor:
            return matrix
        _wholes[key] = matrix
    return matrix


def _whole_matrix_compiled(name: str, layout: TokenLayout, basis: WalshBasis, device: torch.device) -> Tensor:
    def part(which: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return _matrix(which, layout.grid, basis, dtype, device)

    on_grid = torch.kron(part(f"row_{name}"), part(f"column_{name}"))[part("kept", torch.int64)]
    if layout.order:
        on_grid = on_grid[:, order_indices(layout, device)[1]]
    before, after = (torch.eye(n, device=device) for n in (layout.num_prefix_tokens, layout.num_suffix_tokens))
    return torch.block_diag(before, on_grid, after)
