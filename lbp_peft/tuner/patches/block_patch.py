"""What an adapter does around its layers: it stands inside other modules of their blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..layers.base import LBPWHTLayer
from ..layers.rule import BackwardRule
from .forward_patch import PATCH_ATTR, ForwardPatch, attach


class BlockPatch(ForwardPatch):
    """Stands inside a module that is no adapted layer, while adapters that want it are active in its block.

    It is neither a module, since its host may call all of its children in turn, nor an adapter: PEFT does not list or
    switch it. It asks the adapted layers.

    Args:
        block: Holds the host and the layers.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self._layers: list[LBPWHTLayer] | None = None

    def _is_active(self, host: nn.Module) -> bool:
        return any(self.is_wanted(rule) for rule in self._rules_in_effect(host))

    def _rules_in_effect(self, host: nn.Module) -> list[BackwardRule]:
        """Those of the layers in the block, for a forward pass that will be followed by a backward pass."""
        if not (host.training and torch.is_grad_enabled()):
            return []
        return [rule for layer in self._adapted_layers() for rule in layer.rules_in_effect()]

    def _adapted_layers(self) -> list[LBPWHTLayer]:
        if torch.compiler.is_compiling():  # it would watch the list
            return [module for module in self.block.modules() if isinstance(module, LBPWHTLayer)]
        if self._layers is None:  # searched for once: a search takes longer than a small layer
            self._layers = [module for module in self.block.modules() if isinstance(module, LBPWHTLayer)]
        return self._layers

    def forget_layers(self) -> None:
        """Search for the adapted layers of the block again, since there may be more of them."""
        self._layers = None

    @staticmethod
    def is_wanted(rule: BackwardRule) -> bool:
        """Whether an adapter with this rule asks for it."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPatch:
        """A copy of the host alone, which PEFT makes of modules_to_save, stays in the block."""
        again = memo[id(self)] = copy.copy(self)
        again.block = memo.get(id(self.block), self.block)
        again.forget_layers()
        return again


def attach_to_block_module(host: nn.Module, kind: Callable[[nn.Module], BlockPatch], block: nn.Module) -> None:
    """Put one of a kind inside a module of a block, if there is none yet."""
    if not hasattr(host, PATCH_ATTR):
        attach(host, kind(block))
    elif isinstance(patch := getattr(host, PATCH_ATTR), BlockPatch):
        patch.forget_layers()


def blocks_with_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[LBPWHTLayer]]]:
    """The outermost members of lists of blocks that hold adapted layers, and these layers."""
    blocks: dict[str, list[LBPWHTLayer]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LBPWHTLayer):
            continue
        parts = name.split(".")
        for length in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[: length - 1])), (nn.ModuleList, nn.Sequential)):
                blocks.setdefault(".".join(parts[:length]), []).append(module)
                break
    for name, layers in blocks.items():
        yield model.get_submodule(name), layers
