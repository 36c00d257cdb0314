"""Linear layers with an exact forward pass, whose gradients are computed by a rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbp_peft.encoder import encoder_linears


class GradientRule(ABC):
    """How the gradients of one layer are computed, and what is kept of its input for that purpose.

    With the input x (B, L, C_in), the weight W (C_out, C_in) and g = dLoss/dy (B, L, C_out), the exact gradients are
    dx = g W and dW = sum of g_b^T x_b over the images b.
    """

    @abstractmethod
    def kept(self, x: Tensor) -> list[Tensor]:
        """The tensors that the forward pass keeps of x (B, L, C_in)."""

    @abstractmethod
    def grad_weight(self, g: Tensor, kept: list[Tensor]) -> Tensor:
        """dW, shape (C_out, C_in), from g and the kept tensors."""

    def grad_input(self, g: Tensor, weight: Tensor) -> Tensor:
        """dx, shape (B, L, C_in). It is exact unless a rule overrides this method."""
        return g @ weight


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rule: GradientRule) -> Tensor:
        ctx.rule = rule
        kept = rule.kept(x) if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(weight, *kept)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            ctx.rule.grad_input(g, weight) if needs_x else None,
            ctx.rule.grad_weight(g, kept) if needs_weight else None,
            g.sum((0, 1)) if needs_bias else None,
            None,
        )


class RivalLinear(nn.Linear):
    """A linear layer that computes its gradients by a rule in training. It has the weight and bias of another layer."""

    def __init__(self, linear: nn.Linear, rule: GradientRule):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if x.dim() != 3:
            raise ValueError(
                f"these methods take inputs of shape (B, L, C), but this one has the shape {tuple(x.shape)}"
            )
        return _Multiply.apply(x, self.weight, self.bias, self.rule)


def with_rule(rule: Callable[..., GradientRule]) -> Callable[..., nn.Module]:
    """A function that has each linear layer of a model's encoder follow a rule, which is made from the settings."""

    def apply(model: nn.Module, **settings: Any) -> nn.Module:
        names = [name for name in encoder_linears(model) if type(model.get_submodule(name)) is nn.Linear]
        if not names:
            raise ValueError("the model has no linear layers in its encoder, or another method has adapted them")
        for name in names:
            model.set_submodule(name, RivalLinear(model.get_submodule(name), rule(**settings)).train(model.training))
        return model

    return apply


def square_grid(num_tokens: int) -> tuple[int, int]:
    """The side of the patch grid, and the smallest number of prefix tokens for which the others form a square grid.

    Raises:
        ValueError: no number of prefix tokens up to 8 leaves a square grid.
    """
    for prefix in range(9):
        side = math.isqrt(max(num_tokens - prefix, 0))
        if side and side * side == num_tokens - prefix:
            return side, prefix
    raise ValueError(f"{num_tokens} tokens are not a square grid with up to 8 tokens before it")
