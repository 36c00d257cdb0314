"""LoRA in which each layer multiplies once, by the sum of its matrices, after RunLoRA (arXiv 2312.03415).

    y = x (W + s B A)^T      dx = g (W + s B A)      dA = s (g B)^T x      dB = s g^T (x A^T)

The sum is computed again in each pass, so that nothing is kept but the input.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class _OneProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(weight, up, down, alpha=scaling).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        (grad,), scaling = grads, ctx.scaling
        g, tokens = grad.flatten(0, -2), x.flatten(0, -2)
        of_down = scaling * (g @ up.to(g.dtype)).t() @ tokens
        of_up = scaling * g.t() @ (tokens @ down.to(g.dtype).t())
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (g @ torch.addmm(weight, up, down, alpha=scaling).to(g.dtype)).view_as(x)
        return of_x, None, None, of_down.to(down.dtype), of_up.to(up.dtype), None


def in_one_product(model: nn.Module) -> nn.Module:
    """Have the LoRA layers of a model, with one adapter and no dropout, compute one product while they are trained."""

    def forward(self: Any, x: Tensor) -> Tensor:
        (name,) = self.active_adapters
        base = self.base_layer
        bias = base.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            return _OneProduct.apply(x, base.weight, bias, down, up, self.scaling[name])

    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = types.MethodType(forward, module)
    return model
