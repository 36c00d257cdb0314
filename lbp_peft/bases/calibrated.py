"""Bases that calibration chose for one layer, and the placeholder for one that it could not choose."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .base import Basis
from .dense import DenseBasis
from .grids import LayoutError, TokenLayout, TokenOrder
from .listed import ListedBasis


class NotCalibratedError(RuntimeError):
    """A basis is needed that calibration has yet to choose."""


@dataclass(frozen=True)
class LeftOutBasis(Basis):
    """A placeholder for a basis that calibration could not choose. It exists for no layout.

    Attributes:
        why: The reason.
    """

    why: str

    def num_coefficients(self, layout: TokenLayout) -> NoReturn:
        raise LayoutError(
            f"it was left out of the calibration: {self.why}",
            'Set another selection for it, as selection_pattern={name: "lp_l1"} does, or calibrate again.',
        )

    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> NoReturn:
        self.num_coefficients(layout)

    synthesis = analysis


@dataclass(frozen=True)
class ChosenWalshBasis(ListedBasis):
    """Walsh functions that calibration chose. Unlike a list from the configuration, it is saved with the adapter."""

    def state(self) -> dict[str, Tensor]:
        return {"pairs": torch.tensor(self.pairs, dtype=torch.int64)}


class CalibratedBasis(Basis):
    """Orthonormal functions over the patches, given as a matrix for each grid size that was calibrated.

    Tokens outside the grid are kept as they are. Two bases are equal if their matrices are equal bit by bit, so that
    layers with the same input can share its projection.

    Args:
        of_grids: (H, W) -> shape (k, H * W), float32 with orthonormal rows, columns row by row of the grid.

    Raises:
        ValueError: there is no grid, a matrix has the wrong shape or dtype, or its rows are not orthonormal.
    """

    def __init__(self, of_grids: Mapping[tuple[int, int], Tensor]):
        if not of_grids:
            raise ValueError("A calibrated basis needs a matrix for at least one grid size.")
        digest = hashlib.sha256()
        self._matrices: dict[tuple[int, int], Tensor] = {}
        for (height, width), matrix in sorted(of_grids.items()):
            if matrix.dtype != torch.float32 or matrix.dim() != 2 or matrix.shape[1] != height * width:
                raise ValueError(
                    f"The basis for a grid of {height} x {width} must be a float32 matrix with {height * width} "
                    f"columns, got {matrix.dtype} of shape {tuple(matrix.shape)}."
                )
            kept = matrix.detach().to("cpu", copy=True).contiguous()
            self._matrices[height, width] = kept
            digest.update(f"{height}x{width}".encode())
            digest.update(kept.numpy().tobytes())
        self._digest = digest.hexdigest()
        self._bases: dict[tuple[tuple[int, int], TokenOrder | None], DenseBasis] = {}
        for grid in self._matrices:
            self._on(grid, None)  # checks that the rows are orthonormal

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibratedBasis) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        of_grids = ", ".join(f"{h} x {w}: {len(matrix)}" for (h, w), matrix in self._matrices.items())
        return f"CalibratedBasis({of_grids})"

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grid sizes that were calibrated."""
        return list(self._matrices)

    def num_coefficients(self, layout: TokenLayout) -> int:
        return self._for(layout).num_coefficients(layout)

    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._for(layout).analysis(layout, dtype, device)

    synthesis = analysis

    def preserves_sums(self, layout: TokenLayout) -> bool:
        return self._for(layout).preserves_sums(layout)

    def state(self) -> dict[str, Tensor]:
        return {f"grid_{height}x{width}": matrix for (height, width), matrix in self._matrices.items()}

    def _for(self, layout: TokenLayout) -> DenseBasis:
        if layout.grid not in self._matrices:
            known = ", ".join(f"{height} x {width}" for height, width in self._matrices)
            raise LayoutError(
                f"its basis was calibrated for grids of {known}, and its input has {layout.grid[0]} x {layout.grid[1]}",
                "Run lbp_peft.calibrate(model, batches) with batches of all sizes that you train with.",
            )
        return self._on(layout.grid, layout.order)

    def _on(self, grid: tuple[int, int], order: TokenOrder | None) -> DenseBasis:
        basis = self._bases.get((grid, order))
        if basis is None:
            matrix = self._matrices[grid]
            basis = self._bases[grid, order] = DenseBasis(matrix if order is None else matrix[:, list(order)])
        return basis
