"""Gradient filtering: one value of the gradient for each small square of patches.

Source: Y. Yang, G. Li, R. Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023 (arXiv
2301.00330), and the padding of its published code. It precedes LBP-WHT, whose first basis is constant too.

g is replaced by its mean over squares of `patch` x `patch` tokens, and x by its sum over them: dx = the mean of g times
W, copied to all tokens of the square; dW = sum over squares of mean(g)^T sum(x). Kept, in place of x: its sums.

Exact: the forward pass and db. Approximated: dx and dW. At a patch of 1 both are exact.

Differs from the paper: it has convolutions, of which a linear layer is the 1 x 1 case; the layers here have tokens
before the grid ([CLS]), which pass through exactly, an addition of ours. The grid has to be square. A grid that is no
multiple of the square is filled up on both sides, the smaller half below and to the right; filled-up places
count neither in means nor in sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import BackwardRule, square_grid


class GradientFilter(BackwardRule):
    """
    Args:
        patch: Side of the squares, in tokens.
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
        """(B, L, C) -> (B, prefix + squares, C)"""
        side, prefix = square_grid(x.shape[1])
        squares = -(-side // self.patch)
        before, after = self.filled_up(side)
        grid = F.pad(x[:, prefix:].unflatten(1, (side, side)), (0, 0, before, after, before, after))
        split = grid.unflatten(2, (squares, self.patch)).unflatten(1, (squares, self.patch))
        return torch.cat((x[:, :prefix], split.sum((2, 4)).flatten(1, 2)), 1)

    def means(self, g: Tensor) -> Tensor:
        """(B, L, C) -> (B, prefix + squares, C)"""
        return self.sums(g) / self.sums(g.new_ones(1, g.shape[1], 1))

    def copied(self, small: Tensor, num_tokens: int) -> Tensor:
        """(B, prefix + squares, C) -> (B, L, C)"""
        side, prefix = square_grid(num_tokens)
        squares = -(-side // self.patch)
        before, _ = self.filled_up(side)
        grid = small[:, prefix:].unflatten(1, (squares, squares))
        grid = grid.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        grid = grid[:, before : before + side, before : before + side]
        return torch.cat((small[:, :prefix], grid.flatten(1, 2)), 1)

    def filled_up(self, side: int) -> tuple[int, int]:
        """Tokens that are added before and after each row."""
        missing = -side % self.patch
        return -(-missing // 2), missing // 2
