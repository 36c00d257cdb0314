"""The sums over the tokens of a layer by which calibration chooses its basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass
class TokenStatistics:
    """Sums over images of a quadratic statistic, for both factors of a layer's weight gradient dW = sum_n g_n^T x_n.

    Attributes:
        inputs: The statistic of the inputs x, float64, by the grid (H, W).
        gradients: The same of the gradients g of the outputs.
    """

    inputs: dict[Grid, Tensor] = field(default_factory=dict)
    gradients: dict[Grid, Tensor] = field(default_factory=dict)

    def add(self, grid: Grid, x: Tensor, g: Tensor, statistic: Callable[[Tensor, Grid], Tensor]) -> None:
        """Add a batch.

        Tokens whose gradient is zero, such as padding, add nothing to dW, so they do not count in x either.

        Args:
            grid: (H, W).
            x, g: Shape (N, H * W, C), row by row of the grid, of any floating dtype.
            statistic: Gives the statistic of (N, H * W, C), summed over images and channels.
        """
        used = (g != 0).any(dim=2, keepdim=True)
        for sums, tokens in ((self.inputs, x.masked_fill(~used, 0)), (self.gradients, g)):
            added = statistic(tokens.float() if tokens.dtype.itemsize < 4 else tokens, grid)
            added = added.to("cpu" if added.device.type == "mps" else added.device, torch.float64)
            sums[grid] = sums[grid] + added if grid in sums else added

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity."""
        return all(bool(torch.isfinite(one).all()) for sums in (self.inputs, self.gradients) for one in sums.values())


def pool(parts: Iterable[TokenStatistics]) -> TokenStatistics:
    """Add up the statistics of several layers. Each layer counts the same, whatever the size of its gradients."""
    result = TokenStatistics()
    for part in parts:
        for sums, of_part in ((result.inputs, part.inputs), (result.gradients, part.gradients)):
            size = sum(float(total(one)) for one in of_part.values())
            for grid, one in of_part.items():
                scaled = one / size if size > 0 else one
                sums[grid] = sums[grid] + scaled if grid in sums else scaled
    return result


def total(statistic: Tensor) -> Tensor:
    """The energy of the tokens: the sum of a vector of energies, or the trace of a matrix of second moments."""
    return statistic.trace() if statistic.dim() == 2 else statistic.sum()
