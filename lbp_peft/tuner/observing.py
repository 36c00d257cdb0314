"""Runs additional training steps with exact gradients, and observes the inputs and gradients of adapted layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..bases.base import Basis
from ..bases.grids import TokenLayout
from ..bases.packed import PackedLayout
from ..measure.running import LossFunction, device_of, loss_of_output, preserve_state, to_device
from ..ops.plan import FixedBasis
from ..ops.tokens import as_tokens
from .layers.base import LBPWHTLayer
from .patches.forward_patch import PATCH_ATTR

Key = TypeVar("Key")
Value = TypeVar("Value")

NOT_CALLED = "it was not called, or what it computes depends on nothing that is trained"


@dataclass(frozen=True)
class Observation:
    """One call of a layer in a training step, with the gradient of its output.

    Attributes:
        name: The layer's name.
        layout: The positions of its tokens.
        x: Its input, shape (N, L, C_in).
        g: The gradient of its output, shape (N, L, C_out).
        shares_with: The name of the first of the layers that received this very tensor one after another.
        trains_weight: Whether any of the layer's parameters is trained.
        needs_input_gradient: Whether the gradient of x is needed.
    """

    name: str
    layout: TokenLayout
    x: Tensor
    g: Tensor
    shares_with: str
    trains_weight: bool
    needs_input_gradient: bool


class _EveryToken(Basis):
    """A basis that keeps every token, so that a layer finds its layout and then runs exact backpropagation."""

    def num_coefficients(self, layout: TokenLayout) -> int:
        return layout.num_tokens

    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> NoReturn:
        raise AssertionError("A basis that keeps all tokens is never projected on.")

    synthesis = analysis


def unwrap(model: nn.Module) -> nn.Module:
    """Remove the wrapper of DDP from a model.

    Raises:
        ValueError: the model has no LBP-WHT layers, or its parameters are sharded.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if not layers_of(model):
        raise ValueError("The model has no LBP-WHT layers: there is nothing to calibrate.")
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "The model's parameters are sharded (FSDP, ZeRO-3). Calibrate it before it is sharded: before "
            "accelerator.prepare, or before the Trainer starts."
        )
    return model


def layers_of(model: nn.Module) -> dict[str, LBPWHTLayer]:
    """The layers with LBP-WHT adapters, by the names that they were given."""
    return {module.layer_name: module for module in model.modules() if isinstance(module, LBPWHTLayer)}


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None,
    names: Iterable[str],
    receive: Callable[[Observation], None],
) -> tuple[int, dict[str, str]]:
    """Run a forward and a backward pass on each batch, in training mode and with exact gradients.

    Weights, gradients, buffers, modes and random number generators are left as they were, and hooks are removed.

    Args:
        model: A model with LBP-WHT layers, free of wrappers.
        batches: What the model is called with, as in `lbp_peft.gradient_quality`; any number of them.
        loss_fn: (model, batch) -> scalar loss. None: `model(**batch).loss`.
        names: The layers to observe.
        receive: It is called with each call of these layers whose tokens lie on one known grid. It must keep no tensor.

    Returns:
        The number of batches, and the reason why a layer was not observed, by the layer's name.
    """
    device, names = device_of(model), set(names)
    why_unobserved = dict.fromkeys(sorted(names), NOT_CALLED)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("The model has no trained parameters, so there are no gradients to calibrate by.")
    number = 0
    with (
        preserve_state(model),
        torch.compiler.set_stance("force_eager"),
        _use_exact_gradients(model),
        torch.enable_grad(),
    ):
        model.train()
        for batch in batches:
            with _observe_calls(model, names, why_unobserved, receive):
                loss = (loss_fn or loss_of_output)(model, to_device(batch, device))
                # Unlike loss.backward(), this runs no hooks of parameters: DDP's reduction is one.
                torch.autograd.grad(loss, trained, allow_unused=True)
            number += 1
    return number, why_unobserved


@contextmanager
def _use_exact_gradients(model: nn.Module) -> Iterator[None]:
    """Have all layers find their layouts and run exact backpropagation, whether they are calibrated or not."""
    rules = {layer: layer.lbpwht_rule for layer in layers_of(model).values()}
    every_token = _EveryToken()
    try:
        for layer, layer_rules in rules.items():
            layer.lbpwht_rule = {
                name: replace(rule, weight_basis=every_token, input_gradient=FixedBasis(every_token), compress=())
                for name, rule in layer_rules.items()
            }
        yield
    finally:
        for layer, layer_rules in rules.items():
            layer.lbpwht_rule = layer_rules


@contextmanager
def _observe_calls(
    model: nn.Module, names: set[str], why_unobserved: dict[str, str], receive: Callable[[Observation], None]
) -> Iterator[None]:
    """Within the block, forward passes hand inputs of layers, and gradients of their outputs, to `receive`."""
    # The last input, and the name of the first layer that received it.
    last: list[tuple[weakref.ref[Tensor], str]] = []

    def note(module: nn.Module, args: tuple, y: object, layer: LBPWHTLayer) -> None:
        name, backward_pass = layer.layer_name, layer.last_backward
        if not args or not isinstance(y, Tensor) or not y.requires_grad or backward_pass is None:
            return
        x, layout, axis = args[0], backward_pass.layout, layer._channels_axis(args[0])
        if layout is None or isinstance(layout, PackedLayout):
            packed = "images of several sizes are packed into one sequence"
            why_unobserved[name] = packed if layout is not None else backward_pass.why_exact
            return
        first = last[0][1] if last and last[0][0]() is x else name
        last[:] = [(weakref.ref(x), first)]
        why_unobserved.pop(name, None)
        trains_weight = any(parameter.requires_grad for parameter in module.parameters())

        def hand_over(grad: Tensor) -> None:
            with torch.no_grad():
                tokens, gradients = (as_tokens(t.detach().movedim(axis, -1), layout) for t in (x, grad))
                receive(Observation(name, layout, tokens, gradients, first, trains_weight, x.requires_grad))

        y.register_hook(hand_over)

    hosts = {layer: layer for layer in layers_of(model).values()}
    hosts |= {getattr(module, PATCH_ATTR): module for module in model.modules() if hasattr(module, PATCH_ATTR)}
    with ExitStack() as stack:
        for name, layer in layers_of(model).items():
            layer.last_backward = None
            if name in names:
                stack.callback(hosts[layer].register_forward_hook(partial(note, layer=layer)).remove)
        yield


def gather_from_processes(value: Value) -> list[Value]:
    """The values that all processes of `torch.distributed` pass, by rank. Every process has to call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    gathered: list[Value] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def sum_over_processes(sums: dict[Key, Tensor], device: torch.device) -> dict[Key, Tensor]:
    """The sums over all processes of `torch.distributed`; a key that a process lacks counts as zero there.

    Args:
        sums: Float64 tensors, or on devices without it float32, by keys that can be compared. They are not changed.
        device: The device of this process.
    """
    shapes = gather_from_processes({key: tuple(tensor.shape) for key, tensor in sums.items()})
    if len(shapes) == 1:
        return sums
    result = {}
    all_shapes: dict[Any, tuple[int, ...]] = {key: shape for of_process in shapes for key, shape in of_process.items()}
    for key in sorted(all_shapes):
        value = sums.get(key, torch.zeros(all_shapes[key], dtype=torch.float64))
        result[key] = value.to(device, copy=True)
        torch.distributed.all_reduce(result[key])
    return result
