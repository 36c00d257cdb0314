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

Where it is faster, y and dx are each computed in one product with the sum W + s B A, see
[`lbp_peft.ops.summed_weight`]. The bits of y then differ from LoRA's own.

Where g is zero in all tokens but those before the grid, only these tokens are multiplied, see
[`lbp_peft.ops.leading_tokens`].
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from .branches import Branch, BranchNeeds, BranchTensors, SavedBranch, factors, group
from .checkpointing import only_saved_tensors_matter
from .leading_tokens import LeadingTokens, leading_tokens_with_gradient
from .once_differentiable import once_differentiable
from .plan import BackwardPlan, InputProjection, Lifting
from .saved_input import input_to_save
from .summed_weight import should_sum, summed_weight, weight_in_backward
from .tokens import as_tokens, from_tokens, sum_of_tokens


@dataclass(frozen=True)
class _State:
    """Non-tensor state saved for backward.

    Attributes:
        plan: The plan of the backward pass.
        weight_projection: The projection for the gradients of weights; None: they are exact.
        input_projection: The projection for the gradients of inputs; None: g is multiplied as it is.
        scalings: The factor of each branch.
        cast_weight: The dtype that the weight is cast to in each pass; None: it is used as it is.
        source: The origin of the parameter that the weight is, or was cast from.
        source_of_x: Returns the tensor that x was cast from.
        sums_weight: Whether y is one product with the sum of the weight and the branches.
    """

    plan: BackwardPlan
    weight_projection: Projection | None
    input_projection: InputProjection | None
    scalings: tuple[float, ...]
    cast_weight: torch.dtype | None = None
    source: Origin | None = None
    source_of_x: Callable[[], Tensor | None] = lambda: None
    sums_weight: bool = False


class _Needs(NamedTuple):
    """Which arguments of [`_LowRankLinear`] need a gradient."""

    x: bool
    weight: bool
    bias: bool
    branches: list[BranchNeeds]


