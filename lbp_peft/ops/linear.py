"""A linear layer that is exact forward and low-rank backward (arXiv 2309.15275, section 3).

With P the projection of the L tokens onto k orthonormal rows and g = dLoss/dy, for y = x W^T + b:

    saved        x^ = P x              (N, k, C_in), in place of x; in bfloat16 where g W is in low precision
    backward     g^ = P g              (N, k, C_out)
                 dW = sum_n g^_n^T x^_n
                 dx = P^T (g^ W)       or exactly g W
                 db = sum of g over images and tokens

A low-rank update beside the weight (LoRA, arXiv 2106.09685), y += s (x A^T) B^T, uses the same projections:

                 dA = s sum_n (g^_n B)^T x^_n
                 dB = s sum_n g^_n^T (x^_n A^T)
                 dx = P^T (g^ W + s (g^ B) A)
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.basis_set import BasisSet, TokenLayout
from ..formats.products import FULL, Origin, Precision, kept_dtype, origin, outer, product
from ..projection import Projection, projection
from ..transforms import backward_pass, in_forward_mode, in_transform, must_be_functional, tracked_by_transforms


class _OnceDifferentiable(torch.autograd.Function):
    """Identity whose own backward says why there is no second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "Low-rank backpropagation has no second derivative: its gradient is not that of any function. For double "
            "backward run the model in eval mode or inside lbp_peft.exact_backward(model), where gradients are exact."
        )


