"""Bases that are chosen by a layer's inputs and gradients: "lhe" and "klt".

With x the inputs of a layer and g the gradients of its outputs, the weight gradient is dW = sum_n g_n^T x_n. In an
orthonormal basis of functions f_i over the tokens it falls into one part for each function,

    dW = sum_i D_i    with    D_i = sum_n (f_i g_n)^T (f_i x_n),

and a low-rank dW keeps r of them. A part is small as soon as either factor is, so both must be weighed: the functions
that carry most of g are not those that carry most of x. With a_i = sum_n |f_i x_n|^2 and b_i = sum_n |f_i g_n|^2, the
inequality of Cauchy and Schwarz bounds a part, |D_i| <= (a_i b_i)^(1/2), and this bound is the weight of f_i.

"lhe" keeps the r Walsh functions of the largest weights (the low heuristic error of arXiv 2309.15275, section 3, which
weighs g alone). "klt", after the Karhunen-Loeve transform, finds the functions themselves: with the matrices of second
moments A = sum_n x_n x_n^T and B = sum_n g_n g_n^T, shape (L, L), the weight of any function is
(f A f^T  f B f^T)^(1/2). The geometric mean of A and B (Pusz and Woronowicz 1975) is the matrix that has these weights
on its diagonal in each basis that makes A and B diagonal; its leading eigenvectors are kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from ..bases.base import Basis
from ..bases.basis_set import BasisSet
from ..bases.calibrated import CalibratedBasis, ChosenWalshBasis, NotCalibratedError
from ..bases.grids import TokenLayout
from ..bases.separable import axis_blocks, num_bases
from ..projection import SeparableProjection
from .statistics import Grid, TokenStatistics

MOST_TOKENS = 4096  # the limit of "klt": a matrix of second moments has 128 MiB then, and its eigenvectors take minutes
_MOST_GRIDS = 16  # the limit for one layer in a checkpoint
_REGULARIZATION = 1e-7  # relative to the mean eigenvalue, so that singular matrices have inverses


@dataclass(frozen=True)
class CalibratedSelection(Basis):
    """A placeholder for a basis that calibration has yet to choose. Whatever needs its functions raises an error.

    Attributes:
        r: Rank. As many functions are kept as the Walsh basis of this rank has.
        block_size, boundary: See [`lbp_peft.BasisSet`].
    """

    r: int
    block_size: int = 8
    boundary: str = "orthogonal"

    name: ClassVar[str]

    @abstractmethod
    def check(self, grid: Grid) -> None:
        """Raise ValueError if a grid cannot be calibrated, for instance because it is too large."""

    @abstractmethod
    def statistic(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The statistic of tokens (N, H * W, C), row by row of a grid, summed over images and channels."""

    @abstractmethod
    def choose(self, statistics: TokenStatistics) -> Basis:
        """The basis for the tokens of these statistics.

        Raises:
            ValueError: it cannot be chosen.
        """

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> Basis:
        """The basis whose `state` gave these tensors, perhaps before they were saved to a file.

        Raises:
            ValueError: the tensors are not those of such a basis.
        """

    def num_coefficients(self, layout: TokenLayout) -> NoReturn:
        raise NotCalibratedError(
            f'selection="{self.name}" chooses the bases by what the layers see. Call lbp_peft.calibrate(model, '
            "batches) before the first training step; a few batches of the training data are enough."
        )

    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> NoReturn:
        self.num_coefficients(layout)

    synthesis = analysis

    def _walsh(self, r: int) -> BasisSet:
        return BasisSet(r, self.block_size)


