"""The low-rank layer on images: a convolution with kernel 1 multiplies every pixel's channels by one matrix.

The mathematics is the same as in [`lbp_peft.ops.linear`], with pixels as tokens. The only difference is that the
channels come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases.grids import TokenLayout
from ..formats.products import FULL, precision_now, product, source_of_weight, weight_grad
from ..formats.weight_cache import Origin
from ..projection import Projection
from ..transforms import backward_pass, in_forward_mode, in_transform, tracked_by_transforms
from .autocast import cast_as_autocast_would
from .once_differentiable import once_differentiable
from .plan import BackwardPlan, InputProjection, Lifting
from .summed_weight import weight_in_backward


def low_rank_pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plan: BackwardPlan,
    parameter: Tensor | None = None,
) -> Tensor:
    """`F.conv2d` or `F.conv1d` with kernel 1 and stride 1, bit for bit, with gradients computed as a plan says.

    Args:
        x: Shape (N, C_in, H, W), or (N, C_in, L), of any floating dtype.
        weight: Shape (C_out, C_in, 1, 1) or (C_out, C_in, 1).
        bias: Shape (C_out,). Its gradient is always exact.
        plan: How the backward pass is run, see [`BackwardPlan`]. Its layout is only read for (N, C_in, L), since the
            layout of images is the grid (H, W).
        parameter: The parameter that `weight` is a cast of, if it is not a parameter itself.

    Autocast and transforms of `torch.func` are supported as by [`lbp_peft.low_rank_linear`].

    Returns:
        Shape (N, C_out, H, W) or (N, C_out, L).

    Raises:
        ValueError: x is (N, C_in, L), and the plan has bases but no layout.
        RuntimeError: in the backward pass, if it is differentiated again, or if the loss depends on padding.
    """
    if in_forward_mode():
        return _convolution(x)(x, weight, bias)
    source = source_of_weight(weight, parameter, plan.precision)
    x, weight, (bias,), cast_weight = cast_as_autocast_would(x, weight, [bias])
    if x.dim() == 4:
        plan = replace(plan, layout=TokenLayout((x.shape[2], x.shape[3])))
    state = _State(
        plan,
        plan.weight_projection(x.dtype, x.device),
        plan.input_projection(x.dtype, x.device),
        cast_weight,
        source,
    )
    return _LowRankPointwise.apply(state, x, weight, bias)


@dataclass(frozen=True)
class _State:
    """Non-tensor state saved for backward."""

    plan: BackwardPlan
    weight_projection: Projection | None
    input_projection: InputProjection | None
    cast_weight: torch.dtype | None
    source: Origin | None


class _LowRankPointwise(torch.autograd.Function):
    """Arguments: state, x, weight, bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: _State, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolution(x)(x, weight if state.cast_weight is None else weight.to(state.cast_weight), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        state: _State
        state, x, weight, _ = inputs
        _, needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.state = state
        ctx.weight_dtype = weight.dtype
        ctx.is_tracked = in_transform()
        with tracked_by_transforms():
            x_hat = _project(x, state.weight_projection) if needs_weight else None
        if x_hat is not None and state.weight_projection is not None:
            x_hat = x_hat.to(state.plan.saved_dtype(x_hat.dtype)) if in_transform() else state.plan.to_saved(x_hat)
        ctx.save_for_backward(x_hat, weight if needs_x else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        return None, *(once_differentiable(gradients, grads[0], ctx.is_tracked) if second_order else gradients)


def _gradients(ctx: Any, grad_y: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight and bias; None where none is needed."""
    state: _State = ctx.state
    saved_x, weight = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = g_hat = None
    if needs_weight:
        g_hat = _project(grad_y, state.weight_projection, is_gradient=True)
        matrix_grad = weight_grad(g_hat, state.plan.from_saved(saved_x, grad_y.dtype))
        grad_weight = matrix_grad.unflatten(1, (-1, *[1] * (grad_y.dim() - 2))).to(ctx.weight_dtype)
    if needs_x:
        grad_x = _input_grad(state, weight, grad_y, g_hat)
    if needs_bias:
        grad_bias = grad_y.sum((0, *range(2, grad_y.dim())))
    return [grad_x, grad_weight, grad_bias]


def _input_grad(state: _State, weight: Tensor, grad_y: Tensor, g_hat: Tensor | None) -> Tensor:
    """The gradient of x.

    Args:
        state: See [`_State`].
        weight: The weight.
        grad_y: The gradient of y.
        g_hat: Its projection for the weight gradient; None: it was not computed.
    """
    weight_projection, input_projection = state.weight_projection, state.input_projection
    precision = precision_now(state.plan.precision)
    if precision == FULL:
        weight = weight_in_backward(weight, (), (), grad_y)
    if input_projection is None and precision == FULL:
        return _convolution(grad_y)(grad_y, weight.to(grad_y.dtype).transpose(0, 1))
    lifting: Lifting | None
    if input_projection is None:
        lifting, g_hat = None, _project(grad_y, None)
    elif g_hat is not None and weight_projection and input_projection.basis == weight_projection.basis:
        lifting = weight_projection
    else:
        lifting, g_hat = input_projection.fit_image(grad_y)
    coefficients = product(g_hat, weight.flatten(1), precision, state.source)
    if lifting is not None and grad_y.dim() == 4:
        return lifting.lift_image(coefficients)
    tokens = coefficients if lifting is None else lifting.lift(coefficients)
    return tokens.transpose(1, 2).unflatten(2, grad_y.shape[2:])


def _convolution(x: Tensor) -> Callable[..., Tensor]:
    """`F.conv2d` for images, `F.conv1d` for sequences."""
    return F.conv2d if x.dim() == 4 else F.conv1d


def _project(x: Tensor, projection: Projection | None, is_gradient: bool = False) -> Tensor:
    """Project pixels: (N, C, H, W) or (N, C, L) -> (N, k, C), or (N, L, C) without a projection."""
    if x.dim() == 4 and projection is not None:
        return projection.project_image(x)
    tokens = x.flatten(2).transpose(1, 2)
    if projection is None:
        return tokens
    return projection.project_gradient(tokens) if is_gradient else projection.project(tokens)
