"""LowMemoryBP: a GELU that keeps 2 bits for each value, and a LayerNorm that keeps its output instead of its input.

Source: Y. Yang, Y. Shi, C. Wang, X. Zhen, Y. Shi, J. Xu, "Reducing Fine-Tuning Memory Overhead by Approximate and
Memory-Sharing Backpropagation", ICML 2024 (arXiv 2406.16282), and the coefficients of its published code.

ReGELU2 has the forward pass of GELU. As its derivative, it takes that of a sum of three ReLUs: a step function
sum_i a_i [x > c_i] with 4 values. For each element, 2 bits say which of them it is: four elements take one byte.
The gradient of the activation is an approximation.

MS-LayerNorm computes its gradient from the normalised output, which the next linear layer keeps in any case, so that
the norm itself keeps nothing but 1 / standard deviation. Its gradient is exact up to rounding.

The paper merges a norm's weight and bias into the next linear layers, and does not train them by themselves. Here they
stay, so that any model can be measured as it is, and the normalised values are computed from the output y as
(y - bias) / weight. A norm is left as it is if a weight's magnitude is below a hundredth of the largest one. Nothing is
saved where no layer keeps the output, as with frozen linear layers; there the paper's norm takes as much memory as this
one, which is one tensor. ReSiLU2 and RMSNorm are not implemented.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

A = (-0.04922261, 1.09796321, -0.04874060)
C = (-3.18588100, -0.00117882, 3.19083261)
LEAST_WEIGHT = 0.01  # as a share of the largest weight


class _ReGELU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        steps = torch.bucketize(x, x.new_tensor(C)).to(torch.uint8).flatten()
        quarters = F.pad(steps, (0, -len(steps) % 4)).view(4, -1)
        ctx.save_for_backward(quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6)
        return F.gelu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        steps = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])[: g.numel()]
        slopes = g.new_tensor((0.0, *A)).cumsum(0)
        return g * slopes[steps.int()].view_as(g)


class ReGELU2(nn.Module):
    """GELU, with a step function for its derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return _ReGELU2.apply(x)


class _MSLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, _, factor = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(y, factor, weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, factor, weight, bias = ctx.saved_tensors
        normalised = (y - bias) / weight
        g_scaled = g * weight
        means = g_scaled.mean(-1, keepdim=True), (g_scaled * normalised).mean(-1, keepdim=True)
        leading = tuple(range(g.dim() - 1))
        return (
            (g_scaled - means[0] - normalised * means[1]) * factor,
            (g * normalised).sum(leading) if ctx.needs_input_grad[1] else None,
            g.sum(leading) if ctx.needs_input_grad[2] else None,
            None,
        )


class MSLayerNorm(nn.LayerNorm):
    """A layer norm over the last axis, with the weight and bias of another one."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return _MSLayerNorm.apply(x, self.weight, self.bias, self.eps)


def with_low_memory_functions(model: nn.Module) -> nn.Module:
    """Replace all GELUs and layer norms of a model.

    Raises:
        ValueError: the model has none.
    """
    chosen = {name: new for name, module in model.named_modules() if (new := _replacement(module)) is not None}
    if not chosen:
        raise ValueError("the model has neither a GELU nor a layer norm to replace")
    for name, new in chosen.items():
        model.set_submodule(name, new.train(model.training))
    return model


def _replacement(module: nn.Module) -> nn.Module | None:
    is_gelu = type(module) is GELUActivation or (type(module) is nn.GELU and module.approximate == "none")
    if is_gelu:
        return ReGELU2()
    if type(module) is not nn.LayerNorm or module.bias is None or len(module.normalized_shape) != 1:
        return None
    sizes = module.weight.detach().abs()
    return MSLayerNorm(module) if sizes.min() >= LEAST_WEIGHT * sizes.max() else None
