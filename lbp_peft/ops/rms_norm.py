"""RMS norm that keeps its input in 8 bits.

With rstd = (mean(x^2) + eps)^(-1/2), x^ = x rstd, y = x^ (weight + shift), g = dLoss/dy and h = g (weight + shift),
over the channels of each token (arXiv 1910.07467),

    dx = rstd (h - x^ mean(h x^)),   dweight = sum of g x^

x is kept in groups of 64 channels, see [`lbp_peft.formats.in_groups`], and rstd in float32. The forward pass is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.in_groups import dequantize_groups
from ..transforms import backward_pass
from .checkpointing import empty, saved_tensors_are_discarded
from .kept import keep, keep_quantized
from .layer_state import to_save
from .once_differentiable import once_differentiable


def compressed_rms_norm(y: Tensor, x: Tensor, weight: Tensor | None, eps: float, shift: float = 0.0) -> Tensor:
    """The result of an RMS norm, whose backward pass reads 8 bits for each element of x.

    Args:
        y: The result, shape (..., C), computed without gradients; it is returned bit for bit.
        x: The input, shape (..., C); float32, bfloat16 or float16.
        weight: Shape (C,), or None.
        eps: Added to the mean square.
        shift: Added to the weight. Some models learn the weight minus 1.

    Double backward raises RuntimeError.
    """
    return _RMSNorm.apply(y, x, weight, eps, shift)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor | None, eps: float, shift: float) -> Tensor:
        ctx.shift, ctx.dtype = shift, x.dtype
        if saved_tensors_are_discarded():
            rstd = empty(x, (*x.shape[:-1], 1), torch.float32)
        else:
            rstd = keep((x.float().square().mean(-1, keepdim=True) + eps).rsqrt())
        ctx.save_for_backward(*keep_quantized(x), rstd, *to_save([t for t in (weight,) if t is not None]))
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        values, scales, rstd, *weights = ctx.saved_tensors
        _, needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        with backward_pass():
            g, normalised = grads[0].float(), dequantize_groups(values, scales, torch.float32) * rstd
            if needs_weight:
                (weight,) = weights
                grad_weight = (g * normalised).flatten(0, -2).sum(0).to(weight.dtype)
            if needs_x:
                h = g * (weights[0].float() + ctx.shift) if weights else g
                mean = (h * normalised).mean(-1, keepdim=True)
                grad_x = ((h - normalised * mean) * rstd).to(ctx.dtype)
        found = [grad_x, grad_weight]
        return None, *(once_differentiable(found, grads[0]) if second_order else found), None, None
