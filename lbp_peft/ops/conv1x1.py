"""The low-rank layer on images: a convolution with kernel 1 multiplies every pixel's channels by one matrix.

The mathematics is that of [`lbp_peft.ops.linear`], with the pixels for tokens; only the channels come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases.basis_set import BasisSet, TokenLayout
from ..formats.products import FULL, Origin, Precision, kept_dtype, outer, product
from ..projection import Projection, projection
from ..transforms import backward_pass, in_forward_mode, in_transform, tracked_by_transforms
from .linear import cast_as_autocast_would, once_differentiable, precision_now, source_of_weight


def low_rank_pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    for_weight: BasisSet | None = None,
    for_input: BasisSet | None = None,
    layout: TokenLayout | None = None,
    padding: Tensor | None = None,
    precision: Precision = FULL,
    parameter: Tensor | None = None,
) -> Tensor:
    """`F.conv2d` or `F.conv1d` with kernel 1 and stride 1, bit for bit, whose backward pass goes through a small space.

    Args:
        x: Shape (N, C_in, H, W), where (H, W) is the grid, or (N, C_in, L).
        weight: Shape (C_out, C_in, 1, 1) or (C_out, C_in, 1).
        bias: Shape (C_out,). Its gradient is always exact.
        for_weight: Bases of the weight gradient; x is saved projected on them. None, or as many bases as pixels: exact.
        for_input: Bases of the input gradient. None, or as many bases as pixels: exact.
        layout: Where the L tokens of (N, C_in, L) lie.
        padding: Shape (N, L), True for tokens that are only padding.
        precision: Of the product of gradient and weight in the input gradient; if it is low, the factors of the weight
            gradient are in bfloat16.
        parameter: The one that `weight` is a cast of, where it is none itself.

    Under autocast, the tensors are cast as the convolutions cast them. Double backward raises RuntimeError. Transforms
    of `torch.func` are supported as by [`lbp_peft.low_rank_linear`].

    Returns:
        Shape (N, C_out, H, W) or (N, C_out, L).
    """
    if in_forward_mode():
        return _convolution(x)(x, weight, bias)
    source = source_of_weight(weight, parameter, precision)
    (x, weight, bias), cast_weight = cast_as_autocast_would(weight, [x, weight, bias])
    if x.dim() == 4:
        layout = TokenLayout((x.shape[2], x.shape[3]))
    project_weight = projection(layout, for_weight, x.dtype, x.device, padding)
    project_input = projection(layout, for_input, x.dtype, x.device, padding)
    return _LowRankPointwise.apply(x, weight, bias, _How(project_weight, project_input, cast_weight, precision, source))


@dataclass(frozen=True)
class _How:
    """All that is no tensor."""

    for_weight: Projection | None
    for_input: Projection | None
    cast_weight: torch.dtype | None
    precision: Precision
    source: Origin | None


class _LowRankPointwise(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        return _convolution(x)(x, weight if how.cast_weight is None else weight.to(how.cast_weight), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.how = inputs
        ctx.weight_dtype = weight.dtype
        ctx.is_tracked = in_transform()
        with tracked_by_transforms():
            kept = _rows(x, ctx.how.for_weight) if ctx.needs_input_grad[1] else None
        if kept is not None and ctx.how.for_weight is not None:
            kept = kept.to(kept_dtype(kept.dtype, ctx.how.precision))
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        return *(once_differentiable(gradients, ctx.is_tracked) if second_order else gradients), None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    kept, weight = ctx.saved_tensors
    for_weight, for_input = ctx.how.for_weight, ctx.how.for_input
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    precision = precision_now(ctx.how.precision)
    grad_x: Any = None
    grad_weight: Any = None
    small: Any = None
    if needs_weight:
        small = _rows(grad, for_weight, is_gradient=True)
        grad_weight = outer(small, kept).unflatten(1, (-1, *[1] * (grad.dim() - 2))).to(ctx.weight_dtype)
    if needs_x:
        matrix = weight.flatten(1)
        if for_input is None and precision != FULL:
            rows = product(_rows(grad, None), matrix, precision, ctx.how.source)
            grad_x = rows.transpose(1, 2).unflatten(2, grad.shape[2:])
        elif for_input is None:
            grad_x = _convolution(grad)(grad, weight.to(grad.dtype).transpose(0, 1))
        else:
            if small is None or for_weight is None or for_input.bases != for_weight.bases:
                small = _rows(grad, for_input, is_gradient=True)
            small = product(small, matrix, precision, ctx.how.source)
            grad_x = for_input.lift_image(small) if grad.dim() == 4 else for_input.lift(small).transpose(1, 2)
    return [grad_x, grad_weight, grad.sum((0, *range(2, grad.dim()))) if needs_bias else None]


def _convolution(x: Tensor) -> Any:
    return F.conv2d if x.dim() == 4 else F.conv1d


def _rows(x: Tensor, projection: Projection | None, is_gradient: bool = False) -> Tensor:
    """(N, C, H, W) or (N, C, L) -> (N, k, C), or all pixels where there is no projection."""
    if x.dim() == 4 and projection is not None:
        return projection.project_image(x)
    tokens = x.flatten(2).transpose(1, 2)
    if projection is None:
        return tokens
    return projection.project_gradient(tokens) if is_gradient else projection.project(tokens)
