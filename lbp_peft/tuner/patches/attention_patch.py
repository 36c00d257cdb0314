"""Patches of modules that own adapted layers, such as attention and MLPs.

Layers with the same input, such as those of query, key and value, share its projection. Attention runs its backward
pass by matrix products where these are faster, or saves query, key and value in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...instructions import multiplies_bf16
from ...ops.attention import AttentionMode, attention
from ...ops.compressed_attention import compressed_attention
from ...ops.saved_input import shared_projections
from ..layers.base import LBPWHTLayer
from ..stacking.layer import LBPWHTStacked
from .block_patch import BlockPatch, attach_to_block_module, blocks_with_layers
from .forward_patch import PATCH_ATTR, ForwardPatch, plain_forward

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class AttentionPatch(BlockPatch):
    """Patches a module that owns adapted layers: these share projections, and attention has another backward pass.

    Only a forward pass shows whether the module calls fused attention: an MLP owns layers too, and transformers has
    several implementations of attention.
    """

    # The implementation of attention with which the host did not call fused attention; empty: none is known.
    _without_attention: tuple[str | None, ...] = ()

    def run(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's forward pass."""
        if torch.compiler.is_compiling():  # the compiler removes repeated projections by itself
            return self._attend(host, args, kwargs)
        with shared_projections():
            return self._attend(host, args, kwargs)

    def _attend(self, host: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        plain = plain_forward(host)
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        implementation = getattr(getattr(host, "config", None), "_attn_implementation", None)
        if x is None or self._without_attention == (implementation,):
            return plain(host, *args, **kwargs)
        rules = self._rules_in_effect(host)
        if any("attention" in rule.compress for rule in rules):
            mode = AttentionMode(compressed_attention)
        elif rules and _may_be_faster_by_products(x):
            mode = AttentionMode(attention)
        else:
            return plain(host, *args, **kwargs)
        with mode:
            result = plain(host, *args, **kwargs)
        if not torch.compiler.is_compiling():  # the compiler traces the forward pass once
            self._without_attention = () if mode.was_called else (implementation,)
        return result


def _may_be_faster_by_products(x: Tensor) -> bool:
    """Whether a module with this input computes in bfloat16, on a CPU with instructions for it: no other case gains."""
    if x.device.type != "cpu" or not multiplies_bf16(x.device):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16


def patch_attention(model: nn.Module) -> None:
    """Patch every module that owns adapted layers in a block."""
    for block, _ in blocks_with_layers(model):
        for owner in list(_owners(block)):
            attach_to_block_module(owner, AttentionPatch, block)


def _owners(block: nn.Module) -> Iterator[nn.Module]:
    for module in block.modules():
        if not isinstance(module, (BaseTunerLayer, *_CONTAINERS)) and any(_is_adapted(part) for part in _parts(module)):
            yield module


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, with the contents of containers in their place."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _parts(child)
        else:
            yield child


def _is_adapted(module: nn.Module) -> bool:
    is_own_layer = isinstance(module, LBPWHTLayer) and not isinstance(module, ForwardPatch)
    return is_own_layer or isinstance(getattr(module, PATCH_ATTR, None), LBPWHTStacked)
