"""Any layer that applies the same affine map to each token: exact forward pass, low-rank backward pass.

For y = f(x) with trained parameters theta, backpropagation of g through f at x gives the gradient of <g, f(x)>. If f
is affine and the same for every token, replacing x and g by their projections P x and P g gives the low-rank gradients
of all of theta at once: f is run again in the backward pass, on k rows instead of L, and differentiated there. The
parametrisation of f does not matter, so one mechanism serves every adapter.

The terms of f that do not depend on x, its biases, would be weighted by the sum of P g instead of the sum of g. One
additional row corrects that: zeros for x, and the difference of the two sums for g.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..formats.products import FULL
from ..projection import Projection
from ..transforms import backward_pass
from .dropout import active_dropouts, random_state_restored, replace_forwards
from .layer_state import LayerRecord, same_autocast, to_save
from .once_differentiable import once_differentiable
from .plan import BackwardPlan, InputProjection, Lifting
from .saved_input import input_to_save
from .tokens import as_tokens, from_tokens, sum_of_tokens


def low_rank_layer(
    layer: nn.Module,
    x: Tensor,
    *,
    plan: BackwardPlan,
    fingerprint: Callable[[], Hashable] = lambda: None,
) -> Tensor:
    """`layer(x)`, bit for bit, whose gradients are computed from projections as a plan says.

    Args:
        layer: Applies the same affine map to each token, see [`lbp_peft.ops.token_wise`]. It is run again in the
            backward pass, in its state of the forward pass, see [`lbp_peft.ops.layer_state`].
        x: Shape (N, L, C_in), or (N, H, W, C_in) with L = H W.
        plan: How the backward pass is run, see [`BackwardPlan`]. Its basis of the weight gradient serves all trained
            parameters of the layer. Its number format is not used: the layer multiplies in its own.
        fingerprint: Returns a value that changes with those changes of the layer that its tensors' version counters do
            not record, such as merging an adapter.

    Dropout of the input is respected: the parameters multiply what it left of x, and no gradient passes through what
    it dropped.

    Returns:
        Shape (N, ..., C_out).

    Raises:
        ValueError: the plan has bases but no layout.
        RuntimeError: in the backward pass, if it is differentiated again, if the loss depends on padding, or if the
            fingerprint is not that of the forward pass.
    """
    plan = plan.with_precision(FULL)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    weight_projection = plan.weight_projection(x.dtype, x.device)
    input_projection = plan.input_projection(x.dtype, x.device)
    dropouts = active_dropouts(layer)
    dropped: list[Tensor] = []
    if input_projection is None:
        # Plain autograd through the layer, with its parameters held fixed, is exact and saves no input.
        with replace_forwards(dropouts, lambda module, z: _append(F.dropout(z, module.p), dropped)):
            fixed = {name: p.detach() for name, p in parameters.items()}
            y = functional_call(layer, fixed, (x,))
        dropped = [z.detach() for z in dropped]
    else:

        def drop(module: nn.Dropout, z: Tensor) -> Tensor:
            with torch.enable_grad():  # so that gradients reach x through the dropout
                return _append(F.dropout(x if z is x else x.to(z.dtype), module.p), dropped)

        with torch.no_grad(), replace_forwards(dropouts, drop):
            y = layer(x)
    record = LayerRecord(layer)
    tensors = record.take_tensors()
    autocast = same_autocast(x.device.type)
    state = _State(plan, record, weight_projection, input_projection, dropouts, autocast, fingerprint, fingerprint())
    return _LowRankLayer.apply(state, y, x, *dropped, *tensors)


@dataclass(frozen=True)
class _State:
    """Non-tensor state saved for backward."""

    plan: BackwardPlan
    layer: LayerRecord
    weight_projection: Projection | None
    input_projection: InputProjection | None
    dropouts: list[nn.Module]
    autocast: Callable[[], AbstractContextManager]
    fingerprint: Callable[[], Hashable]
    fingerprint_of_forward: Hashable

    @property
    def num_inputs(self) -> int:
        """The number of inputs of the layer's parameters: x, and the output of each dropout for it."""
        return 1 + len(self.dropouts)


class _Needs(NamedTuple):
    """Which gradients are needed: for x and the output of each dropout, and for each of the layer's tensors."""

    inputs: Sequence[bool]
    tensors: Sequence[bool]


