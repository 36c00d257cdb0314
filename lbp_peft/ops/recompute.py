"""Any layer that treats each token by the same affine map: exact forward, low-rank backward.

For y = f(x) with trained parameters theta, backpropagation of g through f at x gives the gradient of <g, f(x)>. Where f
is affine and the same for every token, replacing x and g by their projections P x and P g gives the low-rank gradients
of all of theta at once: f is run again in the backward pass, on k rows instead of L, and differentiated there. It does
not matter how f comes about, so one mechanism serves every adapter.

What f adds whatever x is, its biases, would be weighed by the sum of P g instead of the sum of g. One more row mends
that: zeros for x, and for g what the sum lacks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..bases.basis_set import BasisSet, TokenLayout
from ..projection import Projection, projection
from ..transforms import backward_pass
from .layer_state import LayerRecord, same_autocast, to_save
from .linear import as_tokens, from_tokens, once_differentiable, rows_to_keep, sum_of_tokens


def low_rank_layer(
    layer: nn.Module,
    x: Tensor,
    layout: TokenLayout | None,
    for_weight: BasisSet | None,
    for_input: BasisSet | None = None,
    state: Callable[[], Hashable] = lambda: None,
    padding: Tensor | None = None,
) -> Tensor:
    """`layer(x)`, bit for bit, whose backward pass goes through a small space.

    Args:
        layer: Affine in x and token-wise, see [`why_not_token_wise`]. It is run again in the backward pass, as it was
            in the forward pass, see [`lbp_peft.ops.layer_state`].
        x: Shape (N, L, C_in), or (N, H, W, C_in) with L = H W.
        layout: Where the L tokens lie. None will do where no bases are given.
        for_weight: Bases of the gradients of all trained parameters of the layer; x is saved projected on them.
        for_input: Bases of the input gradient. None, or as many bases as tokens: exact.
        state: Of what may have changed the layer past its tensors' version counters, as merging an adapter does. The
            backward pass raises RuntimeError if it is not what it was in the forward pass.
        padding: Shape (N, L), True for tokens that are only padding: nothing of them enters the gradients of others.

    Dropout of the input is respected: the parameters see what it left of x, and no gradient goes through what it
    dropped. Double backward raises RuntimeError.

    Returns:
        Shape (N, ..., C_out).
    """
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    project_weight = projection(layout, for_weight, x.dtype, x.device, padding)
    project_input = projection(layout, for_input, x.dtype, x.device, padding)
    dropouts = _active_dropouts(layer)
    dropped: list[Tensor] = []
    if project_input is None:
        # Autograd's own way through the layer, its parameters held fixed, is exact and saves no input.
        with _replaced(dropouts, lambda module, z: _noted(F.dropout(z, module.p), dropped)):
            fixed = {name: p.detach() for name, p in parameters.items()}
            y = functional_call(layer, fixed, (x,))
        dropped = [z.detach() for z in dropped]
    else:

        def drop(module: nn.Dropout, z: Tensor) -> Tensor:
            with torch.enable_grad():  # for the way back into x
                return _noted(F.dropout(x if z is x else x.to(z.dtype), module.p), dropped)

        with torch.no_grad(), _replaced(dropouts, drop):
            y = layer(x)
    record = LayerRecord(layer)
    tensors = record.take_tensors()
    autocast = same_autocast(x.device.type)
    how = _How(record, project_weight, project_input, dropouts, autocast, state, state(), layout)
    return _LowRankLayer.apply(how, y, x, *dropped, *tensors)


@dataclass(frozen=True)
class _How:
    """All that is no tensor."""

    layer: LayerRecord
    for_weight: Projection | None
    for_input: Projection | None
    dropouts: list[nn.Module]
    autocast: Callable[[], Any]
    state: Callable[[], Hashable]
    state_then: Hashable
    layout: TokenLayout | None


class _LowRankLayer(torch.autograd.Function):
    """Passes y on. Arguments: how, y, x, what each dropout made of x, all tensors of the layer."""

    @staticmethod
    def forward(how: _How, y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        return y.detach()  # not y, which would come out as a view: autograd refuses to change those in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        how, _, *tensors = inputs
        ctx.how = how
        split = 1 + len(how.dropouts)
        xs, held = tensors[:split], tensors[split:]
        ctx.shapes = [z.shape for z in xs]
        ctx.dtypes = [z.dtype for z in xs]
        trains = any(ctx.needs_input_grad[2 + split :])
        kept: list[Tensor | None] = [None] * len(xs)
        if trains:
            of_dtypes = [how.for_weight and how.for_weight.of_dtype(z.dtype) for z in xs]
            kept = [rows_to_keep(z, p, layout=how.layout) for z, p in zip(xs, of_dtypes, strict=True)]
        ctx.save_for_backward(*kept, *(to_save(held) if trains or how.for_input is not None else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        with backward_pass():
            gradients = _gradients(ctx, grads[0])
        into_y = grads[0] if ctx.needs_input_grad[1] else None
        return None, into_y, *(once_differentiable(gradients) if second_order else gradients)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    how: _How = ctx.how
    if how.state() != how.state_then:
        raise RuntimeError(
            f"A layer changed between its forward and its backward pass, from {how.state_then} to {how.state()}: "
            "low-rank backpropagation has to run it again as it was. Call backward before switching or merging."
        )
    num_inputs = 1 + len(how.dropouts)
    saved = ctx.saved_tensors  # read once: gradient checkpointing hands each out a single time
    inputs, held = saved[:num_inputs], saved[num_inputs:]
    needed = ctx.needs_input_grad[2:]
    trained = needed[num_inputs:]
    tokens = as_tokens(grad, how.layout)
    of_inputs: list[Tensor | None] = [None] * num_inputs
    of_trained: list[Tensor | None] = [None] * len(trained)
    for_input: Any = how.for_input
    needs_inputs = for_input is not None and any(needed[:num_inputs])
    if any(trained):
        for_weight = how.for_weight and how.for_weight.of_dtype(tokens.dtype)
        small = tokens if for_weight is None else for_weight.project_gradient(tokens)
        rows = small.flatten(0, 1)
        exactly = torch.promote_types(rows.dtype, torch.float32)
        lacking = sum_of_tokens(tokens, small, for_weight).to(exactly) - rows.sum(0, dtype=exactly)
        together = needs_inputs and how.for_weight is not None and for_input.bases == how.for_weight.bases
        of_rows, of_trained = _differentiate(
            how,
            [F.pad(z.flatten(0, 1), (0, 0, 0, 1)) for z in inputs],
            held,
            torch.cat((rows, lacking.to(rows.dtype)[None])),
            inputs_too=together,
            trained=trained,
        )
        if together:
            of_inputs, needs_inputs = [z[:-1].unflatten(0, small.shape[:2]) for z in of_rows], False
    if needs_inputs:  # f is affine: its derivative is the same at any x
        small = for_input.of_dtype(tokens.dtype).project_gradient(tokens)
        rows = small.flatten(0, 1)
        zeros = [
            rows.new_zeros(len(rows), shape[-1], dtype=dtype)
            for shape, dtype in zip(ctx.shapes, ctx.dtypes, strict=True)
        ]
        of_rows, _ = _differentiate(how, zeros, held, rows, inputs_too=True, trained=[False] * len(held))
        of_inputs = [z.unflatten(0, small.shape[:2]) for z in of_rows]
    if for_input is not None:
        of_inputs = [
            from_tokens(for_input.of_dtype(z.dtype).lift(z), shape, how.layout) if need and z is not None else None
            for z, shape, need in zip(of_inputs, ctx.shapes, needed, strict=False)
        ]
    return [*of_inputs, *of_trained]


def _differentiate(
    how: _How,
    xs: list[Tensor],
    held: Sequence[Tensor],
    grad: Tensor,
    inputs_too: bool,
    trained: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run the layer on few rows.

    Args:
        how: The layer, and what of its forward pass is to be the same.
        xs: Shape (M, C_in) each: x and what each dropout made of it.
        held: The tensors of the layer.
        grad: Shape (M, C_out).
        inputs_too: Whether gradients of xs are wanted.
        trained: Of which of the tensors gradients are wanted.

    Returns:
        The gradients of xs, none if not wanted, and those of the tensors, None for each that is not.
    """
    with torch.enable_grad(), how.autocast(), _same_random_state(grad.device):
        inputs = [z.detach().requires_grad_(inputs_too)[None] for z in xs]
        leaves = how.layer.leaves(held, trained)
        x, *rest = inputs
        dropped = iter(rest)
        with how.layer.put_back(leaves), _replaced(how.dropouts, lambda module, z: next(dropped)):
            y = how.layer.layer(x)
        wanted = [*(inputs if inputs_too else []), *(t for t, needed in zip(leaves, trained, strict=True) if needed)]
        found = list(torch.autograd.grad(y, wanted, grad[None].to(y.dtype), allow_unused=True))
    split = len(inputs) if inputs_too else 0
    of_inputs = [torch.zeros_like(z[0]) if g is None else g[0] for z, g in zip(inputs, found[:split], strict=False)]
    of_trained = iter(found[split:])
    return of_inputs, [next(of_trained) if needed else None for needed in trained]


