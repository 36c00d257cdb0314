"""Tables of a layout for the kernels: the tokens, the basis matrix and the coefficients of each block of the grid.

On a GPU, one product for each block is faster than one axis after the other: with 8 functions or fewer along an axis,
most of a matrix unit's tiles of 16 would be padding, and the intermediate result would have to be transposed. The
product of a block's r basis functions and its 64 tokens is summed in float32. The matrices are computed in float64 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..bases.basis_set import BasisSet
from ..bases.grids import TokenLayout
from ..bases.separable import AxisBlock, axis_blocks, num_bases

# The operators' arguments after the tensor, see `described`.
SCHEMA = "int[] grid, int prefix, int suffix, int r, int block_size, str selection, str boundary"
_TILE = 16  # the smallest side of a matrix that Triton multiplies


@dataclass(frozen=True)
class Blocks:
    """The B blocks of a grid, and one of the two maps between their tokens and coefficients.

    Attributes:
        matrix: Shape (B, R, T): R bases on T tokens, zero where a block has fewer. R and T are powers of two from 16.
        places: Shape (B, T), int64: the indices of the tokens among all L, -1 where the block has fewer.
        starts: Shape (B + 1,), int64: the index of each block's first coefficient among all k, then k on the grid.
        multiply_adds: The number of multiply-adds for one channel of one image, without padding.
    """

    matrix: Tensor
    places: Tensor
    starts: Tensor
    multiply_adds: int


def described(
    grid: Sequence[int], prefix: int, suffix: int, r: int, block_size: int, selection: str, boundary: str
) -> tuple[TokenLayout, BasisSet]:
    """The layout and the bases from the plain values that are arguments of the operators."""
    return TokenLayout((grid[0], grid[1]), prefix, suffix), BasisSet(r, block_size, selection, boundary)


def num_coefficients(layout: TokenLayout, bases: BasisSet) -> int:
    """k, the number of rows that represent the tokens of an image."""
    return layout.num_outside + num_bases(layout.grid, bases)


@lru_cache(maxsize=64)
def analysis(layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The map from tokens to coefficients. With boundary="reflect" blocks also read tokens of their neighbours."""
    return _blocks("analysis", layout, bases, dtype, device)


@lru_cache(maxsize=64)
def synthesis(layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The map from coefficients to tokens, the transpose of `matrix`. Each token of the grid is in one block only."""
    return _blocks("synthesis", layout, bases, dtype, device)


def _blocks(field: str, layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Blocks:
    size = bases.size_along(layout.grid)
    rows, columns = (axis_blocks(side, size, bases.boundary) for side in layout.grid)
    found = [_one_block(field, row, column, layout, bases) for row in rows for column in columns]
    most_bases, most_tokens = (max(matrix.shape[axis] for matrix, _ in found) for axis in (0, 1))
    matrices = np.zeros((len(found), _padded(most_bases), _padded(most_tokens)))
    places = np.full((len(found), _padded(most_tokens)), -1)
    for index, (matrix, tokens) in enumerate(found):
        matrices[index, : matrix.shape[0], : matrix.shape[1]] = matrix
        places[index, : len(tokens)] = tokens
    starts = layout.num_prefix_tokens + np.cumsum([0] + [len(matrix) for matrix, _ in found])
    with torch.inference_mode(False):
        return Blocks(
            torch.from_numpy(matrices).to(device, dtype),
            torch.from_numpy(places).to(device),
            torch.from_numpy(starts).to(device),
            sum(matrix.size for matrix, _ in found),
        )


def _one_block(
    field: str, row: AxisBlock, column: AxisBlock, layout: TokenLayout, bases: BasisSet
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of a block, and the indices of its tokens."""
    kept = bases.select(row.sequencies, column.sequencies)
    down, across = getattr(row, field), getattr(column, field)
    at_rows, at_columns = (np.flatnonzero(functions.any(axis=0)) for functions in (down, across))
    i, j = (list(indices) for indices in zip(*kept, strict=True))
    matrix = down[i][:, at_rows, None] * across[j][:, None, at_columns] / bases.size_along(layout.grid)
    places = layout.num_prefix_tokens + at_rows[:, None] * layout.grid[1] + at_columns
    return matrix.reshape(len(kept), -1), places.reshape(-1)


def _padded(side: int) -> int:
    return max(_TILE, 1 << (side - 1).bit_length())
