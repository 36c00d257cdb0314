"""Hooks that tell a [`LayoutFinder`] where the forward passes of its model begin and end."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .finder import LayoutFinder


class PassHooks:
    """The hooks on a model and on its modules that contain adapted layers, any of which may be called by itself."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def attach(self, finder: LayoutFinder, model: nn.Module, layer_names: Iterable[str]) -> None:
        """Tell a finder of each forward pass of a model, whose adapted layers have these names."""
        containers = {""}
        for name in layer_names:
            parts = name.split(".")
            containers.update(".".join(parts[:length]) for length in range(1, len(parts)))
        for name in sorted(containers):
            module = model.get_submodule(name)
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            before = _BeforeForward(finder, None if name else tuple(inspect.signature(module.forward).parameters))
            after = _AfterForward(finder, is_root=not name)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _BeforeForward:
    """A forward pre-hook.

    Args:
        finder: The finder to tell.
        names: The names of the arguments of the whole model; None: the hook is on a part of it.
    """

    def __init__(self, finder: LayoutFinder, names: tuple[str, ...] | None):
        self.finder = finder
        self.names = names

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.finder.before(module, args, kwargs)
        elif self.names is not None:
            self.finder.before_compiled(self.names, args, kwargs)


class _AfterForward:
    """A forward hook.

    Args:
        finder: The finder to tell.
        is_root: Whether the hook is on the whole model.
    """

    def __init__(self, finder: LayoutFinder, is_root: bool):
        self.finder = finder
        self.is_root = is_root

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.finder.after(module)
        elif self.is_root:
            self.finder.after_compiled()
