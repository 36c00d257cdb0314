"""Activation functions and norms among the adapted layers that keep their inputs in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from ..compress import compressed_layer
from .layer import LBPWHTLayer
from .stacked import CHILD, Inside, Plain, stand_inside

_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU,
    *(kind for kind in (item[0] if isinstance(item, tuple) else item for item in ACT2CLS.values())
      if isinstance(kind, type) and kind is not nn.Identity),
)  # fmt: skip


class LBPWHTCompressed(Inside):
    """Stands inside an activation function or a norm, its host, and has it keep its input in 8 bits.

    Its rules are those of the adapters that ask for it.
    """

    def run(self, host: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward pass."""
        if args or kwargs or not self._is_wanted(x):
            return type(host).plain_class.forward(host, x, *args, **kwargs)
        return compressed_layer(Plain(host), x)

    def _is_wanted(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():  # it decides itself what to save
            return False
        is_active = not self.disable_adapters and any(name in self.lbpwht_rule for name in self.active_adapters)
        return is_active and self.training and not self.exact_backward and torch.is_grad_enabled() and x.requires_grad

    def __repr__(self) -> str:
        return f"lbpwht.LBPWHTCompressed({', '.join(self.lbpwht_rule)})"


def compress_activations(model: nn.Module) -> None:
    """Put one into every activation function and norm in blocks with adapted layers, for adapters that ask for it."""
    for block in _blocks_with_layers(model):
        layers = [module for module in block.modules() if isinstance(module, LBPWHTLayer)]
        rules = {name: rule for layer in layers for name, rule in layer.lbpwht_rule.items() if rule.compress}
        for host in _outermost(block, is_compressible) if rules else []:
            if not hasattr(host, CHILD):
                stand_inside(host, LBPWHTCompressed(layers[0].finder, "", rules))
            inside: Any = getattr(host, CHILD)
            inside.lbpwht_rule.update(rules)
            inside._active_adapter, inside._disable_adapters = layers[0]._active_adapter, layers[0].disable_adapters


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
    is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return is_norm or isinstance(module, _ACTIVATIONS)


def _blocks_with_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of lists of blocks that hold adapted layers."""
    blocks = {}
    for name, module in model.named_modules():
        if not isinstance(module, LBPWHTLayer) or isinstance(module, LBPWHTCompressed):
            continue
        parts = name.split(".")
        for length in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[: length - 1])), (nn.ModuleList, nn.Sequential)):
                blocks[".".join(parts[:length])] = model.get_submodule(".".join(parts[:length]))
                break
    yield from blocks.values()