class _LowRankLinear(torch.autograd.Function):
    """Arguments: state, x, weight, bias, then the tensors of each branch in the order of [`BranchTensors`]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        state: _State, x: Tensor, weight: Tensor, bias: Tensor | None, *branch_tensors: Tensor | None
    ) -> Tensor:
        dtype = weight.dtype if state.cast_weight is None else state.cast_weight
        branches = group(branch_tensors, BranchTensors)
        if state.sums_weight:
            for branch, scaling in zip(branches, state.scalings, strict=True):
                if branch.bias is not None:
                    bias = branch.bias * scaling if bias is None else bias + branch.bias * scaling
            return F.linear(x, summed_weight(weight, factors(branches), state.scalings, dtype), bias).detach()
        y = F.linear(x, weight.to(dtype), bias)
        # Selective checkpointing, a dispatch mode, keeps results of products and raises if they are changed in place.
        must_be_out_of_place = in_transform() or in_dispatch_mode()
        for branch, scaling in zip(branches, state.scalings, strict=True):
            update = F.linear(F.linear(x if branch.x is None else branch.x, branch.down), branch.up, branch.bias)
            y = y + update * scaling if must_be_out_of_place else y.add_(update.mul_(scaling))
        return y.detach()  # F.linear's result is a view of a matrix: autograd refuses to change those in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        state: _State
        state, x, weight, _, *branch_tensors = inputs
        branches, needs = group(branch_tensors, BranchTensors), _needs_of(ctx)
        ctx.state = state
        ctx.weight_dtype = weight.dtype
        ctx.is_tracked = in_transform()
        ctx.have_own_x = [branch.x is not None for branch in branches]
        save = functools.partial(input_to_save, projection=state.weight_projection, plan=state.plan)
        saves_x = needs.weight
        saved: list[Tensor | None] = []
        for branch, of_branch in zip(branches, needs.branches, strict=True):
            trains_factors = of_branch.down or of_branch.up
            saves_x = saves_x or (trains_factors and branch.x is None)
            saved.append(save(branch.x) if trains_factors and branch.x is not None else None)
            saved += (branch.down, branch.up) if trains_factors or of_branch.x or needs.x else (None, None)
        ctx.save_for_backward(
            save(x, source=state.source_of_x()) if saves_x else None,
            weight if needs.x else None,
            *saved,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        return None, *(once_differentiable(gradients, grads[0], ctx.is_tracked) if second_order else gradients)


class _EagerLowRankLinear(_LowRankLinear):
    """[`_LowRankLinear`] outside of `torch.func` and `torch.compile`.

    PyTorch binds the arguments of a function with a `setup_context` to its signature in every call, which takes longer
    than everything else that a call does in Python. Only transforms of `torch.func` need that method.
    """

    generate_vmap_rule = False
    setup_context = torch.autograd.Function.setup_context  # PyTorch's default, with which `forward` gets ctx

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _LowRankLinear.forward(*inputs)
        _LowRankLinear.setup_context(ctx, inputs, output)
        return output


class _LowRankLinearWithoutProduct(torch.autograd.Function):
    """[`_LowRankLinear`] without its product: it saves the same tensors, and its output has a shape but no values.

    [`_ValuesForOutput`] then gives the output its values. So a layer saves all its tensors before it multiplies, and a
    gradient checkpoint that is run again, which stops after the last tensor that is saved, leaves out the last product.
    """

    @staticmethod
    def forward(
        state: _State, x: Tensor, weight: Tensor, bias: Tensor | None, *branch_tensors: Tensor | None
    ) -> Tensor:
        return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])

    setup_context = staticmethod(_LowRankLinear.setup_context)
    backward = staticmethod(_LowRankLinear.backward)


class _ValuesForOutput(torch.autograd.Function):
    """Returns the values for the output of [`_LowRankLinearWithoutProduct`], and passes the gradient on to it."""

    @staticmethod
    def forward(placeholder: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def _needs_of(ctx: Any) -> _Needs:
    """Which arguments need a gradient, according to the context that autograd keeps of a call."""
    _, x, weight, bias, *branch_tensors = ctx.needs_input_grad
    return _Needs(x, weight, bias, group(branch_tensors, BranchNeeds))


def _gradients(ctx: Any, grad_y: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight, bias and the tensors of each branch, in this order; None where none is needed."""
    state: _State = ctx.state
    plan, needs = state.plan, _needs_of(ctx)
    saved_x, weight, *saved_branches = ctx.saved_tensors
    branches = group(saved_branches, SavedBranch)
    weight_projection: Projection | LeadingTokens | None = state.weight_projection
    input_projection: InputProjection | LeadingTokens | None = state.input_projection
    precision = precision_now(plan.precision)
    g = as_tokens(grad_y, plan.layout)
    leading = leading_tokens_with_gradient(g, plan)
    if leading is not None:
        weight_projection = input_projection = leading
        precision = FULL  # rounding W would take longer

    def load(rows: Tensor) -> Tensor:
        """Read a saved input, in the dtype of products, at the rows that the projected gradient has."""
        return plan.from_saved(rows if leading is None else leading.project_gradient(rows), grad_y.dtype)

    g_hat: Tensor | None = None
    if needs.weight or any(of_branch.down or of_branch.up for of_branch in needs.branches):
        g_hat = weight_projection.project_gradient(g) if weight_projection else g
    x_hat = None if saved_x is None else load(saved_x)
    grad_weight: Tensor | None = None
    if needs.weight:
        assert g_hat is not None and x_hat is not None  # since x is saved if the weight is trained
        grad_weight = weight_grad(g_hat, x_hat).to(ctx.weight_dtype)
    sum_of_g: Tensor | None = None
    if needs.bias or any(of_branch.bias for of_branch in needs.branches):
        sum_of_g = sum_of_tokens(g, g_hat, weight_projection)
    branch_grads: list[list[Tensor | None]] = []
    for branch, of_branch, scaling in zip(branches, needs.branches, state.scalings, strict=True):
        z_hat = x_hat if branch.x_hat is None else load(branch.x_hat)
        factor_grads = _factor_grads(g_hat, z_hat, branch, of_branch, scaling)
        branch_grads.append([*factor_grads, sum_of_g * scaling if sum_of_g is not None and of_branch.bias else None])

    grad_x: Tensor | None = None
    own_x_grads: list[Tensor | None] = [None] * len(branches)
    if needs.x or any(of_branch.x for of_branch in needs.branches):
        lifting: Lifting | LeadingTokens | None
        if input_projection is None:
            lifting, multiplied = None, g
        elif g_hat is None or weight_projection is None or input_projection.basis != weight_projection.basis:
            lifting, multiplied = input_projection.fit(g)
        else:
            lifting, multiplied = weight_projection, g_hat  # g has been projected on the same basis already
        x_coefficients, own_x_coefficients = _input_coefficients(
            state, needs, branches, ctx.have_own_x, multiplied=multiplied, weight=weight, precision=precision
        )
        own_x_grads = [_lift(rows, lifting, grad_y, plan.layout) for rows in own_x_coefficients]
        grad_x = _lift(x_coefficients, lifting, grad_y, plan.layout)

    gradients = [grad_x, grad_weight, sum_of_g if needs.bias else None]
    for own_x_grad, of_parameters in zip(own_x_grads, branch_grads, strict=True):
        gradients += (own_x_grad, *of_parameters)
    return gradients