@dataclass(frozen=True)
class LowHeuristicError(CalibratedSelection):
    """ "lhe": the r Walsh functions of the largest weights, the same in all blocks of all grids.

    The constant function is always among them: it exists in the smallest block, and keeps the sums that the bias
    gradient is computed from.
    """

    name: ClassVar[str] = "lhe"

    def check(self, grid: Grid) -> None:
        if grid[0] > grid[1] == 1:
            raise ValueError(f'its grid of {grid[0]} x 1 is a single column, whose Walsh functions "lhe" cannot list')

    def statistic(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The energies of all Walsh functions, shape (block_size**2,), those of all blocks together.

        The function (i, j) is at i * block_size + j, and at j on a sequence.
        """
        basis = self._walsh(self.block_size**2)
        whole = SeparableProjection(TokenLayout(grid), basis, tokens.dtype, tokens.device)
        energies = whole.project(tokens).square().sum((0, 2))
        places = torch.tensor(_places(grid, basis), device=energies.device)
        return energies.new_zeros(self.block_size**2).index_add_(0, places, energies)

    def choose(self, statistics: TokenStatistics) -> Basis:
        kinds = {1 in grid for grid in statistics.inputs}
        if len(kinds) > 1:
            raise ValueError("it was given both images and sequences, which have different Walsh functions")
        inputs, gradients = sum(statistics.inputs.values()), sum(statistics.gradients.values())
        assert isinstance(inputs, Tensor) and isinstance(gradients, Tensor)
        weights = inputs * gradients if bool(gradients.any()) else inputs
        width = self.block_size**2 if kinds == {True} else self.block_size
        # Equal weights, such as zeros of functions that the border cuts off, stay in the order of their sequency.
        by_sequency = sorted(range(len(weights)), key=lambda place: (sum(divmod(place, width)), place))
        values = weights.tolist()
        order = [0, *sorted(by_sequency[1:], key=lambda place: -values[place])]
        return self._chosen([divmod(place, width) for place in order[: self.r]])

    def restore(self, state: Mapping[str, Tensor]) -> Basis:
        pairs = state.get("pairs")
        if pairs is None or len(state) > 1:
            raise ValueError(f"its tensors are {', '.join(sorted(state))}, not pairs")
        if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2 or not 1 <= len(pairs) <= self.r:
            raise ValueError(f"pairs must be int64 of shape (1 to {self.r}, 2), not {pairs.dtype}{tuple(pairs.shape)}")
        return self._chosen([(int(i), int(j)) for i, j in pairs.tolist()])

    def _chosen(self, pairs: list[tuple[int, int]]) -> ChosenWalshBasis:
        return ChosenWalshBasis(tuple(pairs), self.block_size, self.boundary)


@dataclass(frozen=True)
class KarhunenLoeve(CalibratedSelection):
    """ "klt": for each grid, the leading eigenvectors of the geometric mean of both factors' second moments.

    It keeps as many as the Walsh basis of rank r has functions on the grid. There are no blocks.
    """

    name: ClassVar[str] = "klt"

    def check(self, grid: Grid) -> None:
        if grid[0] * grid[1] > MOST_TOKENS:
            raise ValueError(
                f'its grid of {grid[0]} x {grid[1]} has more than {MOST_TOKENS} tokens, too many for "klt". Set '
                'another selection for it, as selection_pattern={name: "lhe"} does'
            )

    def statistic(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The second moments, shape (L, L)."""
        by_token = tokens.transpose(0, 1).flatten(1)
        return by_token @ by_token.t()

    def choose(self, statistics: TokenStatistics) -> Basis:
        return CalibratedBasis(
            {
                grid: self.functions(inputs, statistics.gradients[grid])[: self._num_kept(grid)].float()
                for grid, inputs in statistics.inputs.items()
            }
        )

    def functions(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """All functions in the order of their weight, shape (L, L), one in each row, orthonormal, float64.

        Args:
            inputs, gradients: The second moments A and B, shape (L, L).
        """
        inputs, gradients = inputs.double().cpu(), gradients.double().cpu()
        mean = geometric_mean(inputs, gradients) if float(gradients.trace()) > 0 else inputs
        return torch.linalg.eigh(mean).eigenvectors.flip(1).t()

    def restore(self, state: Mapping[str, Tensor]) -> Basis:
        if not 1 <= len(state) <= _MOST_GRIDS:
            raise ValueError(f"it has matrices for {len(state)} grid sizes; 1 to {_MOST_GRIDS} are possible")
        of_grids = {}
        for name, matrix in state.items():
            sides = name.removeprefix("grid_").split("x")
            if not name.startswith("grid_") or len(sides) != 2 or not all(_is_side(side) for side in sides):
                raise ValueError(f"{name[:60]!r} names no grid")
            height, width = map(int, sides)
            if matrix.dim() != 2 or matrix.shape[1] != height * width:
                raise ValueError(f"the matrix of a grid of {height} x {width} has the shape {tuple(matrix.shape)}")
            self.check((height, width))
            kept = self._num_kept((height, width))
            if len(matrix) != kept:
                raise ValueError(f"the matrix of a grid of {height} x {width} has {len(matrix)} rows instead of {kept}")
            of_grids[height, width] = matrix
        return CalibratedBasis(of_grids)

    def _num_kept(self, grid: Grid) -> int:
        return min(num_bases(grid, self._walsh(self.r)), grid[0] * grid[1])


CALIBRATED_SELECTIONS: dict[str, type[CalibratedSelection]] = {
    one.name: one for one in (LowHeuristicError, KarhunenLoeve)
}


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """A^(1/2) (A^(-1/2) B A^(-1/2))^(1/2) A^(1/2), each matrix scaled to a trace of its size.

    Args:
        a, b: Symmetric and positive semidefinite, float64.
    """
    identity = torch.eye(len(a), dtype=a.dtype)
    a, b = (one * (len(one) / one.trace()) + _REGULARIZATION * identity for one in (a, b))
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp(min=_REGULARIZATION)
    root = vectors * values.sqrt() @ vectors.t()
    inverse_root = vectors * values.rsqrt() @ vectors.t()
    inner = inverse_root @ b @ inverse_root
    values, vectors = torch.linalg.eigh((inner + inner.t()) / 2)
    mean = root @ (vectors * values.clamp(min=0).sqrt() @ vectors.t()) @ root
    return (mean + mean.t()) / 2


@lru_cache(maxsize=256)
def _places(grid: Grid, basis: BasisSet) -> tuple[int, ...]:
    """The place of each function of a full Walsh basis on a grid, in order, in a table of pairs of sequencies."""
    size = basis.size_along(grid)
    rows, columns = (axis_blocks(side, size, basis.boundary) for side in grid)
    return tuple(
        row.sequencies[i] * size + column.sequencies[j]
        for row in rows
        for column in columns
        for i, j in basis.select(row.sequencies, column.sequencies)
    )


def _is_side(text: str) -> bool:
    return len(text) <= 5 and text.isascii() and text.isdecimal() and text != "0" * len(text)
