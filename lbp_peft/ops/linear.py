"""A linear layer with an exact forward pass and a low-rank backward pass (arXiv 2309.15275, section 3).

With P the projection of the L tokens onto k orthonormal rows and g = dLoss/dy, for y = x W^T + b:

    saved        x^ = P x              (N, k, C_in), instead of x; in bfloat16 where g W is in low precision
    backward     g^ = P g              (N, k, C_out)
                 dW = sum_n g^_n^T x^_n
                 dx = P^T (g^ W)       or exactly g W
                 db = sum of g over images and tokens

A low-rank update beside the weight (LoRA, arXiv 2106.09685), y += s (x A^T) B^T, uses the same projections:

                 dA = s sum_n (g^_n B)^T x^_n
                 dB = s sum_n g^_n^T (x^_n A^T)
                 dx = P^T (g^ W + s (g^ B) A)

Where that is faster, y and dx are each one product with the sum W + s B A, see [`lbp_peft.ops.summed_weight`]. The bits
of y are then not LoRA's own.

Where g is zero in all but the tokens before the grid, products are those of these tokens alone, see
[`lbp_peft.ops.leading_tokens`].
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import heuristics
from ..bases.grids import TokenLayout
from ..formats.products import FULL, Precision, precision_now, product, source_of_weight, weight_grad
from ..formats.registry import number_format
from ..formats.weight_cache import Origin
from ..projection import Projection
from ..transforms import backward_pass, in_dispatch_mode, in_forward_mode, in_transform, must_be_functional
from .autocast import cast_as_autocast_would
from .checkpointing import only_saved_tensors_matter
from .leading_tokens import leading_tokens_with_gradient
from .once_differentiable import once_differentiable
from .plan import BackwardPlan, InputProjection
from .saved_input import input_to_save
from .summed_weight import summed_weight, sums_weight, weight_in_backward
from .tokens import as_tokens, from_tokens, sum_of_tokens


@dataclass(frozen=True)
class Branch:
    """A low-rank update beside the weight, as LoRA's: y += scaling * ((x down^T) up^T + bias).

    Attributes:
        down: Shape (r, C_in).
        up: Shape (C_out, r).
        bias: Shape (C_out,), or None.
        scaling: A factor.
        x: The input of the branch, if it is not that of the layer itself: for instance the input after dropout.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    x: Tensor | None = None


@dataclass(frozen=True)
class _State:
    """Non-tensor state saved for backward."""

    plan: BackwardPlan
    weight_projection: Projection | None
    input_projection: InputProjection | None
    scalings: tuple[float, ...]
    # The dtype that the weight is cast to in each pass; None: it is used as it is.
    cast_weight: torch.dtype | None = None
    # Origin of the parameter that the weight is, or was cast from.
    source: Origin | None = None
    # Returns the tensor that x was cast from.
    source_of_x: Callable[[], Tensor | None] = lambda: None
    # Whether y is one product with the sum of the weight and the branches.
    sums_weight: bool = False