def _factor_grads(
    g_hat: Tensor | None, z_hat: Tensor | None, branch: SavedBranch, needs: BranchNeeds, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a branch's factors, dA = s (g^ B)^T z^ and dB = s g^^T (z^ A^T); None where none is needed.

    Args:
        g_hat: The projected gradient of the outputs, shape (N, k, C_out); None only if no factor is trained.
        z_hat: The projected input of the branch, shape (N, k, C_in); None only if no factor is trained.
        branch: The factors A and B.
        needs: Which of them need a gradient.
        scaling: s.
    """
    if not (needs.down or needs.up):
        return None, None
    assert g_hat is not None and z_hat is not None
    down, up = branch.down, branch.up
    grad_down = weight_grad(g_hat @ up, z_hat) * scaling if needs.down else None
    grad_up = weight_grad(g_hat, z_hat.to(down.dtype) @ down.t()) * scaling if needs.up else None
    return grad_down, grad_up


def _input_coefficients(
    state: _State,
    needs: _Needs,
    branches: list[SavedBranch],
    have_own_x: list[bool],
    *,
    multiplied: Tensor,
    weight: Tensor,
    precision: Precision,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of each branch's own input before they are lifted; None where no gradient is needed.

    They are g^ W and s (g^ B) A, of shape (N, k, C_in), computed from `multiplied`: g^, the coefficients of g, or g
    itself if the input gradient is not low-rank; shape (N, k, C_out).
    """
    if needs.x and _should_sum_in_backward(state, precision, multiplied, weight):  # no branch has an input of its own
        summed = weight_in_backward(weight, factors(branches), state.scalings, multiplied)
        return product(multiplied, summed, precision), [None] * len(branches)
    x_coefficients: Tensor | None = None
    if needs.x:
        # A product in full precision casts W to the dtype of g first; a compiled graph must not keep that cast.
        weight = weight if precision.name != "full" else weight_in_backward(weight, (), (), multiplied)
        x_coefficients = product(multiplied, weight, precision, state.source)
    own_x_coefficients: list[Tensor | None] = []
    for branch, of_branch, scaling, has_own_x in zip(branches, needs.branches, state.scalings, have_own_x, strict=True):
        own_x_coefficients.append(
            (multiplied @ branch.up * scaling) @ branch.down if has_own_x and of_branch.x else None
        )
        if has_own_x or x_coefficients is None:
            continue
        if in_transform():
            x_coefficients = x_coefficients + (multiplied @ branch.up * scaling) @ branch.down
        else:
            through_up = (multiplied @ branch.up * scaling).flatten(0, 1)
            x_coefficients = x_coefficients.flatten(0, 1).addmm_(through_up, branch.down).view_as(x_coefficients)
    return x_coefficients, own_x_coefficients


def _should_sum_in_backward(state: _State, precision: Precision, multiplied: Tensor, weight: Tensor) -> bool:
    """Whether the input gradient is one product too. It is not if a quantized copy of the weight alone is kept."""
    if not state.sums_weight or number_format(precision.name).caches_weight(multiplied.device):
        return False
    num_images = heuristics.USUAL_BATCH if torch.compiler.is_compiling() else multiplied.shape[0]
    return heuristics.active().sum_weights(num_images * multiplied.shape[1], *weight.shape)


def _lift(
    coefficients: Tensor | None,
    lifting: Lifting | LeadingTokens | None,
    grad_y: Tensor,
    layout: TokenLayout | None,
) -> Tensor | None:
    """The gradient of an input from its coefficients, with the leading axes of the output's gradient."""
    if coefficients is None:
        return None
    tokens = coefficients if lifting is None else lifting.lift(coefficients)
    return from_tokens(tokens, grad_y.shape, layout)


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
        branches: Low-rank updates beside the weight, added one after another. The gradients of `down` and `up` are
            computed from the same projections as the gradient of the weight.
        parameter: The parameter that `weight` is a transpose or a cast of, if it is not a parameter itself. Its copy in
            int8 is kept for as long as the parameter does not change.
        exact_forward: Whether the output with branches is always a sum of several products, bit for bit, and never one
            product with the sum of the matrices.

    Under autocast, the tensors are cast as `F.linear` casts them. The reverse-mode transforms of `torch.func` (grad,
    vjp, jacrev) and vmap see the same gradients, except that the product with the weight is in full precision. In
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
    if in_forward_mode():
        return _exact_linear(x, weight, bias, branches)
    original_x, original_weight = x, weight
    other_tensors = [bias]
    for branch in branches:
        # torch.compile of torch 2.11 cannot add a named tuple to a list.
        other_tensors += [*BranchTensors(branch.x, branch.down, branch.up, branch.bias)]
    x, weight, other_tensors, cast_weight = cast_as_autocast_would(x, weight, other_tensors)
    state = _State(
        plan=plan,
        weight_projection=plan.weight_projection(x.dtype, x.device),
        input_projection=plan.input_projection(x.dtype, x.device),
        scalings=tuple(branch.scaling for branch in branches),
        cast_weight=cast_weight,
        source=None if must_be_functional() else source_of_weight(original_weight, parameter, plan.precision),
        source_of_x=(lambda: None) if must_be_functional() else weakref.ref(original_x),
        sums_weight=not exact_forward and _should_sum_in_forward(x, weight, other_tensors[1:], plan),
    )
    if only_saved_tensors_matter():
        placeholder = _LowRankLinearWithoutProduct.apply(state, x, weight, *other_tensors)
        with torch.no_grad():
            values = _LowRankLinear.forward(state, x, weight, *other_tensors)
        return _ValuesForOutput.apply(placeholder, values)
    function = _LowRankLinear if must_be_functional() else _EagerLowRankLinear
    return function.apply(state, x, weight, *other_tensors)


def _should_sum_in_forward(
    x: Tensor, weight: Tensor, branch_tensors: Sequence[Tensor | None], plan: BackwardPlan
) -> bool:
    """Whether y is one product with the sum of the weight and the branches."""
    branches = group(branch_tensors, BranchTensors)
    if not branches or any(branch.x is not None for branch in branches):
        return False
    num_rows = math.prod(x.shape[:-1])
    if torch.compiler.is_compiling() and plan.layout is not None:  # a graph has to serve batches of all sizes
        num_rows = heuristics.USUAL_BATCH * plan.layout.num_tokens
    return should_sum(x, weight, factors(branches), num_rows)


def _exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> Tensor:
    """The same layer, differentiated by autograd."""
    y = F.linear(x, weight, bias)
    for branch in branches:
        down = F.linear(x if branch.x is None else branch.x, branch.down)
        y = y + F.linear(down, branch.up, branch.bias) * branch.scaling
    return y
