"""Gradients that refuse to be differentiated again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..transforms import in_transform


def once_differentiable(
    gradients: Iterable[Tensor | None], output_grad: Tensor, are_tracked: bool = False
) -> list[Tensor | None]:
    """The same gradients, whose own backward pass raises RuntimeError.

    Args:
        gradients: The gradients of the inputs of an autograd function.
        output_grad: The gradient of its output. `torch.autograd.grad` only runs nodes on a path to the tensors that it
            differentiates with respect to, and this tensor is on that path.
        are_tracked: Whether autograd tracks the gradients already, as within transforms of `torch.func`.
    """
    if are_tracked or in_transform():
        return [d if d is None else _OnceDifferentiable.apply(d) for d in gradients]
    path = [output_grad] if output_grad.requires_grad else []
    return [d if d is None else _OnceDifferentiable.apply(d.requires_grad_(), *path) for d in gradients]


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, with a backward pass that raises an error: there is no second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *_: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "Low-rank backpropagation has no second derivative: its gradient is not that of any function. For double "
            "backward run the model in eval mode or inside lbp_peft.exact_backward(model), where gradients are exact."
        )
