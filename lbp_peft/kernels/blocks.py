"""What the kernels know of a layout: for each block of the grid its tokens, its bases as one matrix, its coefficients.

On a GPU that is better than one axis after the other: with 8 functions or fewer along an axis, a matrix unit would
spend most of its tiles of 16 on padding, and what lies between the axes would have to be laid out anew. The block's
64 tokens times its r bases is one product, of bases made in float64 and rounded once, and it sums in float32.
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
        places: Shape (B, T), int64: where the tokens stand among all L, -1 where the block has fewer.
        starts: Shape (B + 1,), int64: where the coefficients of each block start, and the last one's end, among all k.
        multiply_adds: For one channel of one image, padding not counted.
    """

    matrix: Tensor
    places: Tensor
    starts: Tensor
    multiply_adds: int


def described(
    grid: Sequence[int], prefix: int, suffix: int, r: int, block_size: int, selection: str, boundary: str
) -> tuple[TokenLayout, BasisSet]:
    """Layout and bases from the plain values that operators can be given."""
    return TokenLayout((grid[0], grid[1]), prefix, suffix), BasisSet(r, block_size, selection, boundary)


def num_coefficients(layout: TokenLayout, bases: BasisSet) -> int:
    """k."""
    return layout.num_outside + num_bases(layout.grid, bases)


@lru_cache(maxsize=64)
def analysis(layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Blocks:
    """From tokens to coefficients. With boundary="reflect" blocks also read tokens of their neighbours."""
    return _blocks("analysis", layout, bases, dtype, device)


@lru_cache(maxsize=64)
def synthesis(layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Blocks:
    """From coefficients to tokens, as the transpose of `matrix`. Every token of the grid is in exactly one block."""
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
    """Its bases on its tokens, and where these stand."""
    kept = bases.select(row.sequencies, column.sequencies)
    down, across = getattr(row, field), getattr(column, field)
    at_rows, at_columns = (np.flatnonzero(functions.any(axis=0)) for functions in (down, across))
    i, j = (list(indices) for indices in zip(*kept, strict=True))
    matrix = down[i][:, at_rows, None] * across[j][:, None, at_columns] / bases.size_along(layout.grid)
    places = layout.num_prefix_tokens + at_rows[:, None] * layout.grid[1] + at_columns
    return matrix.reshape(len(kept), -1), places.reshape(-1)


def _padded(side: int) -> int:
    return max(_TILE, 1 << (side - 1).bit_length())
