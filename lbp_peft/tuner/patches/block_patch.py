"""Patches of modules that are not adapted layers themselves, but are in a block with some."""

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
    """Patches a module that is not an adapted layer. It takes effect while an adapter that asks for it is active.

    It is not a module, since its host may call all of its children in turn. It is not an adapter either, so PEFT
    neither lists nor switches it: it asks the adapted layers which adapters are active.

    Args:
        block: The block that contains the host and the adapted layers.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self._layers: list[LBPWHTLayer] | None = None

    def _is_active(self, host: nn.Module) -> bool:
        return any(self.is_wanted(rule) for rule in self._rules_in_effect(host))

    def _rules_in_effect(self, host: nn.Module) -> list[BackwardRule]:
        """The rules that the layers of the block follow; none if no backward pass will follow this forward pass."""
        if not (host.training and torch.is_grad_enabled()):
            return []
        return [rule for layer in self._adapted_layers() for rule in layer.rules_in_effect()]

    def _adapted_layers(self) -> list[LBPWHTLayer]:
        if torch.compiler.is_compiling():  # the compiler would guard on the list
            return [module for module in self.block.modules() if isinstance(module, LBPWHTLayer)]
        if self._layers is None:  # searched for once, since a search takes longer than a small layer
            self._layers = [module for module in self.block.modules() if isinstance(module, LBPWHTLayer)]
        return self._layers

    def forget_layers(self) -> None:
        """Search for the adapted layers of the block again, since there may be more of them."""
        self._layers = None

    @staticmethod
    def is_wanted(rule: BackwardRule) -> bool:
        """Whether an adapter with this rule asks for the patch."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPatch:
        """Copy the patch, and not the block if only the host is copied, as PEFT does with modules_to_save."""
        copied = memo[id(self)] = copy.copy(self)
        copied.block = memo.get(id(self.block), self.block)
        copied.forget_layers()
        return copied


def attach_to_block_module(host: nn.Module, make_patch: Callable[[nn.Module], BlockPatch], block: nn.Module) -> None:
    """Patch a module of a block, if it has no patch yet.

    Args:
        host: The module.
        make_patch: Makes the patch, for the block.
        block: The block that contains the module.
    """
    if not hasattr(host, PATCH_ATTR):
        attach(host, make_patch(block))
    elif isinstance(patch := getattr(host, PATCH_ATTR), BlockPatch):
        patch.forget_layers()


def blocks_with_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[LBPWHTLayer]]]:
    """The blocks of a model that contain adapted layers, each with these layers.

    A block is a member of an `nn.ModuleList` or `nn.Sequential`, the outermost one that contains the layer.
    """
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
