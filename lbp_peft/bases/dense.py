"""A basis given as a matrix, such as one that is learned or calibrated for a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounded import BoundedCache
from .base import Basis, without_transforms
from .grids import LayoutError, TokenLayout

_TOLERANCE = 1e-4  # for matrices in float32


class DenseBasis(Basis):
    """Orthonormal functions over the tokens, one in each row of a matrix.

    Two dense bases are equal only if they are the same object, so use one instance for gradients that are to share
    projections.

    Args:
        matrix: Shape (k, M) with orthonormal rows, of any floating dtype. It is copied in float64. If M is the number
            of tokens on the grid, the tokens outside the grid pass through exactly; if M is the number of all tokens,
            the functions extend over these too. Tokens are in the order in which the layer receives them.

    Raises:
        ValueError: it is not a matrix with at most as many rows as columns, or its rows are not orthonormal.
    """

    def __init__(self, matrix: Tensor):
        if matrix.dim() != 2 or not 1 <= len(matrix) <= matrix.shape[1]:
            raise ValueError(f"A dense basis is a matrix (k, tokens) with 1 <= k <= tokens, got {tuple(matrix.shape)}.")
        exact = matrix.detach().to("cpu", torch.float64, copy=True)
        error = float((exact @ exact.T - torch.eye(len(exact), dtype=torch.float64)).abs().max())
        if not error < _TOLERANCE:
            raise ValueError(
                f"The rows of a dense basis must be orthonormal; products of two of them are off by {error:.1e}. "
                "torch.linalg.qr(matrix.T).Q.T makes them so."
            )
        self._matrix = exact
        sums = exact.sum(1)
        self._has_constant = float((exact.T @ sums - 1).abs().max()) < _TOLERANCE
        self._tensors: BoundedCache[tuple, Tensor] = BoundedCache(16)

    def num_coefficients(self, layout: TokenLayout) -> int:
        return len(self._matrix) + self._num_exact(layout)

    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return self._whole(layout).to(device, dtype)
        key = (layout, dtype, device)
        tensor = self._tensors.get(key)
        if tensor is None:
            tensor = without_transforms(lambda: self._whole(layout).to(device, dtype))
            if type(tensor) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
                return tensor
            self._tensors[key] = tensor
        return tensor

    synthesis = analysis

    def preserves_sums(self, layout: TokenLayout) -> bool:
        return self._has_constant

    def keeps_outside(self, layout: TokenLayout) -> bool:
        return self._num_exact(layout) > 0

    def state(self) -> dict[str, Tensor]:
        return {"matrix": self._matrix}

    def _num_exact(self, layout: TokenLayout) -> int:
        """The number of tokens outside the grid that pass through exactly."""
        columns = self._matrix.shape[1]
        on_grid = layout.num_tokens - layout.num_outside
        if columns not in (on_grid, layout.num_tokens):
            raise LayoutError(
                f"its dense basis has {columns} tokens, but it has {layout.num_tokens}, of which {on_grid} on the grid",
                "Train with images of the size that the basis was made for, or make it again.",
            )
        return layout.num_tokens - columns

    def _whole(self, layout: TokenLayout) -> Tensor:
        if self._num_exact(layout) == 0:
            return self._matrix
        before, after = (
            torch.eye(n, dtype=torch.float64) for n in (layout.num_prefix_tokens, layout.num_suffix_tokens)
        )
        return torch.block_diag(before, self._matrix, after)
