"""Gradient filtering: one value of the gradient for each small square of patches.

Source: Y. Yang, G. Li, R. Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023 (arXiv
2301.00330), and the padding of its published code. The method precedes LBP-WHT, whose first basis function is constant
too.

g is replaced by its mean over squares of `patch` x `patch` tokens, and x by its sum over them. dx is the mean of g
times W, copied to all tokens of the square; dW is the sum over all squares of mean(g)^T sum(x). Only the sums of x are
kept.

The forward pass and db are exact. dx and dW are approximations, and exact if `patch` is 1.

The paper adapts convolutions, of which a linear layer is the 1 x 1 case. The layers here also have tokens before the
grid ([CLS]). Our addition is that these pass through exactly. The grid has to be square. If its side is not a multiple
of `patch`, the grid is padded on both sides, with the smaller half of the padding below and to the right. Padding
counts neither in means nor in sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import GradientRule, square_grid


class GradientFilter(GradientRule):
    """Approximates the gradients by their means over squares of tokens.

    Args:
        patch: The side of the squares, in tokens.
    """

    def __init__(self, patch: int = 2):
        if patch < 1:
            raise ValueError(f"patch must be at least 1, got {patch}")
        self.patch = patch

    def kept(self, x: Tensor) -> list[Tensor]:
        return [self.sums(x)]

    def grad_input(self, g: Tensor, weight: Tensor) -> Tensor:
        return self.copied(self.means(g) @ weight, g.shape[1])

    def grad_weight(self, g: Tensor, kept: list[Tensor]) -> Tensor:
        return self.means(g).flatten(0, 1).T @ kept[0].flatten(0, 1)

    def sums(self, x: Tensor) -> Tensor:
        """The tokens before the grid, and the sums over the squares: (B, L, C) -> (B, prefix + squares, C)."""
        side, prefix = square_grid(x.shape[1])
        squares = -(-side // self.patch)
        before, after = self.padding(side)
        grid = F.pad(x[:, prefix:].unflatten(1, (side, side)), (0, 0, before, after, before, after))
        split = grid.unflatten(2, (squares, self.patch)).unflatten(1, (squares, self.patch))
        return torch.cat((x[:, :prefix], split.sum((2, 4)).flatten(1, 2)), 1)

    def means(self, g: Tensor) -> Tensor:
        """The tokens before the grid, and the means of the squares: (B, L, C) -> (B, prefix + squares, C)."""
        return self.sums(g) / self.sums(g.new_ones(1, g.shape[1], 1))

    def copied(self, of_squares: Tensor, num_tokens: int) -> Tensor:
        """The value of each square, copied to its tokens: (B, prefix + squares, C) -> (B, L, C)."""
        side, prefix = square_grid(num_tokens)
        squares = -(-side // self.patch)
        before, _ = self.padding(side)
        grid = of_squares[:, prefix:].unflatten(1, (squares, squares))
        grid = grid.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        grid = grid[:, before : before + side, before : before + side]
        return torch.cat((of_squares[:, :prefix], grid.flatten(1, 2)), 1)

    def padding(self, side: int) -> tuple[int, int]:
        """The numbers of tokens that pad each row at its start and at its end."""
        missing = -side % self.patch
        return -(-missing // 2), missing // 2
