"""Runs a layer again in the backward pass in the state that it had in the forward pass.

The layer may change in between: its scaling, its mode, its frozen weights, or the tensors that
`torch.func.functional_call` had put into it. A gradient computed with the changed layer would be silently wrong, so the
forward pass records the state of the layer. Its tensors are saved by `ctx.save_for_backward`, with which autograd
detects changes in place as it does for plain layers; everything else is copied. The backward pass restores this state
while the layer runs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Attributes that every module has and that no result depends on, mostly hooks; they are not restored.
_NOT_RECORDED = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_CONSTANTS = frozenset({bool, int, float, str, type(None)})
_MAPPINGS = (dict, OrderedDict, defaultdict)


class LayerRecord:
    """The state of a layer when the record is made: the attributes of the layer and of all modules inside it.

    Lists, tuples, sets and dictionaries among the attributes are copied. Other objects are recorded by reference:
    changes inside them are not undone.

    Args:
        layer: The layer to record.

    Attributes:
        layer: The recorded layer.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self._tensors: list[Tensor] = []
        memo: dict[int, Any] = {}
        self._attributes = [
            (
                module,
                {
                    name: value if type(value) in _CONSTANTS else self._record(value, memo)
                    for name, value in vars(module).items()
                    if name not in _NOT_RECORDED
                },
            )
            for module in layer.modules()
        ]
        self._are_parameters = [isinstance(tensor, nn.Parameter) for tensor in self._tensors]

    def take_tensors(self) -> list[Tensor]:
        """All tensors that the layer holds (parameters, buffers, other attributes), each once.

        The record gives them up: the caller passes them to an autograd function, which saves them.
        """
        tensors, self._tensors = self._tensors, []
        return tensors

    def leaves(self, tensors: Sequence[Tensor], trained: Sequence[bool]) -> list[Tensor]:
        """The saved tensors as leaves, detached from any graph; only the trained ones require gradients."""
        return [
            _leaf(tensor, is_parameter, needed)
            for tensor, is_parameter, needed in zip(tensors, self._are_parameters, trained, strict=True)
        ]

    @contextmanager
    def put_back(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Restore the recorded state within the block, with these tensors in place of the recorded ones.

        Changes that the layer makes to itself within the block are discarded, since the forward pass made them already.
        """
        memo: dict[int, Any] = {}
        states = []
        for module, attributes in self._attributes:
            current = vars(module)
            recorded = {name: value for name, value in current.items() if name in _NOT_RECORDED}
            recorded.update({name: _restore(value, tensors, memo) for name, value in attributes.items()})
            states.append((module, current, recorded))
        try:
            for module, _, recorded in states:
                object.__setattr__(module, "__dict__", recorded)
            yield
        finally:
            for module, current, _ in states:
                object.__setattr__(module, "__dict__", current)

    def _record(self, value: Any, memo: dict[int, Any]) -> Any:
        """Copy an attribute, with slots in place of tensors. An object that occurs repeatedly is copied once."""
        if isinstance(value, Tensor):
            if id(value) not in memo:
                memo[id(value)] = _Slot(len(self._tensors))
                self._tensors.append(value)
        elif type(value) in _MAPPINGS:
            if id(value) not in memo:
                copy = memo[id(value)] = value.copy()
                for key, item in value.items():
                    if type(item) not in _CONSTANTS:
                        copy[key] = self._record(item, memo)
        elif type(value) is list:
            if id(value) not in memo:
                copy = memo[id(value)] = []
                copy.extend(self._record(item, memo) for item in value)
        elif type(value) is tuple:
            return tuple(self._record(item, memo) for item in value)
        elif type(value) is set:
            memo.setdefault(id(value), value.copy())
        return memo.get(id(value), value)


class _Slot:
    """Stands for a tensor in a record."""

    def __init__(self, index: int):
        self.index = index


def _restore(value: Any, tensors: Sequence[Tensor], memo: dict[int, Any]) -> Any:
    """The inverse of [`LayerRecord._record`]: fill the slots with tensors. The record itself is not changed."""
    cls = type(value)
    if cls in _CONSTANTS:
        return value
    if cls is _Slot:
        return tensors[value.index]
    if cls is tuple:
        return tuple(_restore(item, tensors, memo) for item in value)
    if cls not in _MAPPINGS and cls not in (list, set):
        return value
    if id(value) not in memo:
        copy = memo[id(value)] = value.copy()
        if cls is list:
            copy[:] = [_restore(item, tensors, memo) for item in value]
        elif cls is not set:
            copy.update({key: _restore(item, tensors, memo) for key, item in value.items()})
    return memo[id(value)]


def to_save(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors to pass to `ctx.save_for_backward`: aliases of plain tensors, and all others unchanged.

    An alias shares its tensor's version counter, but `tensor.data = ...` does not affect it. Tensors of other classes
    may lose attributes when they are detached, and ZeRO-3 needs its own, whose data it releases in between.
    """
    plain = (Tensor, nn.Parameter)
    return [t.detach() if type(t) in plain and not hasattr(t, "ds_status") else t for t in tensors]


def _leaf(tensor: Tensor, is_parameter: bool, trained: bool) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) and not trained:
        return tensor  # for instance a quantized weight
    if is_parameter:
        return nn.Parameter(tensor.detach(), requires_grad=trained)
    return tensor.detach().requires_grad_(trained)


def same_autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """A function that creates the autocast context of this moment, since the backward pass runs outside it."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
