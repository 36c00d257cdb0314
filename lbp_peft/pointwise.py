"""The low-rank layer on images: a convolution with kernel 1 multiplies every pixel's channels by one matrix.

The mathematics is that of [`lbp_peft.lowrank`], with the pixels for tokens; only the channels come first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import BasisSet, TokenLayout
from .lowrank import once_differentiable
from .projection import Projection, projection


def low_rank_pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    for_weight: BasisSet | None = None,
    for_input: BasisSet | None = None,
) -> Tensor:
    """`F.conv2d` with kernel 1 and stride 1, bit for bit, whose backward pass goes through a small space.

    Args:
        x: Shape (N, C_in, H, W); (H, W) is the grid.
        weight: Shape (C_out, C_in, 1, 1).
        bias: Shape (C_out,). Its gradient is always exact.
        for_weight: Bases of the weight gradient; x is saved projected on them. None, or as many bases as pixels: exact.
        for_input: Bases of the input gradient. None, or as many bases as pixels: exact.

    Under autocast, the tensors are cast as `F.conv2d` casts them. Double backward raises RuntimeError.

    Returns:
        Shape (N, C_out, H, W).
    """
    tensors: list[Any] = [x, weight, bias]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    x, weight, bias = tensors
    layout = TokenLayout((x.shape[2], x.shape[3]))
    project_weight = projection(layout, for_weight, x.dtype, x.device)
    project_input = projection(layout, for_input, x.dtype, x.device)
    return _LowRankPointwise.apply(x, weight, bias, project_weight, project_input)


class _LowRankPointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, for_weight: Projection | None, for_input: Projection | None
    ) -> Tensor:
        return F.conv2d(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.for_weight, ctx.for_input = inputs
        kept = _rows(x, ctx.for_weight) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = _gradients(ctx, grads[0])
        return *(once_differentiable(gradients) if second_order else gradients), None, None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    kept, weight = ctx.saved_tensors
    for_weight, for_input = ctx.for_weight, ctx.for_input
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x: Any = None
    grad_weight: Any = None
    small: Any = None
    if needs_weight:
        small = _rows(grad, for_weight)
        grad_weight = (small.flatten(0, 1).t() @ kept.flatten(0, 1))[:, :, None, None]
    if needs_x:
        matrix = weight.flatten(1)
        if for_input is None:
            grad_x = F.conv2d(grad, matrix.t()[:, :, None, None])
        else:
            if small is None or for_weight is None or for_input.bases != for_weight.bases:
                small = _rows(grad, for_input)
            grad_x = for_input.lift_image(small @ matrix)
    return [grad_x, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None]


def _rows(x: Tensor, projection: Projection | None) -> Tensor:
    """(N, C, H, W) -> (N, k, C), or all pixels where there is no projection."""
    if projection is None:
        return x.flatten(2).transpose(1, 2)
    return projection.project_image(x)
