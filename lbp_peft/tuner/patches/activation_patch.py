"""Patches of activation functions and norms, which then save few bits for the backward pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from ...bounded import BoundedCache
from ...formats.derivatives import DerivativeTable, derivative_table
from ...layer_types import plain_class_of, runs_forward_of
from ...ops.activation import compressed_layer
from ...ops.elementwise import elementwise_function
from ...ops.layer_norm import compressed_layer_norm
from ...ops.rms_norm import compressed_rms_norm
from ...transforms import in_forward_mode, in_transform
from ..layers.calling import rerun_has_side_effects
from ..layers.rule import BackwardRule
from .block_patch import BlockPatch, attach_to_block_module, blocks_with_layers
from .forward_patch import PATCH_ATTR, UnpatchedForward, plain_forward

_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU,
    *(kind for kind in (item[0] if isinstance(item, tuple) else item for item in ACT2CLS.values())
      if isinstance(kind, type) and kind is not nn.Identity),
)  # fmt: skip


class ActivationPatch(BlockPatch):
    """Has an activation function or a norm, its host, save few bits for the backward pass.

    Layer norms, RMS norms and elementwise functions have backward passes of their own. Other hosts save their input in
    8 bits and are run again in the backward pass. Under `torch.compile`, the patch has no effect on these.

    Args:
        block: The block that contains the host and the adapted layers.
        host: The module. If it is an activation function, a table of its derivative is made; if it is a norm, it is
            tested whether that is an RMS norm.
    """

    def __init__(self, block: nn.Module, host: nn.Module):
        super().__init__(block)
        self.word = "norm" if is_norm(host) else "activation"
        self._rms_norm = _rms_norm_of(host) if self.word == "norm" else None
        self._names = _names_of_settings(host)
        self._settings, self._table = self._look_up(host) if self.word == "activation" else ((), None)

    def run(self, host: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward pass."""
        plain = plain_forward(host)
        if kwargs or len(args) != 1 or in_transform() or in_forward_mode() or not args[0].requires_grad:
            return plain(host, *args, **kwargs)
        (x,) = args
        if self.word not in self._words(host) or rerun_has_side_effects(host):
            return plain(host, x)
        if self.word == "norm" and _is_plain_layer_norm(host, x):
            return compressed_layer_norm(x, host.weight, host.bias, host.eps)
        if self._rms_norm is not None and self._rms_norm.applies_to(host, x):
            with torch.no_grad():
                y = plain(host, x)
            norm = self._rms_norm
            return compressed_rms_norm(y, x, host._parameters.get("weight"), norm.eps(host, x), norm.shift)
        table = self._current_table(host) if self.word == "activation" else None
        if table is not None:
            return elementwise_function(functools.partial(plain, host), x, table)
        if torch.compiler.is_compiling():
            return plain(host, x)
        return compressed_layer(UnpatchedForward(host), x)

    def _words(self, host: nn.Module) -> set[str]:
        return {word for rule in self._rules_in_effect(host) for word in rule.compress}

    def _current_table(self, host: nn.Module) -> DerivativeTable | None:
        """The table of the host's derivative; None if there is none, or the host has changed in a compiled model."""
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
        plain_class = plain_class_of(host)
        settings = tuple(getattr(host, name) for name in self._names)
        key = (plain_class, self._names, settings)
        if key not in _tables:
            _tables[key] = _table_of(plain_class, host)
        return settings, _tables[key]

    @staticmethod
    def is_wanted(rule: BackwardRule) -> bool:
        return "activation" in rule.compress or "norm" in rule.compress


_tables: BoundedCache[tuple, DerivativeTable | None] = BoundedCache(64)


def _table_of(plain_class: type[nn.Module], host: nn.Module) -> DerivativeTable | None:
    try:
        with torch.autocast("cpu", enabled=False):
            return derivative_table(lambda x: plain_class.forward(host, x))
    except (RuntimeError, TypeError, ValueError):  # for instance without float64: the host is run again instead
        return None


