"""A linear layer that is exact forward and low-rank backward (arXiv 2309.15275, section 3).

With P the projection of the L tokens onto k orthonormal rows and g = dLoss/dy, for y = x W^T + b:

    saved        x^ = P x              (N, k, C_in), in place of x
    backward     g^ = P g              (N, k, C_out)
                 dW = sum_n g^_n^T x^_n
                 dx = P^T (g^ W)       or exactly g W
                 db = sum of g over images and tokens
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import BasisSet, TokenLayout
from .projection import Projection, projection


class _OnceDifferentiable(torch.autograd.Function):
    """Identity whose own backward says why there is no second derivative."""

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "Low-rank backpropagation has no second derivative: its gradient is not that of any function. For double "
            "backward run the model in eval mode or inside lbp_peft.exact_backward(model), where gradients are exact."
        )


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, for_weight: Projection | None, for_input: Projection | None
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.for_weight, ctx.for_input = inputs
        saved_x = None
        if ctx.needs_input_grad[1]:
            saved_x = _projected(x, ctx.for_weight) if ctx.for_weight else _as_tokens(x)
        ctx.save_for_backward(saved_x, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        second_order = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = _gradients(ctx, grad)
        if second_order:
            gradients = tuple(d if d is None else _OnceDifferentiable.apply(d.requires_grad_()) for d in gradients)
        return (*gradients, None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved_x, weight = ctx.saved_tensors
    for_weight, for_input = ctx.for_weight, ctx.for_input
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    tokens = _as_tokens(grad)
    grad_x = grad_weight = grad_bias = small = None
    if needs_weight:
        small = for_weight.project(tokens) if for_weight else tokens
        grad_weight = small.flatten(0, 1).t() @ saved_x.flatten(0, 1)
    if needs_bias:
        grad_bias = _sum(tokens, small, for_weight)
    if needs_x:
        if for_input is None:
            grad_x = grad @ weight
        else:
            if small is None or for_weight is None or for_input.bases != for_weight.bases:
                small = for_input.project(tokens)
            grad_x = for_input.lift(small @ weight).reshape(*grad.shape[:-1], -1)
    return grad_x, grad_weight, grad_bias


def _sum(tokens: Tensor, small: Tensor | None, projection: Projection | None) -> Tensor:
    """Over images and tokens. Where that is exact it is read off the projected tokens, k rows instead of L."""
    if small is not None and projection is not None and projection.keeps_sums and tokens.dtype.itemsize >= 4:
        return projection.sum(small)
    return tokens.sum(dim=(0, 1))


class _LastProjected(threading.local):
    """What was projected last. A query, a key and a value layer receive the same tensor: one projection serves all."""

    x: Callable[[], Tensor | None] = staticmethod(lambda: None)
    small: Callable[[], Tensor | None] = staticmethod(lambda: None)
    key: tuple = ()


_last = _LastProjected()


def _projected(x: Tensor, projection: Projection) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler finds the common expression by itself
        return projection.project(_as_tokens(x))
    key = (x._version, projection.layout, projection.bases)
    if _last.x() is x and _last.key == key and (small := _last.small()) is not None:
        return small
    small = projection.project(_as_tokens(x))
    # Weak references: neither tensor may live longer for our sake.
    _last.x, _last.small, _last.key = weakref.ref(x), weakref.ref(small), key
    return small


def _as_tokens(x: Tensor) -> Tensor:
    """(N, ..., C) -> (N, L, C)."""
    return x if x.dim() == 3 else x.flatten(1, -2)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: TokenLayout,
    for_weight: BasisSet | None = None,
    for_input: BasisSet | None = None,
) -> Tensor:
    """`F.linear`, bit for bit, whose backward pass goes through a small space.

    Args:
        x: Shape (N, L, C_in), or (N, H, W, C_in) with L = H W.
        weight: Shape (C_out, C_in).
        bias: Shape (C_out,). Its gradient is always exact.
        layout: Where the L tokens lie.
        for_weight: Bases of the weight gradient; x is saved projected on them. None, or as many bases as tokens: exact.
        for_input: Bases of the input gradient. None, or as many bases as tokens: exact.

    Under autocast, the tensors are cast as `F.linear` casts them. Double backward raises RuntimeError.

    Returns:
        Shape (N, ..., C_out).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = bias if bias is None else _cast(bias, dtype)
    project_weight = projection(layout, for_weight, x.dtype, x.device)
    project_input = projection(layout, for_input, x.dtype, x.device)
    return _LowRankLinear.apply(x, weight, bias, project_weight, project_input)
