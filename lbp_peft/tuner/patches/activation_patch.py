"""Activation functions and norms among the adapted layers that keep their inputs in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2CLS

from ...ops.activation import compressed_layer
from ...transforms import in_forward_mode, must_be_functional
from ..layers.base import BackwardRule
from ..layers.calling import parts_are_watched
from .block_patch import BlockPatch, attach_to_block_module, blocks_with_layers
from .forward_patch import UnpatchedForward

_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU,
    *(kind for kind in (item[0] if isinstance(item, tuple) else item for item in ACT2CLS.values())
      if isinstance(kind, type) and kind is not nn.Identity),
)  # fmt: skip


class LBPWHTCompressed(BlockPatch):
    """Stands inside an activation function or a norm, its host, and has it keep its input in 8 bits."""

    def run(self, host: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward pass."""
        they_decide = must_be_functional()  # torch.compile and torch.func, what to save
        if they_decide or in_forward_mode() or args or kwargs or not (x.requires_grad and self._is_active(host)):
            return type(host).plain_class.forward(host, x, *args, **kwargs)
        if parts_are_watched(host):
            return type(host).plain_class.forward(host, x, *args, **kwargs)
        return compressed_layer(UnpatchedForward(host), x)

    @staticmethod
    def is_wanted(rule: BackwardRule) -> bool:
        return rule.compress


def compress_activations(model: nn.Module) -> None:
    """Put one into every activation function and norm in blocks with adapted layers, for adapters that ask for it."""
    for block, layers in blocks_with_layers(model):
        if any(LBPWHTCompressed.is_wanted(rule) for layer in layers for rule in layer.lbpwht_rule.values()):
            for host in _outermost(block, is_compressible):
                attach_to_block_module(host, LBPWHTCompressed, block)


def _outermost(module: nn.Module, condition: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Modules for which a condition holds, but for those inside others for which it does."""
    for child in module.children():
        if condition(child):
            yield child
        else:
            yield from _outermost(child, condition)


def is_compressible(module: nn.Module) -> bool:
    """Whether a module is an activation function of its input alone, or a norm over the channels of each token."""
    if getattr(module, "inplace", False):
        return False
    return is_norm(module) or isinstance(module, _ACTIVATIONS)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the channels of each token."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