class _LowRankLinear(torch.autograd.Function):
    """Arguments: state, x, weight, bias, then x (or None), down, up and bias of each branch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: _State, x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Tensor | None) -> Tensor:
        dtype = weight.dtype if state.cast_weight is None else state.cast_weight
        if state.sums_weight:
            grouped = _grouped(branches, 4)
            factors = [factor for _, down, up, _ in grouped for factor in (down, up)]
            for (*_, shift), scaling in zip(grouped, state.scalings, strict=True):
                if shift is not None:
                    bias = shift * scaling if bias is None else bias + shift * scaling
            return F.linear(x, summed_weight(weight, factors, state.scalings, dtype), bias).detach()
        y = F.linear(x, weight.to(dtype), bias)
        # Selective checkpointing, a dispatch mode, keeps results of products and refuses changes in place.
        must_keep = in_transform() or in_dispatch_mode()
        for (own_x, down, up, shift), scaling in zip(_grouped(branches, 4), state.scalings, strict=True):
            update = F.linear(F.linear(x if own_x is None else own_x, down), up, shift)
            y = y + update * scaling if must_keep else y.add_(update.mul_(scaling))
        return y.detach()  # F.linear's result is a view of a matrix: autograd refuses to change those in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.state, x, weight, _, *branches = inputs
        ctx.weight_dtype = weight.dtype
        ctx.is_tracked = in_transform()
        _, needs_x, needs_weight, _, *needs = ctx.needs_input_grad
        saves_x, saved = needs_weight, []
        state: _State = ctx.state
        save = functools.partial(input_to_save, projection=state.weight_projection, plan=state.plan)
        for (own_x, down, up, _), needed in zip(_grouped(branches, 4), _grouped(needs, 4), strict=True):
            trained = needed[1] or needed[2]
            saves_x = saves_x or (trained and own_x is None)
            saved.append(save(own_x) if trained and own_x is not None else None)
            saved += (down, up) if trained or needs_x or needed[0] else (None, None)
        ctx.owns_x = [own_x is not None for own_x, *_ in _grouped(branches, 4)]
        ctx.save_for_backward(
            save(x, source=state.source_of_x()) if saves_x else None,
            weight if needs_x else None,
            *saved,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        return None, *(once_differentiable(gradients, grads[0], ctx.is_tracked) if second_order else gradients)


class _EagerLowRankLinear(_LowRankLinear):
    """The same outside of `torch.func` and `torch.compile`.

    PyTorch binds the arguments of a function with a `setup_context` to its signature in every call, which takes longer
    than all else that a call does in Python. Only transforms of `torch.func` need that method.
    """

    generate_vmap_rule = False
    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _LowRankLinear.forward(*inputs)
        _LowRankLinear.setup_context(ctx, inputs, output)
        return output


class _SavedFirst(torch.autograd.Function):
    """[`_LowRankLinear`] without values: it saves what that saves, and its output is only a place in the graph."""

    @staticmethod
    def forward(state: _State, x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Tensor | None) -> Tensor:
        return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])

    setup_context = staticmethod(_LowRankLinear.setup_context)
    backward = staticmethod(_LowRankLinear.backward)


class _WithValues(torch.autograd.Function):
    """The values, at a place in the graph."""

    @staticmethod
    def forward(place: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    saved_x, weight, *saved = ctx.saved_tensors
    state: _State = ctx.state
    plan = state.plan
    weight_projection: Any = state.weight_projection
    input_projection: Any = state.input_projection
    precision = precision_now(plan.precision)
    _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
    branches = list(zip(_grouped(saved, 3), _grouped(needs, 4), state.scalings, ctx.owns_x, strict=True))
    g = as_tokens(grad, plan.layout)
    leading = leading_tokens_with_gradient(g, plan)
    if leading is not None:
        weight_projection = input_projection = leading
        precision = FULL  # rounding W would take longer

    def restored(rows: Tensor) -> Tensor:
        """Those rows of a saved input that meet those of the projected gradient."""
        return plan.from_saved(rows if leading is None else leading.project_gradient(rows), grad.dtype)

    x_hat: Any = None if saved_x is None else restored(saved_x)
    g_hat: Any = None
    bias_grad: Any = None
    if needs_weight or any(needed[1] or needed[2] for _, needed, *_ in branches):
        g_hat = weight_projection.project_gradient(g) if weight_projection else g
    if needs_bias or any(needed[3] for _, needed, *_ in branches):
        bias_grad = sum_of_tokens(g, g_hat, weight_projection)
    gradients: list[Tensor | None] = [None, None, bias_grad if needs_bias else None]
    if needs_weight:
        gradients[1] = weight_grad(g_hat, x_hat).to(ctx.weight_dtype)
    for (own_x_hat, down, up), needed, scaling, _ in branches:
        z_hat = x_hat if own_x_hat is None else restored(own_x_hat)
        gradients += (
            None,
            weight_grad(g_hat @ up, z_hat) * scaling if needed[1] else None,
            weight_grad(g_hat, z_hat.to(down.dtype) @ down.t()) * scaling if needed[2] else None,
            bias_grad * scaling if needed[3] else None,
        )
    if not needs_x and not any(needed[0] for _, needed, *_ in branches):
        return gradients

    if input_projection is None:
        g_hat = g
    elif g_hat is None or weight_projection is None or input_projection.basis != weight_projection.basis:
        input_projection, g_hat = input_projection.fit(g)
    grad_x: Any = None
    if needs_x and _sums_weight_again(state, precision, g_hat, weight):
        factors = [factor for (_, down, up), *_ in branches for factor in (down, up)]
        weight = weight_in_backward(weight, factors, state.scalings, g_hat)
        gradients[0] = _lifted(product(g_hat, weight, precision), input_projection, grad, plan.layout)
        return gradients
    if needs_x:
        weight = weight if precision.name != "full" else weight_in_backward(weight, (), (), g_hat)
        grad_x = product(g_hat, weight, precision, state.source)
    for index, ((_, down, up), needed, scaling, owns_x) in enumerate(branches):
        if owns_x and needed[0]:
            gradients[3 + 4 * index] = _lifted((g_hat @ up * scaling) @ down, input_projection, grad, plan.layout)
        elif needs_x and not owns_x and in_transform():
            grad_x = grad_x + (g_hat @ up * scaling) @ down
        elif needs_x and not owns_x:
            grad_x = grad_x.flatten(0, 1).addmm_((g_hat @ up * scaling).flatten(0, 1), down).view_as(grad_x)
    gradients[0] = None if grad_x is None else _lifted(grad_x, input_projection, grad, plan.layout)
    return gradients


def _sums_weight_again(state: _State, precision: Precision, g_hat: Tensor, weight: Tensor) -> bool:
    """Whether the input gradient should be one product too: of the weight alone, a rounded copy may be kept."""
    if not state.sums_weight or number_format(precision.name).caches_weight(g_hat.device):
        return False
    num_images = heuristics.USUAL_BATCH if torch.compiler.is_compiling() else g_hat.shape[0]
    return heuristics.active().sum_weights(num_images * g_hat.shape[1], *weight.shape)


def _grouped(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _lifted(grad_x: Tensor, projection: Any, like: Tensor, layout: TokenLayout | None) -> Tensor:
    """The gradient of an input, lifted from its coefficients if it was projected, in the shape of the output's."""
    tokens = projection.lift(grad_x) if projection else grad_x
    return from_tokens(tokens, like.shape, layout)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plan: BackwardPlan,
    branches: Sequence[Branch] = (),
    parameter: Tensor | None = None,
    exact_forward: bool = False,
) -> Tensor:
    """`F.linear`, bit for bit, whose gradients are computed from projections as a plan says.

    Args:
        x: Shape (N, L, C_in), or (N, H, W, C_in) with L = H W, of any floating dtype.
        weight: Shape (C_out, C_in).
        bias: Shape (C_out,). Its gradient is always exact.
        plan: How the backward pass is run, see [`BackwardPlan`].
        branches: Low-rank updates beside the weight, added in turn. The gradients of `down` and `up` are computed from
            the same projections as that of the weight.
        parameter: The parameter that `weight` is a transpose or a cast of, if it is not a parameter itself. Its copy in
            int8 is kept for as long as the parameter does not change.
        exact_forward: Whether the output with branches is that of a sum of products, bit for bit, and never that of one
            product with the sum of the matrices.

    Under autocast, the tensors are cast as `F.linear` casts them. The reverse-mode transforms of `torch.func` (grad,
    vjp, jacrev) and vmap see the same gradients, but for the product with the weight, which is in full precision. In
    forward mode (jvp, jacfwd, hessian) everything is exact.

    Returns:
        Shape (N, ..., C_out).

    Raises:
        ValueError: the plan has bases but no layout.
        RuntimeError: in the backward pass, if it is differentiated again, or if the loss depends on padding.

    Example:
        >>> basis = BasisSet(r=10)
        >>> plan = BackwardPlan(TokenLayout((14, 14), num_prefix_tokens=1), basis, FixedBasis(basis))
        >>> y = low_rank_linear(x, weight, bias, plan=plan)
    """
    source = x
    if in_forward_mode():
        return _plain(x, weight, bias, branches)
    tensors: list[Any] = [x, weight, bias]
    for branch in branches:
        tensors += (branch.x, branch.down, branch.up, branch.bias)
    tensors, cast_weight = cast_as_autocast_would(weight, tensors)
    dtype = tensors[0].dtype
    state = _State(
        plan,
        plan.weight_projection(dtype, x.device),
        plan.input_projection(dtype, x.device),
        tuple(branch.scaling for branch in branches),
        cast_weight,
        None if must_be_functional() else source_of_weight(weight, parameter, plan.precision),
        (lambda: None) if must_be_functional() else weakref.ref(source),
        not exact_forward and _sums_weight(tensors, branches, plan),
    )
    if only_saved_tensors_matter():  # nothing after the last one that is saved is computed
        place = _SavedFirst.apply(state, *tensors)
        with torch.no_grad():
            values = _LowRankLinear.forward(state, *tensors)
        return _WithValues.apply(place, values)
    function = _LowRankLinear if must_be_functional() else _EagerLowRankLinear
    return function.apply(state, *tensors)


def _sums_weight(tensors: list[Any], branches: Sequence[Branch], plan: BackwardPlan) -> bool:
    x, weight, _, *others = tensors
    if not branches or any(branch.x is not None for branch in branches):
        return False
    num_rows = math.prod(x.shape[:-1])
    if torch.compiler.is_compiling() and plan.layout is not None:  # a graph has to serve batches of all sizes
        num_rows = heuristics.USUAL_BATCH * plan.layout.num_tokens
    factors = [factor for _, down, up, _ in _grouped(others, 4) for factor in (down, up)]
    return sums_weight(x, weight, factors, num_rows)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> Tensor:
    """The same layer, differentiated by PyTorch."""
    y = F.linear(x, weight, bias)
    for branch in branches:
        down = F.linear(x if branch.x is None else branch.x, branch.down)
        y = y + F.linear(down, branch.up, branch.bias) * branch.scaling
    return y
