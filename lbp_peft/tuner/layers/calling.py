"""Calls modules so that everything attached to them runs: their hooks, and wrappers around their forward methods.

An adapted layer can compute the results of the modules inside it without calling them. If these modules have hooks, or
if their weights are offloaded, they must be called nevertheless.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ...layer_types import plain_class_of

_before_all, _after_all = module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks
_before_all_backward, _after_all_backward = module_hooks._global_backward_pre_hooks, module_hooks._global_backward_hooks
# DeepSpeed's hooks only gather parameters, which reading the parameters does too. PyTorch's own global hooks, such as
# those of its FLOP counter, only record which module runs. Neither kind needs the module to be called.
_GATHERING_HOOKS = "deepspeed."
_RECORDING_HOOKS = "torch."


# Why a layer that would have to be run again has exact backpropagation instead, and the remedy.
SIDE_EFFECTS = (
    "modules inside it have hooks or replaced forward methods, which would run once more in the backward pass",
    "Put the hooks on the layer itself, or remove them for training.",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may read or change its inputs, its outputs or their gradients."""
    of_module = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    of_all_modules: tuple[Mapping[int, object], ...] = (
        _before_all,
        _after_all,
        _before_all_backward,
        _after_all_backward,
    )
    if not (any(of_module) or any(of_all_modules)):  # the usual case
        return False
    only_gather = all(_all_from(_GATHERING_HOOKS, hooks) for hooks in of_module)
    return not (only_gather and all(_all_from(_RECORDING_HOOKS, hooks) for hooks in of_all_modules))


def _all_from(package: str, hooks: Mapping[int, object]) -> bool:
    return all((getattr(hook, "__module__", None) or "").startswith(package) for hook in hooks.values())


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward method was replaced on this instance; accelerate's wrapper does not count."""
    attributes = vars(module)
    forward = attributes.get("_old_forward") or attributes.get("forward")
    if forward is None or isinstance(forward, _ReplacedForward):
        return False
    return getattr(forward, "__func__", None) not in (type(module).forward, plain_class_of(module).forward)


def has_to_be_called(module: nn.Module) -> bool:
    """Whether calling the module does more than run the forward method of its class."""
    return "forward" in vars(module) or has_hooks(module)


def has_to_be_called_for(module: Any, x: Tensor) -> bool:
    """As [`has_to_be_called`], for a module with a weight: accelerate's wrapper does nothing if x is on its device."""
    if "_old_forward" not in vars(module) or has_own_forward(module):
        return has_to_be_called(module)
    return has_hooks(module) or _offloads(module) or module.weight.device != x.device


def rerun_has_side_effects(module: nn.Module) -> bool:
    """Whether an additional run of the modules inside a module would have an effect, through hooks or offloading."""
    children = (child for child in module.modules() if child is not module)
    return any(has_hooks(child) or has_own_forward(child) or _is_trained_offloaded(child) for child in children)


def _is_trained_offloaded(module: nn.Module) -> bool:
    """Whether accelerate would replace the parameters with which a module is run again by its own."""
    return is_offloaded(module) and any(p.requires_grad for p in module.parameters(recurse=False))


def call_with(module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Call a module with another forward method; its hooks and accelerate's wrapper run around that method."""
    with replace_forward(module, forward):
        return module(x)


@contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block, replace a module's forward method for calls from this thread."""
    attributes = vars(module)
    name = "_old_forward" if "_old_forward" in attributes else "forward"  # what accelerate's wrapper calls
    thread = threading.get_ident()
    with _lock:
        replacement = attributes.get(name)
        if not isinstance(replacement, _ReplacedForward):
            replacement = attributes[name] = _ReplacedForward(module, replacement)
        replacement.users += 1
    before = replacement.forwards.get(thread)
    replacement.forwards[thread] = forward
    try:
        yield
    finally:
        if before is None:
            del replacement.forwards[thread]
        else:
            replacement.forwards[thread] = before
        with _lock:
            replacement.users -= 1
            if replacement.users == 0 and replacement.replaced is None:
                del attributes[name]
            elif replacement.users == 0:
                attributes[name] = replacement.replaced


_lock = threading.Lock()


def call_eagerly(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function, but outside the graph if one is being compiled."""
    return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)


class _ReplacedForward:
    """Takes the place of a module's forward method while any thread replaces that method.

    Attributes:
        module: The module whose method it replaces.
        replaced: The instance's own method; None if the instance only had that of its class.
        forwards: The function that runs instead, by thread.
        users: The number of current replacements.
    """

    def __init__(self, module: nn.Module, replaced: Callable[..., Tensor] | None):
        self.module = module
        self.replaced = replaced
        self.forwards: dict[int, Callable[..., Tensor]] = {}
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = self.forwards.get(threading.get_ident()) or self.replaced
        if forward is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return forward(*args, **kwargs)


# Weights that accelerate has offloaded


def _offloads(module: nn.Module) -> bool:
    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has offloaded a module's own parameters and they are not loaded now."""
    if "_hf_hook" not in vars(module) or not _offloads(module):
        return False
    return any(p.device.type == "meta" for p in module.parameters(recurse=False))


@contextmanager
def onload_parameters(*modules: nn.Module) -> Iterator[None]:
    """Within the block, load the modules' own offloaded parameters onto the device that they run on, as a call does."""
    offloaded: list[Any] = [module for module in modules if is_offloaded(module)]
    for module in offloaded:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in offloaded:
            module._hf_hook.post_forward(module, None)
