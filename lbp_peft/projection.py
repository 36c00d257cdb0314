"""Project tokens to the small space, and lift them back."""

from __future__ import annotations

import torch
from torch import Tensor

from .bases import BasisSet, TokenLayout, grid_bases, num_bases


def num_kept(layout: TokenLayout, bases: BasisSet | None) -> int:
    """k: the rows that represent the L = `layout.num_tokens` tokens, prefix tokens included.

    It is L, and nothing is gained, where `bases` is None or keeps no fewer rows than there are tokens.
    """
    if bases is None:
        return layout.num_tokens
    return min(layout.num_prefix_tokens + num_bases(layout.grid, bases), layout.num_tokens)


class Projection:
    """The linear maps between L tokens and their k coefficients, for one layout, dtype and device.

    With boundary="orthogonal", `lift` is the transpose of `project` and `project(lift(z)) == z`. The two axes of the
    grid are transformed one after the other, so nothing larger than the input is ever made, and the first, larger step
    is one matrix product over contiguous memory.

    Args:
        layout: Where the L tokens lie.
        bases: Which bases are kept.
        dtype: Of the tokens to project. The matrices are built in float64 and rounded once.
        device: Of the tokens to project.
    """

    def __init__(self, layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device):
        matrices = grid_bases(layout.grid, bases)
        self.layout = layout
        # from_numpy, unlike torch.tensor, takes no notice of a default device; inference tensors could not be saved.
        with torch.inference_mode(False), torch.no_grad():
            self.row_analysis, self.row_synthesis, self.column_analysis, self.column_synthesis = (
                torch.from_numpy(matrix).to(device=device, dtype=dtype).contiguous()
                for matrix in (
                    matrices.row_analysis,
                    matrices.row_synthesis.T,
                    matrices.column_analysis,
                    matrices.column_synthesis.T,
                )
            )
            pairs = torch.from_numpy(matrices.pairs)
            self.kept = (pairs[:, 0] * len(matrices.column_analysis) + pairs[:, 1]).to(device)

    def project(self, tokens: Tensor) -> Tensor:
        """(N, L, C) -> (N, k, C)."""
        (height, width), prefix = self.layout.grid, self.layout.num_prefix_tokens
        batch, _, channels = tokens.shape
        grid = tokens[:, prefix:].reshape(batch, height, width * channels)
        rows = torch.bmm(self.row_analysis.expand(batch, -1, -1), grid)
        rows = rows.reshape(-1, width, channels)
        both = torch.bmm(self.column_analysis.expand(len(rows), -1, -1), rows)
        kept = both.reshape(batch, -1, channels).index_select(1, self.kept)
        return torch.cat((tokens[:, :prefix], kept), dim=1) if prefix else kept

    def lift(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, L, C)."""
        (height, width), prefix = self.layout.grid, self.layout.num_prefix_tokens
        batch, _, channels = coefficients.shape
        num_rows, num_columns = self.row_synthesis.shape[1], self.column_synthesis.shape[1]
        both = coefficients.new_zeros(batch, num_rows * num_columns, channels)
        both = both.index_copy(1, self.kept, coefficients[:, prefix:])
        both = both.reshape(-1, num_columns, channels)
        rows = torch.bmm(self.column_synthesis.expand(len(both), -1, -1), both)
        rows = rows.reshape(batch, num_rows, width * channels)
        grid = torch.bmm(self.row_synthesis.expand(batch, -1, -1), rows).reshape(batch, height * width, channels)
        return torch.cat((coefficients[:, :prefix], grid), dim=1) if prefix else grid


_cache: dict[tuple, Projection] = {}


def projection(
    layout: TokenLayout, bases: BasisSet | None, dtype: torch.dtype, device: torch.device
) -> Projection | None:
    """The [`Projection`] of a layout, built once per layout, bases, dtype and device; None where it is the identity."""
    if bases is None or num_kept(layout, bases) == layout.num_tokens:
        return None
    key = (layout, bases, dtype, device)
    found = _cache.get(key)
    if found is None:
        found = Projection(layout, bases, dtype, device)
        if type(found.kept) is Tensor:  # not under a tracer's fake tensors, which must not outlive it
            _cache[key] = found
    return found
