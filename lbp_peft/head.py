"""Finds the modules that make up the head of a model, from its structure."""

from __future__ import annotations

from typing import Any

from torch import nn


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules that make up the head, for `modules_to_save`.

    In a model of transformers these are the modules outside its base model or its backbone, in a model of timm its
    classifiers.

    Returns:
        The names; an empty list if the head cannot be found.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if isinstance(prefix, str):
        names = [
            name for name, child in model.named_children() if name not in (prefix, "backbone") and _has_weights(child)
        ]
        return _without_nesting(model, names) if names else []
    classifiers: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")  # timm's
    names = [classifiers] if isinstance(classifiers, str) else list(classifiers or [])
    modules = dict(model.named_modules())
    return [name for name in names if name in modules and _has_weights(modules[name])]


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _without_nesting(model: nn.Module, heads: list[str]) -> list[str]:
    """The same modules, by the names of their parts if necessary.

    In PEFT, a name in `modules_to_save` stands for all modules whose names end with it. If such a module contains
    another one (`head.head` of DPT), PEFT trains a copy of the inner one that is never called.
    """
    names = []
    for head in heads:
        module = model.get_submodule(head)
        inside = [f"{head}.{part}" for part, _ in module.named_modules() if part]
        if any(name.endswith(tuple(heads)) for name in inside):
            names += [f"{head}.{part}" for part, child in module.named_children() if _has_weights(child)]
        else:
            names.append(head)
    return names if names == heads else _without_nesting(model, names)
