"""Layer norm that saves its normalised input in 8 bits.

With x^ = (x - mean(x)) rstd, g = dLoss/dy and h = g * weight, over the channels of each token,

    dx = rstd (h - mean(h) - x^ mean(h x^)),   dweight = sum of g x^,   dbias = sum of g

x^ is saved in groups of 64 channels, see [`lbp_peft.formats.in_groups`], and rstd in float32. The forward pass is
exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.in_groups import dequantize_groups
from ..transforms import backward_pass
from .kept import keep, keep_quantized
from .layer_state import to_save
from .once_differentiable import once_differentiable


def compressed_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm(x, (C,), weight, bias, eps)`, bit for bit, which saves 8 bits for each element of x.

    Args:
        x: Shape (..., C), float32 or the dtype of the weight. Autocast is not applied.
        weight: Shape (C,), or None. Its gradient is computed from the rounded x^.
        bias: Shape (C,), or None. Its gradient is exact.
        eps: Added to the variance.

    Returns:
        The shape and dtype of x.

    Raises:
        RuntimeError: in the backward pass, if it is differentiated again.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
        kept = (*keep_quantized(x, lambda _: mean), keep(rstd))
        ctx.save_for_backward(*kept, *to_save([t for t in (weight,) if t is not None]))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        values, scales, rstd, *weights = ctx.saved_tensors
        weight = weights[0] if weights else None
        grad = grads[0]
        with backward_pass():
            centred = dequantize_groups(values, scales, grad.dtype)
            # The kernel needs some tensor in the bias's place to compute its gradient, and does not read it.
            gradients = torch.ops.aten.native_layer_norm_backward(
                grad, centred, (grad.shape[-1],), torch.zeros_like(rstd), rstd, weight, weight, ctx.needs_input_grad[:3]
            )
        return *(once_differentiable(gradients, grad) if second_order else gradients), None