class _LowRankLayer(torch.autograd.Function):
    """Returns y. Arguments: state, y, x, the output of each dropout for x, all tensors of the layer."""

    @staticmethod
    def forward(state: _State, y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        return y.detach()  # not y, which would be returned as a view: autograd refuses to change those in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        state: _State
        state, _, *tensors = inputs
        ctx.state = state
        xs, held = tensors[: state.num_inputs], tensors[state.num_inputs :]
        ctx.shapes = [z.shape for z in xs]
        ctx.dtypes = [z.dtype for z in xs]
        trains = any(_needs_of(ctx).tensors)
        xs_hat: list[Tensor | None] = [None] * len(xs)
        if trains:
            of_dtypes = [state.weight_projection and state.weight_projection.of_dtype(z.dtype) for z in xs]
            xs_hat = [input_to_save(z, p, state.plan) for z, p in zip(xs, of_dtypes, strict=True)]
        saves_layer = trains or state.input_projection is not None
        ctx.save_for_backward(*xs_hat, *(to_save(held) if saves_layer else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        _, needs_y, *_ = ctx.needs_input_grad
        grad_y = grads[0] if needs_y else None
        return None, grad_y, *(once_differentiable(gradients, grads[0]) if second_order else gradients)


def _needs_of(ctx: Any) -> _Needs:
    """Which gradients are needed, according to the context that autograd keeps of a call."""
    _, _, *needed = ctx.needs_input_grad
    num_inputs = ctx.state.num_inputs
    return _Needs(needed[:num_inputs], needed[num_inputs:])


def _check_unchanged(state: _State) -> None:
    """Raise RuntimeError if the layer has changed since the forward pass."""
    if state.fingerprint() != state.fingerprint_of_forward:
        raise RuntimeError(
            f"A layer changed between its forward and its backward pass, from {state.fingerprint_of_forward} to "
            f"{state.fingerprint()}: low-rank backpropagation has to run it again as it was. Call backward before "
            "switching or merging."
        )


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of x, of the output of each dropout, and of the layer's tensors; None where none is needed."""
    state: _State = ctx.state
    _check_unchanged(state)
    needs = _needs_of(ctx)
    saved = ctx.saved_tensors  # read once: gradient checkpointing returns each tensor a single time
    saved_xs, held = saved[: state.num_inputs], saved[state.num_inputs :]
    g = as_tokens(grad, state.plan.layout)
    input_grads: list[Tensor | None] = [None] * len(needs.inputs)
    tensor_grads: list[Tensor | None] = [None] * len(needs.tensors)
    input_projection = state.input_projection if any(needs.inputs) else None
    lifting: Lifting | None = None
    if any(needs.tensors):
        xs_hat = [state.plan.from_saved(z, dtype) for z, dtype in zip(saved_xs, ctx.dtypes, strict=True)]
        weight_projection = state.weight_projection and state.weight_projection.of_dtype(g.dtype)
        g_hat = g if weight_projection is None else weight_projection.project_gradient(g)
        rows = g_hat.flatten(0, 1)
        sum_dtype = torch.promote_types(rows.dtype, torch.float32)
        missing = sum_of_tokens(g, g_hat, weight_projection).to(sum_dtype) - rows.sum(0, dtype=sum_dtype)
        share_basis = (
            weight_projection is not None
            and input_projection is not None
            and input_projection.basis == weight_projection.basis
        )
        row_grads, tensor_grads = _differentiate(
            state,
            [F.pad(z.flatten(0, 1), (0, 0, 0, 1)) for z in xs_hat],
            held,
            torch.cat((rows, missing.to(rows.dtype)[None])),
            inputs_too=share_basis,
            trained=needs.tensors,
        )
        if share_basis:
            input_grads = [z[:-1].unflatten(0, g_hat.shape[:2]) for z in row_grads]
            lifting, input_projection = weight_projection, None
    if input_projection is not None:  # the layer is affine: its derivative is the same at any x
        lifting, g_hat = input_projection.of_dtype(g.dtype).fit(g)
        rows = g_hat.flatten(0, 1)
        zeros = [
            rows.new_zeros(len(rows), shape[-1], dtype=dtype)
            for shape, dtype in zip(ctx.shapes, ctx.dtypes, strict=True)
        ]
        row_grads, _ = _differentiate(state, zeros, held, rows, inputs_too=True, trained=[False] * len(held))
        input_grads = [z.unflatten(0, g_hat.shape[:2]) for z in row_grads]

    def lift(z: Tensor) -> Tensor:
        return z if lifting is None else lifting.of_dtype(z.dtype).lift(z)

    input_grads = [
        from_tokens(lift(z), shape, state.plan.layout) if needed and z is not None else None
        for z, shape, needed in zip(input_grads, ctx.shapes, needs.inputs, strict=True)
    ]
    return [*input_grads, *tensor_grads]


def _differentiate(
    state: _State,
    xs: list[Tensor],
    held: Sequence[Tensor],
    grad: Tensor,
    inputs_too: bool,
    trained: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run the layer on few rows.

    Args:
        state: The layer, and the conditions of its forward pass that are restored.
        xs: Shape (M, C_in) each: x and the output of each dropout for it.
        held: The tensors of the layer.
        grad: Shape (M, C_out).
        inputs_too: Whether gradients of xs are wanted.
        trained: For each of the tensors, whether its gradient is wanted.

    Returns:
        The gradients of xs, an empty list if they are not wanted; and one gradient for each of the tensors, None where
        it is not wanted.
    """
    with torch.enable_grad(), state.autocast(), random_state_restored(grad.device):
        inputs = [z.detach().requires_grad_(inputs_too)[None] for z in xs]
        leaves = state.layer.leaves(held, trained)
        x, *rest = inputs
        dropped = iter(rest)
        with state.layer.put_back(leaves), replace_forwards(state.dropouts, lambda module, z: next(dropped)):
            y = state.layer.layer(x)
        wanted = [*(inputs if inputs_too else []), *(t for t, needed in zip(leaves, trained, strict=True) if needed)]
        gradients = list(torch.autograd.grad(y, wanted, grad[None].to(y.dtype), allow_unused=True))
    split = len(inputs) if inputs_too else 0
    row_grads = [torch.zeros_like(z[0]) if g is None else g[0] for z, g in zip(inputs, gradients[:split], strict=False)]
    trained_grads = iter(gradients[split:])
    return row_grads, [next(trained_grads) if needed else None for needed in trained]


def _append(z: Tensor, tensors: list[Tensor]) -> Tensor:
    """Append a tensor to a list, and return the tensor."""
    tensors.append(z)
    return z
