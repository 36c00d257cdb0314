"""Wrappers of FSDP and activation checkpointing, whose names are in modules' names, but not in state dicts."""

from __future__ import annotations

from torch import Tensor, nn

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(name: str) -> str:
    """The name that a state dict has for a module."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def with_wrappers(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict under the names of the modules, by which PEFT looks for tensors."""
    names = {without_wrappers(name): name for name, _ in model.named_modules()}
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, attribute = key.rpartition(".")
        renamed[f"{names[module]}.{attribute}" if module in names else key] = tensor
    return renamed