def _active_dropouts(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if type(m) is nn.Dropout and m.p > 0 and m.training]


@contextmanager
def _replaced(modules: list[nn.Module], forward: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Within, the modules do something else when they are called."""
    with ExitStack() as stack:
        for module in modules:
            before = vars(module).copy()
            vars(module)["forward"] = functools.partial(forward, module)
            stack.callback(_set_back, module, before)
        yield


def _set_back(module: nn.Module, before: dict[str, Any]) -> None:
    if "forward" in before:
        vars(module)["forward"] = before["forward"]
    else:
        del vars(module)["forward"]


def _noted(z: Tensor, notes: list[Tensor]) -> Tensor:
    notes.append(z)
    return z


def _same_random_state(device: torch.device) -> Any:
    """Numbers drawn within are not missed outside: training goes on as if the layer had run once."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda")


def why_not_token_wise(layer: nn.Module, num_features: int, dtype: torch.dtype, device: torch.device) -> str:
    """Try out whether a layer treats every token by the same affine map, the same each time; "" if so.

    It is run on a few random tokens with its trained parameters disturbed, since many an adapter does nothing before
    it is trained. Dropout of the layer's input is allowed; other dropout is not.
    """
    if random := _random_parts(layer):
        return f"its {random} draws anew in each pass"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    a, b = draw(2, 3, num_features), draw(2, 3, num_features)
    disturbed = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p)
        for name, p in layer.named_parameters()
        if p.requires_grad
    }
    strange: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        def pass_on(module: nn.Module, z: Tensor) -> Tensor:
            if z is not x and not (z.dtype != x.dtype and z.shape == x.shape):
                strange.append(z)
            return z

        with _replaced(_active_dropouts(layer), pass_on):
            return functional_call(layer, disturbed, (x,)).double()

    fixed = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    with torch.enable_grad(), _same_random_state(device):
        if functional_call(layer, fixed, (a,)).requires_grad:
            return "it is trained by tensors that are not among its parameters"
    with torch.no_grad(), _same_random_state(device):
        at_a, at_zero = run(a), run(torch.zeros_like(a))
        scale = at_a.abs().max() + 1e-6
        tolerance = scale * (2e-3 if dtype.itemsize >= 4 and not torch.is_autocast_enabled(device.type) else 5e-2)
        if strange:
            return "it drops out more than its input"
        if at_a.shape[:-1] != a.shape[:-1]:
            return "it changes the number of tokens"
        if not all((run(a) - at_a).abs().max() <= tolerance for _ in range(4)):
            return "it draws anew in each pass"
        if (run(a[:, 1:2]) - at_a[:, 1:2]).abs().max() > tolerance:
            return "what it makes of a token depends on the others"
        if (run(a + b) - at_a - run(b) + at_zero).abs().max() > 2 * tolerance:
            return "it is not linear in its input"
    return ""


def _random_parts(layer: nn.Module) -> str:
    """Dropout other than nn.Dropout, by name: modules of that kind, or rates that a layer keeps as attributes."""
    for module in layer.modules():
        kind = type(module).__name__
        if "dropout" in kind.lower() and kind != "Dropout" and module.training and getattr(module, "p", 1) > 0:
            return kind
        for name, value in vars(module).items():
            rates = value.values() if isinstance(value, dict) else [value]
            if name.endswith("dropout") and any(isinstance(rate, float) and rate > 0 for rate in rates):
                return name
    return ""
