"""The backward pass of layers whose outputs are only read at the leading tokens.

A model that is read at [CLS] needs nothing else of its last block: there the gradients of the MLP's outputs, of the
attention's output and of its queries are zero in all patches. Products with zeros are left out, which does not change
the gradients. Nothing is assumed about the model: the gradient itself is checked, in each backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.packed import PackedLayout
from ..transforms import must_be_functional
from .plan import BackwardPlan


class LeadingTokens:
    """A projection, in the sense of [`lbp_peft.projection.Projection`]: its coefficients are the first p of L tokens.

    Args:
        number: p.
        length: L.
    """

    basis = None
    preserves_sums = True

    def __init__(self, number: int, length: int):
        self.number = number
        self.length = length

    def project_gradient(self, tokens: Tensor) -> Tensor:
        """(N, L, C) -> (N, p, C)."""
        return tokens[:, : self.number]

    def fit(self, tokens: Tensor) -> tuple[LeadingTokens, Tensor]:
        """This projection, and the coefficients of a gradient: (N, L, C) -> (N, p, C)."""
        return self, self.project_gradient(tokens)

    def sum(self, coefficients: Tensor) -> Tensor:
        """(N, p, C) -> (C,)."""
        return coefficients.sum(dim=(0, 1))

    def lift(self, coefficients: Tensor) -> Tensor:
        """(N, p, C) -> (N, L, C), zero in all other tokens."""
        tokens = coefficients.new_zeros(len(coefficients), self.length, coefficients.shape[2])
        tokens[:, : self.number] = coefficients
        return tokens


def leading_tokens_with_gradient(g: Tensor, plan: BackwardPlan) -> LeadingTokens | None:
    """The tokens before the grid, if the gradient of the outputs is exactly zero in all others; None if it is not.

    This is checked on CPUs only: elsewhere, the program would have to wait for the device. It is not checked in
    compiled graphs, which cannot depend on values.

    Args:
        g: Shape (N, L, C_out).
        plan: The plan of the layer. If it has no layout, all tokens but the first are compared with zero. The basis of
            the weight gradient must keep the tokens before the grid as they are.
    """
    if must_be_functional() or type(g) is not Tensor or g.device.type != "cpu" or g.numel() == 0:
        return None
    layout = plan.layout
    if plan.padding_mask is not None or isinstance(layout, PackedLayout):
        return None
    if plan.weight_basis is not None and (layout is None or not plan.weight_basis.keeps_outside(layout)):
        return None
    number = 1 if layout is None else layout.num_prefix_tokens
    if not 0 < number < g.shape[1] or bool(g[:, -1].any()):  # the last token nearly always decides, at no cost
        return None
    least, most = torch.aminmax(g[:, number:])
    return LeadingTokens(number, g.shape[1]) if least == 0 and most == 0 else None  # NaN is not equal to zero
