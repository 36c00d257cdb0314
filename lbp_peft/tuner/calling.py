"""Calling modules such that all that others attached to them runs: hooks, and what is wrapped around their forward.

An adapted layer can compute what the modules inside it would, without calling them. Where somebody watches them
or has offloaded their weights, they have to be called all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_before_all, _after_all = module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks
_before_all_backward, _after_all_backward = module_hooks._global_backward_pre_hooks, module_hooks._global_backward_hooks
# DeepSpeed's hooks bring parameters from where they are, as reading these does too. PyTorch's own global hooks, such as
# those of its FLOP counter, only note which module runs.
_ONLY_BRING_PARAMETERS = "deepspeed."
_ONLY_NOTE = "torch."


# Why a layer that would be run again in the backward pass is exact, and what can be done about it.
WATCHED = (
    "modules inside it have hooks or replaced forward methods, which would run once more in the backward pass",
    "Put the hooks on the layer itself, or remove them for training.",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody may see, or change, what goes in and out of a module when it is called."""
    own = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    of_all: tuple[dict[int, Any], ...] = (_before_all, _after_all, _before_all_backward, _after_all_backward)
    if not (any(own) or any(of_all)):  # nearly always
        return False
    only_bring = all(_all_from(_ONLY_BRING_PARAMETERS, hooks) for hooks in own)
    return not (only_bring and all(_all_from(_ONLY_NOTE, hooks) for hooks in of_all))


def _all_from(package: str, hooks: dict[int, Any]) -> bool:
    return all((getattr(hook, "__module__", None) or "").startswith(package) for hook in hooks.values())


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody replaced the forward method of this one instance; accelerate's wrapper does not count."""
    attributes = vars(module)
    forward = attributes.get("_old_forward") or attributes.get("forward")
    if forward is None or isinstance(forward, _StandIn):
        return False
    cls = getattr(type(module), "plain_class", type(module))
    return getattr(forward, "__func__", None) not in (type(module).forward, cls.forward)


def has_to_be_called(module: nn.Module) -> bool:
    """Whether a call does anything beside the forward method of the module's class."""
    return "forward" in vars(module) or has_hooks(module)


def has_to_be_called_for(module: Any, x: Tensor) -> bool:
    """The same for a module with a weight, where accelerate has nothing to do if the weight is where x is."""
    if "_old_forward" not in vars(module) or has_own_forward(module):
        return has_to_be_called(module)
    return has_hooks(module) or _offloads(module) or module.weight.device != x.device


def parts_are_watched(module: nn.Module) -> bool:
    """Whether somebody would notice if the modules inside a module were run once more than they are called."""
    parts = (part for part in module.modules() if part is not module)
    return any(has_hooks(part) or has_own_forward(part) or _is_trained_offloaded(part) for part in parts)


def _is_trained_offloaded(module: nn.Module) -> bool:
    """Whether accelerate would put its own parameters in the place of those that a module is run again with."""
    return is_offloaded(module) and any(p.requires_grad for p in module.parameters(recurse=False))


def call_with(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> Any:
    """Call a module, with another forward method inside its hooks and inside accelerate's wrapper."""
    with forward_replaced(module, forward):
        return module(x)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calls of a module from this thread run another forward method; other threads run its own."""
    attributes = vars(module)
    name = "_old_forward" if "_old_forward" in attributes else "forward"  # what accelerate's wrapper calls
    thread = threading.get_ident()
    with _lock:
        stand_in = attributes.get(name)
        if not isinstance(stand_in, _StandIn):
            stand_in = attributes[name] = _StandIn(module, stand_in)
        stand_in.users += 1
    before = stand_in.forwards.get(thread)
    stand_in.forwards[thread] = forward
    try:
        yield
    finally:
        if before is None:
            del stand_in.forwards[thread]
        else:
            stand_in.forwards[thread] = before
        with _lock:
            stand_in.users -= 1
            if stand_in.users == 0 and stand_in.replaced is None:
                del attributes[name]
            elif stand_in.users == 0:
                attributes[name] = stand_in.replaced


_lock = threading.Lock()


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function outside of any graph that is being compiled."""
    return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)


class _StandIn:
    """In the place of a module's forward method while any thread wants another one.

    Attributes:
        module: Whose method it replaces.
        replaced: The instance's own method, None where it had none but that of its class.
        forwards: What to run instead, by thread.
        users: How many want it at the moment.
    """

    def __init__(self, module: nn.Module, replaced: Callable[..., Any] | None):
        self.module = module
        self.replaced = replaced
        self.forwards: dict[int, Callable[..., Any]] = {}
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
    """Whether accelerate has offloaded a module's own parameters, and they are not in memory now."""
    if "_hf_hook" not in vars(module) or not _offloads(module):
        return False
    return any(p.device.type == "meta" for p in module.parameters(recurse=False))


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Within the block, the modules' own parameters are on the device they are used on, as in a call of the modules."""
    offloaded: list[Any] = [module for module in modules if is_offloaded(module)]
    for module in offloaded:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in offloaded:
            module._hf_hook.post_forward(module, None)
