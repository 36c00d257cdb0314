"""Activation functions and norms among the adapted layers that keep few bits for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from ...bounded import BoundedCache
from ...formats.derivatives import DerivativeTable, derivative_table
from ...layer_types import runs_forward_of
from ...ops.activation import compressed_layer
from ...ops.elementwise import elementwise_function
from ...ops.layer_norm import compressed_layer_norm
from ...transforms import in_forward_mode, in_transform
from ..layers.calling import parts_are_watched
from ..layers.rule import BackwardRule
from .block_patch import BlockPatch, attach_to_block_module, blocks_with_layers
from .forward_patch import PATCH_ATTR, UnpatchedForward

_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU,
    *(kind for kind in (item[0] if isinstance(item, tuple) else item for item in ACT2CLS.values())
      if isinstance(kind, type) and kind is not nn.Identity),
)  # fmt: skip


class LBPWHTCompressed(BlockPatch):
    """Stands inside an activation function or a norm, its host, and has it keep few bits for the backward pass.

    Layer norms and functions that work element by element have backward passes of their own. Other hosts keep their
    input in 8 bits and are run again; under `torch.compile` they keep what they always do.

    Args:
        block: Holds the host and adapted layers.
        host: To make the table of its derivative, if it is a function.
    """

    def __init__(self, block: nn.Module, host: nn.Module):
        super().__init__(block)
        self.word = "norm" if is_norm(host) else "activation"
        self._names = _names_of_settings(host)
        self._settings, self._table = self._look_up(host) if self.word == "activation" else ((), None)

    def run(self, host: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward pass."""
        plain = type(host).plain_class.forward
        if kwargs or len(args) != 1 or in_transform() or in_forward_mode() or not args[0].requires_grad:
            return plain(host, *args, **kwargs)
        (x,) = args
        if self.word not in self._words(host) or parts_are_watched(host):
            return plain(host, x)
        if self.word == "norm" and _is_plain_layer_norm(host, x):
            return compressed_layer_norm(x, host.weight, host.bias, host.eps)
        table = self._current_table(host) if self.word == "activation" else None
        if table is not None:
            return elementwise_function(functools.partial(plain, host), x, table)
        if torch.compiler.is_compiling():
            return plain(host, x)
        return compressed_layer(UnpatchedForward(host), x)

    def _words(self, host: nn.Module) -> set[str]:
        return {word for rule in self._rules_in_effect(host) for word in rule.compress}

    def _current_table(self, host: nn.Module) -> DerivativeTable | None:
        """That of the host's derivative, unless the host was changed while it was compiled."""
        if self._names is not None and tuple(getattr(host, name, None) for name in self._names) == self._settings:
            return self._table
        if torch.compiler.is_compiling():
            return None
        self._names = _names_of_settings(host)
        self._settings, self._table = self._look_up(host)
        return self._table

    def _look_up(self, host: nn.Module) -> tuple[tuple, DerivativeTable | None]:
        if self._names is None:
            return (), None
        plain_class: Any = getattr(type(host), "plain_class", type(host))
        settings = tuple(getattr(host, name) for name in self._names)
        key = (plain_class, self._names, settings)
        if key not in _tables:
            _tables[key] = _table_of(plain_class, host)
        return settings, _tables[key]

    @staticmethod
    def is_wanted(rule: BackwardRule) -> bool:
        return "activation" in rule.compress or "norm" in rule.compress


_tables: BoundedCache[tuple, DerivativeTable | None] = BoundedCache(64)


def _table_of(plain_class: Any, host: nn.Module) -> DerivativeTable | None:
    try:
        with torch.autocast("cpu", enabled=False):
            return derivative_table(lambda x: plain_class.forward(host, x))
    except (RuntimeError, TypeError, ValueError):  # no float64, say: it is run again instead
        return None


def _names_of_settings(host: nn.Module) -> tuple[str, ...] | None:
    """The attributes that its results may depend on; None if there are others than constants and functions."""
    own = {name: value for name, value in vars(host).items() if name not in _OF_ALL_MODULES}
    if any(True for _ in host.parameters()) or any(True for _ in host.buffers()) or any(True for _ in host.children()):
        return None
    if all(type(value) in (bool, int, float, str, type(None)) or callable(value) for value in own.values()):
        return tuple(own)
    return None


_OF_ALL_MODULES = {*vars(nn.Module()), PATCH_ATTR, "forward", "_old_forward", "_hf_hook"}


def _is_plain_layer_norm(host: Any, x: Tensor) -> bool:
    """Whether autocast and mixed dtypes leave it to PyTorch's kernel as it is."""
    if type(host).plain_class is not nn.LayerNorm or len(host.normalized_shape) != 1:
        return False
    if host.weight is not None and host.weight.dtype != x.dtype:
        return False
    return x.dtype == torch.float32 or (x.dtype != torch.float64 and not torch.is_autocast_enabled(x.device.type))


def compress_activations(model: nn.Module) -> None:
    """Put one into every activation function and norm in blocks with adapted layers, for adapters that ask for it."""
    for block, layers in blocks_with_layers(model):
        if any(LBPWHTCompressed.is_wanted(rule) for layer in layers for rule in layer.lbpwht_rule.values()):
            for host in _outermost(block, is_compressible):
                attach_to_block_module(host, functools.partial(LBPWHTCompressed, host=host), block)


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
    return is_norm(module) or runs_forward_of(module, *_ACTIVATIONS)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the channels of each token."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
