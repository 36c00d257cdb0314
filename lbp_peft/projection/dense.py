"""Projection by one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import heuristics
from ..transforms import must_be_functional
from .base import Projection, is_channels_last, times


class DenseProjection(Projection):
    """Multiplies tokens by one matrix (k, L): more multiply-adds than axis by axis, in a single pass over memory."""

    def _make_matrices(self) -> None:
        self.analysis = self.basis.analysis(self.layout, self.dtype, self.device)
        self.synthesis = self.basis.synthesis(self.layout, self.dtype, self.device)

    @property
    def num_coefficients(self) -> int:
        return len(self.analysis)

    def sum(self, coefficients: Tensor) -> Tensor:
        return self.analysis.sum(dim=1) @ coefficients.sum(dim=0)

    def _project(self, tokens: Tensor) -> Tensor:
        if not self._takes_two_at_once(tokens):
            return times(self.analysis, tokens, 1)
        # The zeros separate the two images as long as both are finite.
        two = times(torch.block_diag(self.analysis, self.analysis), tokens.unflatten(0, (-1, 2)).flatten(1, 2), 1)
        return two.unflatten(1, (2, -1)).flatten(0, 1)

    def _takes_two_at_once(self, tokens: Tensor) -> bool:
        if must_be_functional():  # the compiler would make a graph for even batches and one for odd ones
            return False
        fitting = len(tokens) > 0 and len(tokens) % 2 == 0 and tokens.is_contiguous()  # otherwise they would be copied
        return fitting and heuristics.active().project_images_in_pairs(
            len(self.analysis), tokens.shape[1], tokens.dtype, tokens.device
        )

    def lift(self, coefficients: Tensor) -> Tensor:
        tokens = times(self.synthesis.t(), coefficients, 1)
        return tokens if self.padding_mask is None else tokens.masked_fill_(self.padding_mask[:, :, None], 0)

    def project_image(self, image: Tensor) -> Tensor:
        if is_channels_last(image):
            return self.project(image.permute(0, 2, 3, 1).flatten(1, 2))
        return (image.flatten(2) @ self.analysis.t()).transpose(1, 2)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        pixels = coefficients.transpose(1, 2) @ self.synthesis
        return pixels.unflatten(2, self.layout.grid)
