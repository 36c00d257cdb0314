"""LowMemoryBP: a GELU that keeps 2 bits for each value, and a LayerNorm that keeps its output instead of its input.

Source: Y. Yang, Y. Shi, C. Wang, X. Zhen, Y. Shi, J. Xu, "Reducing Fine-Tuning Memory Overhead by Approximate and
Memory-Sharing Backpropagation", ICML 2024 (arXiv 2406.16282), and the coefficients of its published code.

ReGELU2: the forward pass is GELU's. The derivative is taken to be that of a sum of three ReLUs, a step function
sum_i a_i [x > c_i] with 4 values; which of them is kept in 2 bits, four values in a byte. Approximated: the gradient of
the activation.

MS-LayerNorm: the gradient is written in the normalised output, which the next linear layer keeps anyway, so the norm
adds 1 / standard deviation alone. Exact, to round-off.

Differs from the paper: it merges a norm's weight and bias into the next linear layers and does not train them apart. So
that any model can be measured as it is, they stay here, and the normalised values are found from the output y as
(y - bias) / weight. A norm with a weight whose magnitude is below a hundredth of the largest is left as it is. Nothing
is saved where no layer keeps the output, such as with frozen linear layers, for which the paper's norm costs as much
as this one: one tensor. ReSiLU2 and RMSNorm are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

A = (-0.04922261, 1.09796321, -0.04874060)
C = (-3.18588100, -0.00117882, 3.19083261)
LEAST_WEIGHT = 0.01  # of the largest


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
        turned = g * weight
        means = turned.mean(-1, keepdim=True), (turned * normalised).mean(-1, keepdim=True)
        leading = tuple(range(g.dim() - 1))
        return (
            (turned - means[0] - normalised * means[1]) * factor,
            (g * normalised).sum(leading) if ctx.needs_input_grad[1] else None,
            g.sum(leading) if ctx.needs_input_grad[2] else None,
            None,
        )


class MSLayerNorm(nn.LayerNorm):
    """A layer norm over the last axis that takes over another's weight and bias."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return _MSLayerNorm.apply(x, self.weight, self.bias, self.eps)


def with_low_memory_functions(model: nn.Module) -> nn.Module:
    """All GELUs and layer norms of the model replaced.

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