def _names_of_settings(host: nn.Module) -> tuple[str, ...] | None:
    """The attributes that the host's results depend on; None if these include more than constants and functions."""
    settings = {name: value for name, value in vars(host).items() if name not in _ATTRIBUTES_OF_ALL_MODULES}
    if any(True for _ in host.parameters()) or any(True for _ in host.buffers()) or any(True for _ in host.children()):
        return None
    if all(type(value) in (bool, int, float, str, type(None)) or callable(value) for value in settings.values()):
        return tuple(settings)
    return None


_ATTRIBUTES_OF_ALL_MODULES = {*vars(nn.Module()), PATCH_ATTR, "forward", "_old_forward", "_hf_hook"}


def _is_plain_layer_norm(host: Any, x: Tensor) -> bool:
    """Whether the host is PyTorch's layer norm over channels, and neither autocast nor its dtypes add a cast."""
    if plain_class_of(host) is not nn.LayerNorm or len(host.normalized_shape) != 1:
        return False
    if host.weight is not None and host.weight.dtype != x.dtype:
        return False
    return x.dtype == torch.float32 or (x.dtype != torch.float64 and not torch.is_autocast_enabled(x.device.type))


@dataclass(frozen=True)
class _RMSNorm:
    """The settings of an RMS norm of PyTorch or of a model of transformers.

    Attributes:
        name_of_eps: The attribute with the number that it adds to the mean square.
        shift: The number that it adds to its weight.
    """

    name_of_eps: str
    shift: float

    def eps(self, host: nn.Module, x: Tensor) -> float:
        value: float | None = getattr(host, self.name_of_eps)
        return torch.finfo(x.dtype).eps if value is None else value  # as nn.RMSNorm has it

    def applies_to(self, host: nn.Module, x: Tensor) -> bool:
        """Whether the parameters are as they were, and the input is of a dtype that is rounded."""
        return x.dtype != torch.float64 and x.numel() > 0 and set(host._parameters) <= {"weight"}


def _rms_norm_of(host: nn.Module) -> _RMSNorm | None:
    """The settings of a norm, if it is an RMS norm over the last axis, found by running it, since classes differ."""
    plain_class = plain_class_of(host)
    names = [name for name in ("variance_epsilon", "eps") if hasattr(host, name)]
    weight = host._parameters.get("weight")
    if plain_class is nn.LayerNorm or len(names) != 1 or set(host._parameters) - {"weight"}:
        return None
    shape = getattr(host, "normalized_shape", ()) if weight is None else weight.shape
    if len(shape) != 1 or any(True for _ in host.children()) or any(True for _ in host.buffers()):
        return None
    generator = torch.Generator().manual_seed(0)
    # The mean square of the second and third row is about as small as eps usually is.
    x = torch.randn(3, *shape, generator=generator) * torch.tensor([[1.0], [1e-2], [1e-3]])
    twin = copy.copy(host)
    random_weight = None if weight is None else nn.Parameter(torch.randn(shape, generator=generator))
    twin._parameters = {} if weight is None and "weight" not in host._parameters else {"weight": random_weight}
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = plain_class.forward(twin, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    for shift in (0.0, 1.0):
        norm = _RMSNorm(names[0], shift)
        expected = x * (x.square().mean(-1, keepdim=True) + norm.eps(host, x)).rsqrt()
        expected = expected if random_weight is None else expected * (random_weight + shift)
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, 1e-5, 1e-6):
            return norm
    return None


def compress_activations(model: nn.Module) -> None:
    """Patch every activation function and norm in blocks with an adapter that asks for it."""
    for block, layers in blocks_with_layers(model):
        if any(ActivationPatch.is_wanted(rule) for layer in layers for rule in layer.lbpwht_rule.values()):
            for host in _outermost(block, is_compressible):
                attach_to_block_module(host, functools.partial(ActivationPatch, host=host), block)


def _outermost(module: nn.Module, condition: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The modules inside a module that meet a condition, without those inside another one that meets it."""
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
