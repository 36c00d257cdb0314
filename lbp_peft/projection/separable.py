"""Projection axis by axis, with the factors of a separable basis."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..bases.basis_set import BasisSet
from ..bases.separable import SeparableBasis, order_indices
from ..transforms import in_transform, must_be_functional
from .base import Projection, bmm_into, is_channels_last, times


class SeparableProjection(Projection):
    """Transforms tokens along the rows of the grid and then along its columns.

    [`lbp_peft.projection.dense.DenseProjection`] does the same in one step.
    """

    basis: SeparableBasis

    def _make_matrices(self) -> None:
        layout = self.layout
        self.row_blocks, self.column_blocks = (self.basis.equal_blocks(side, layout) for side in layout.grid)

        def of_one_block(matrix: Tensor, blocks: int) -> Tensor:
            return matrix[: len(matrix) // blocks, : matrix.shape[1] // blocks]

        factors = self.basis.factors(layout, self.dtype, self.device)
        self.row_analysis = of_one_block(factors.row_analysis, self.row_blocks)
        self.row_synthesis = of_one_block(factors.row_synthesis, self.row_blocks)
        self.column_analysis = of_one_block(factors.column_analysis, self.column_blocks)
        self.column_synthesis = of_one_block(factors.column_synthesis, self.column_blocks)
        self.kept = factors.kept

    def _has_kernels(self, tokens: Tensor, basis: BasisSet) -> bool:
        """Whether the kernels support these tokens or coefficients, and no transform of `torch.func` is active."""
        if not kernels.IN_USE or in_transform():
            return False
        return kernels.serve_tokens(tokens, self.layout, basis, self.padding_mask)

    @property
    def num_coefficients(self) -> int:
        return self.layout.num_outside + len(self.kept)

    def sum(self, coefficients: Tensor) -> Tensor:
        of_rows = self.row_analysis.sum(1).repeat(self.row_blocks)
        of_columns = self.column_analysis.sum(1).repeat(self.column_blocks)
        of_bases = torch.outer(of_rows, of_columns).flatten()[self.kept]
        before, after = self.layout.num_prefix_tokens, self.layout.num_suffix_tokens
        weights = torch.cat((of_bases.new_ones(before), of_bases, of_bases.new_ones(after)))
        return weights @ coefficients.sum(dim=0)

    def project(self, tokens: Tensor) -> Tensor:
        if isinstance(self.basis, BasisSet) and self._has_kernels(tokens, self.basis):
            return kernels.project_tokens(tokens, self.layout, self.basis)
        return super().project(tokens)

    def _project(self, tokens: Tensor) -> Tensor:
        (height, width), prefix = self.layout.grid, self.layout.num_prefix_tokens
        batch, _, channels = tokens.shape
        grid = tokens[:, prefix : prefix + height * width]
        if self.layout.order:
            grid = grid.index_select(1, order_indices(self.layout, tokens.device)[0])
        grid = grid.reshape(batch, height, width * channels)
        rows = times(self.row_analysis, grid, self.row_blocks)
        both = times(self.column_analysis, rows.reshape(-1, width, channels), self.column_blocks)
        both = both.reshape(batch, rows.shape[1] * both.shape[1], channels)
        if self.layout.num_outside == 0:
            return both.index_select(1, self.kept)
        before, after = tokens[:, :prefix], tokens[:, prefix + height * width :]
        if must_be_functional():  # the compiler removes the copy
            return torch.cat((before, both.index_select(1, self.kept), after), dim=1)
        # The dtype is that of `both`: under autocast, products have a narrower dtype than the tokens.
        coefficients = both.new_empty(batch, self.layout.num_outside + len(self.kept), channels)
        coefficients[:, :prefix] = before
        torch.index_select(both, 1, self.kept, out=coefficients[:, prefix : prefix + len(self.kept)])
        coefficients[:, prefix + len(self.kept) :] = after
        return coefficients

    def lift(self, coefficients: Tensor) -> Tensor:
        if isinstance(self.basis, BasisSet) and self._has_kernels(coefficients, self.basis):
            return kernels.lift_coefficients(coefficients, self.layout, self.basis)
        (height, width), prefix = self.layout.grid, self.layout.num_prefix_tokens
        batch, _, channels = coefficients.shape
        num_rows = len(self.row_synthesis) * self.row_blocks
        num_columns = len(self.column_synthesis) * self.column_blocks
        both = coefficients.new_zeros(batch, num_rows * num_columns, channels)
        both.index_copy_(1, self.kept, coefficients[:, prefix : prefix + len(self.kept)])
        rows = times(self.column_synthesis.t(), both.reshape(-1, num_columns, channels), self.column_blocks)
        rows = rows.reshape(batch, num_rows, width * channels)
        if self.row_blocks > 1 or self.layout.order:
            grid = times(self.row_synthesis.t(), rows, self.row_blocks).view(batch, height * width, channels)
            if self.layout.order:
                grid = grid.index_select(1, order_indices(self.layout, grid.device)[1])
            tokens = self._with_outside(coefficients, grid)
        else:
            # Written in place, since concatenating prefix and grid would take as long as everything above.
            tokens = coefficients.new_empty(batch, self.layout.num_tokens, channels)
            tokens[:, :prefix] = coefficients[:, :prefix]
            tokens[:, prefix + height * width :] = coefficients[:, prefix + len(self.kept) :]
            grid = tokens[:, prefix : prefix + height * width].view(batch, height, width * channels)
            bmm_into(grid, self.row_synthesis.t().expand(batch, -1, -1), rows)
        return tokens if self.padding_mask is None else tokens.masked_fill_(self.padding_mask[:, :, None], 0)

    def _with_outside(self, coefficients: Tensor, grid: Tensor) -> Tensor:
        """The grid's tokens, together with the tokens outside the grid."""
        if self.layout.num_outside == 0:
            return grid
        prefix = self.layout.num_prefix_tokens
        return torch.cat((coefficients[:, :prefix], grid, coefficients[:, prefix + len(self.kept) :]), dim=1)

    def project_image(self, image: Tensor) -> Tensor:
        batch, channels, height, width = image.shape
        if is_channels_last(image):
            return self.project(image.permute(0, 2, 3, 1).flatten(1, 2))
        columns = image.reshape(-1, width // self.column_blocks) @ self.column_analysis.t()
        # All blocks of a channel's rows at once, since the products of single blocks would be too small.
        rows = torch.block_diag(*[self.row_analysis] * self.row_blocks)
        both = times(rows, columns.view(batch * channels, height, columns.shape[1] * self.column_blocks), 1)
        return both.view(batch, channels, both.shape[1] * both.shape[2]).index_select(2, self.kept).transpose(1, 2)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        (height, width), (batch, _, channels) = self.layout.grid, coefficients.shape
        num_rows = len(self.row_synthesis) * self.row_blocks
        num_columns = len(self.column_synthesis) * self.column_blocks
        both = coefficients.new_zeros(batch, channels, num_rows * num_columns)
        both.index_copy_(2, self.kept, coefficients.transpose(1, 2))
        rows = torch.block_diag(*[self.row_synthesis] * self.row_blocks)
        columns = times(rows.t(), both.view(batch * channels, num_rows, num_columns), 1)
        pixels = columns.view(-1, len(self.column_synthesis)) @ self.column_synthesis
        return pixels.view(batch, channels, height, width)