@dataclass(frozen=True)
class Branch:
    """A low-rank update beside the weight, as LoRA's: y += scaling * ((x down^T) up^T + bias).

    Attributes:
        down: Shape (r, C_in).
        up: Shape (C_out, r).
        bias: Shape (C_out,), or None.
        scaling: A factor.
        x: What the branch is applied to, where that is not the layer's input itself but, say, that after dropout.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    x: Tensor | None = None


@dataclass(frozen=True)
class _How:
    """All that is no tensor."""

    for_weight: Projection | None
    for_input: Projection | None
    scalings: tuple[float, ...]
    cast_weight: torch.dtype | None = None
    precision: Precision = FULL
    layout: TokenLayout | None = None
    # Of the parameter that the weight is, or was cast from.
    source: Origin | None = None
    # The tensor that x was cast from.
    source_of_x: Callable[[], Tensor | None] = lambda: None


class _LowRankLinear(torch.autograd.Function):
    """Arguments: how, x, weight, bias, then x (or None), down, up and bias of each branch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(how: _How, x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Tensor | None) -> Tensor:
        y = F.linear(x, weight if how.cast_weight is None else weight.to(how.cast_weight), bias)
        for (own_x, down, up, shift), scaling in zip(_grouped(branches, 4), how.scalings, strict=True):
            update = F.linear(F.linear(x if own_x is None else own_x, down), up, shift)
            y = y + update * scaling if in_transform() else y.add_(update.mul_(scaling))
        return y.detach()  # F.linear's result is a view of a matrix: autograd refuses to change those in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.how, x, weight, _, *branches = inputs
        ctx.weight_dtype = weight.dtype
        ctx.is_tracked = in_transform()
        _, needs_x, needs_weight, _, *needs = ctx.needs_input_grad
        keeps_x, saved = needs_weight, []
        how = ctx.how
        keep = functools.partial(rows_to_keep, projection=how.for_weight, precision=how.precision, layout=how.layout)
        for (own_x, down, up, _), needed in zip(_grouped(branches, 4), _grouped(needs, 4), strict=True):
            trained = needed[1] or needed[2]
            keeps_x = keeps_x or (trained and own_x is None)
            saved.append(keep(own_x) if trained and own_x is not None else None)
            saved += (down, up) if trained or needs_x or needed[0] else (None, None)
        ctx.owns_x = [own_x is not None for own_x, *_ in _grouped(branches, 4)]
        ctx.save_for_backward(
            keep(x, source=ctx.how.source_of_x()) if keeps_x else None,
            weight if needs_x else None,
            *saved,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        return None, *(once_differentiable(gradients, ctx.is_tracked) if second_order else gradients)


# PyTorch binds the arguments in each call, and would find out what there are each time: a third of its own part of it.
_LowRankLinear.forward.__signature__ = inspect.signature(_LowRankLinear.forward)  # type: ignore[attr-defined]


def once_differentiable(gradients: Iterable[Tensor | None], are_tracked: bool = False) -> list[Tensor | None]:
    """The gradients, which raise RuntimeError when they are differentiated in turn.

    Args:
        gradients: Of the inputs of an autograd function.
        are_tracked: Whether they require gradients already where they depend on anything that does, as within
            transforms of `torch.func`.
    """
    tracked = are_tracked or in_transform()
    return [d if d is None else _OnceDifferentiable.apply(d if tracked else d.requires_grad_()) for d in gradients]


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    x, weight, *saved = ctx.saved_tensors
    for_weight, for_input, layout = ctx.how.for_weight, ctx.how.for_input, ctx.how.layout
    _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
    branches = list(zip(_grouped(saved, 3), _grouped(needs, 4), ctx.how.scalings, ctx.owns_x, strict=True))
    tokens = as_tokens(grad, layout)
    small: Any = None
    total: Any = None
    if needs_weight or any(needed[1] or needed[2] for _, needed, *_ in branches):
        small = for_weight.project_gradient(tokens) if for_weight else tokens
    if needs_bias or any(needed[3] for _, needed, *_ in branches):
        total = sum_of_tokens(tokens, small, for_weight)
    gradients: list[Tensor | None] = [None, None, total if needs_bias else None]
    if needs_weight:
        gradients[1] = outer(small, x).to(ctx.weight_dtype)
    for (own_x, down, up), needed, scaling, _ in branches:
        z = x if own_x is None else own_x
        gradients += (
            None,
            outer(small @ up, z) * scaling if needed[1] else None,
            outer(small, z.to(down.dtype) @ down.t()) * scaling if needed[2] else None,
            total * scaling if needed[3] else None,
        )
    if not needs_x and not any(needed[0] for _, needed, *_ in branches):
        return gradients

    if for_input is None:
        small = tokens
    elif small is None or for_weight is None or for_input.bases != for_weight.bases:
        small = for_input.project_gradient(tokens)
    into_x: Any = product(small, weight, precision_now(ctx.how.precision), ctx.how.source) if needs_x else None
    for index, ((_, down, up), needed, scaling, owns_x) in enumerate(branches):
        if owns_x and needed[0]:
            gradients[3 + 4 * index] = _in_full((small @ up * scaling) @ down, for_input, grad, layout)
        elif needs_x and not owns_x and in_transform():
            into_x = into_x + (small @ up * scaling) @ down
        elif needs_x and not owns_x:
            into_x = into_x.flatten(0, 1).addmm_((small @ up * scaling).flatten(0, 1), down).view_as(into_x)
    gradients[0] = None if into_x is None else _in_full(into_x, for_input, grad, layout)
    return gradients


def _grouped(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _in_full(grad_x: Tensor, for_input: Projection | None, like: Tensor, layout: TokenLayout | None) -> Tensor:
    """The gradient of an input, lifted if it is in the small space, in the shape of the output's."""
    tokens = for_input.lift(grad_x) if for_input else grad_x
    return from_tokens(tokens, like.shape, layout)


def sum_of_tokens(tokens: Tensor, small: Tensor | None, projection: Projection | None) -> Tensor:
    """Over images and tokens. Where that is exact it is read off the projected tokens, k rows instead of L."""
    if small is not None and projection is not None and projection.keeps_sums and tokens.dtype.itemsize >= 4:
        return projection.sum(small)
    return tokens.sum(dim=(0, 1))


def precision_now(precision: Precision) -> Precision:
    """The same, but for transforms of `torch.func`: they cannot follow how products are rounded by parts."""
    return FULL if in_transform() else precision


class _Shared(threading.local):
    """What was projected last in the innermost [`shared_projections`] of this thread; None outside of any."""

    last: _Projected | None = None


@dataclass
class _Projected:
    """An input and what was kept of it. Weak references: neither tensor may live longer for our sake."""

    x: Callable[[], Tensor | None] = lambda: None
    small: Callable[[], Tensor | None] = lambda: None
    key: tuple = ()


_shared = _Shared()


@contextmanager
def shared_projections() -> Iterator[None]:
    """Within, layers that receive the same tensor one after the other share its projection: a query, a key and a value.

    To be entered for one forward pass of the module that owns them, which calls them with an input that it leaves
    alone. Whether a tensor is the same otherwise cannot be told: version counters miss what is written through `.data`
    or NumPy. Within another such block and in other threads, nothing is shared with it.
    """
    outer, _shared.last = _shared.last, _Projected()
    try:
        yield
    finally:
        _shared.last = outer


def rows_to_keep(
    x: Tensor,
    projection: Projection | None,
    precision: Precision = FULL,
    source: Tensor | None = None,
    layout: TokenLayout | None = None,
) -> Tensor:
    """What is kept of x, cast from a source, for the gradient of a weight."""
    if projection is None:
        return as_tokens(x, layout)
    if in_transform():
        with tracked_by_transforms():
            return projection.project(as_tokens(x, layout)).to(kept_dtype(x.dtype, FULL))
    dtype = kept_dtype(x.dtype, precision)
    source, last = x if source is None else source, _shared.last
    # The compiler finds the common expression by itself. Inference tensors have no version counter, and those of other
    # classes, as a tracer's, no address.
    if last is None or must_be_functional() or source.is_inference() or type(source) is not Tensor:
        return projection.project(as_tokens(x, layout)).to(dtype)
    is_the_same = source._version, source.data_ptr(), source.shape, source.stride()
    key = (*is_the_same, x.dtype, dtype, projection.layout, projection.bases, id(projection.padding))
    if last.x() is source and last.key == key and (small := last.small()) is not None:
        return small
    small = projection.project(as_tokens(x, layout)).to(dtype)
    last.x, last.small, last.key = weakref.ref(source), weakref.ref(small), key
    return small


def as_tokens(x: Tensor, layout: TokenLayout | None = None) -> Tensor:
    """(N, ..., C) -> (N, L, C); with a layout, its axes are those of the tokens, and packed images come apart."""
    if layout is None or (layout.axes is None and layout.packed == 1):
        return x if x.dim() == 3 else x.flatten(1, -2)
    order = _images_first(x.dim() - 1, layout)
    return x.permute(*order, -1).reshape(-1, layout.num_tokens, x.shape[-1])


def from_tokens(tokens: Tensor, shape: torch.Size, layout: TokenLayout | None = None) -> Tensor:
    """The reverse of [`as_tokens`]: (N, L, C) -> `shape` but for its last axis, which may be another C."""
    if layout is None or layout.axes is None:
        return tokens.reshape(*shape[:-1], tokens.shape[-1])
    order = _images_first(len(shape) - 1, layout)
    ordered = tokens.reshape(*(shape[axis] for axis in order), tokens.shape[-1])
    return ordered.permute(*(order.index(axis) for axis in range(len(order))), -1)


def _images_first(num_axes: int, layout: TokenLayout) -> list[int]:
    axes = tuple(range(1, num_axes)) if layout.axes is None else layout.axes
    return [*(axis for axis in range(num_axes) if axis not in axes), *axes]


def cast_as_autocast_would(weight: Tensor, tensors: list[Any]) -> tuple[list[Any], torch.dtype | None]:
    """The tensors, one of which is the weight, and what the weight has still to be cast to in each pass.

    A parameter's copy would be kept from the forward pass to the backward pass, and is as large as many inputs.
    """
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return tensors, None
    dtype = torch.get_autocast_dtype(device)
    later = isinstance(weight, nn.Parameter) and weight.dtype not in (dtype, torch.float64)

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 or (later and t is weight) else t.to(dtype)

    return [cast(t) for t in tensors], dtype if later else None


def source_of_weight(weight: Tensor, parameter: Tensor | None, precision: Precision) -> Origin | None:
    """Of the parameter that a weight is, or is a cast of; None where nothing is kept of it."""
    if precision.name == "full" or torch.compiler.is_compiling():
        return None
    return origin(weight if parameter is None else parameter)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: TokenLayout | None,
    for_weight: BasisSet | None = None,
    for_input: BasisSet | None = None,
    branches: Sequence[Branch] = (),
    padding: Tensor | None = None,
    precision: Precision = FULL,
    parameter: Tensor | None = None,
) -> Tensor:
    """`F.linear`, bit for bit, whose backward pass goes through a small space.

    Args:
        x: Shape (N, L, C_in), or (N, H, W, C_in) with L = H W.
        weight: Shape (C_out, C_in).
        bias: Shape (C_out,). Its gradient is always exact.
        layout: Where the L tokens lie. None will do where no bases are given.
        for_weight: Bases of the weight gradients; x is saved projected on them. None, or as many bases as tokens:
            exact.
        for_input: Bases of the input gradient. None, or as many bases as tokens: exact.
        branches: Low-rank updates beside the weight, added in turn. The gradients of `down` and `up` come from the
            same projections.
        padding: Shape (N, L), True for tokens that are only padding: nothing of them enters the gradients of others.
        precision: Of the product of gradient and weight in the input gradient; if it is low, the factors of the weight
            gradient are in bfloat16.
        parameter: The one that `weight` is a transpose or a cast of, where it is none itself. A copy of it in few bits
            is kept for as long as it stays the same.

    Under autocast, the tensors are cast as `F.linear` casts them. Double backward raises RuntimeError, and so does a
    loss that depends on padding. The transforms of `torch.func` that go backward (grad, vjp, jacrev), and vmap, see the
    same gradients, but for the product with the weight, which is in full precision. In forward mode (jvp, jacfwd,
    hessian) everything is exact.

    Returns:
        Shape (N, ..., C_out).
    """
    source = x
    if in_forward_mode():
        return _plain(x, weight, bias, branches)
    tensors: list[Any] = [x, weight, bias]
    for branch in branches:
        tensors += (branch.x, branch.down, branch.up, branch.bias)
    tensors, cast_weight = cast_as_autocast_would(weight, tensors)
    dtype = tensors[0].dtype
    how = _How(
        projection(layout, for_weight, dtype, x.device, padding),
        projection(layout, for_input, dtype, x.device, padding),
        tuple(branch.scaling for branch in branches),
        cast_weight,
        precision,
        layout,
        *(
            (None, lambda: None)
            if must_be_functional()
            else (source_of_weight(weight, parameter, precision), weakref.ref(source))
        ),
    )
    return _LowRankLinear.apply(how, *tensors)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> Tensor:
    """The same, left to PyTorch to differentiate."""
    y = F.linear(x, weight, bias)
    for branch in branches:
        down = F.linear(x if branch.x is None else branch.x, branch.down)
        y = y + F.linear(down, branch.up, branch.bias) * branch.scaling
    return y
