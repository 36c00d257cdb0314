"""Quantized copies of parameters, kept for as long as the parameters do not change."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn

from .base import NumberFormat, Quantized


class Origin(NamedTuple):
    """Where the values of a parameter lie in memory. It keeps neither the parameter nor its memory alive.

    It refers to the storage and not to the parameter, since a parameter with weak references cannot be swapped, which
    is how `nn.Module.to` and `load_state_dict` may be told to convert parameters (`torch.__future__`).
    """

    storage: Callable[[], UntypedStorage | None]
    offset: int


def origin(source: Tensor | None) -> Origin | None:
    """The origin of a parameter; None for any other tensor, since only copies of parameters are kept."""
    if not isinstance(source, nn.Parameter):
        return None
    return Origin(weakref.ref(source.untyped_storage()), int(source.storage_offset()))


# Quantized copies of weights by storage and offset, each with the settings of its quantization and a fingerprint of the
# weight. They are freed with the storage.
_copies: weakref.WeakKeyDictionary[UntypedStorage, dict[int, tuple]] = weakref.WeakKeyDictionary()


def forget(parameters: Iterable[Tensor]) -> None:
    """Free the quantized copies of these parameters."""
    for parameter in parameters:
        _copies.pop(parameter.untyped_storage(), None)


def quantized_weight(
    number_format: NumberFormat, weight: Tensor, hadamard_size: int, source: Tensor | Origin | None
) -> Quantized:
    """Quantize a weight, or return the copy that was kept if the weight has not changed since.

    Args:
        number_format: The format.
        weight: Shape (C_out, C_in).
        hadamard_size: See [`NumberFormat.quantize_weight`].
        source: The parameter that `weight` is, or is a cast or a transpose of, or its origin. None: nothing is kept.
    """
    if not number_format.caches_weight(weight.device) or torch.compiler.is_compiling():
        return number_format.quantize_weight(weight, hadamard_size)
    place = origin(source) if isinstance(source, Tensor) else source
    storage = None if place is None else place.storage()
    if place is None or storage is None:
        return number_format.quantize_weight(weight, hadamard_size)
    key = (number_format.name, hadamard_size, weight.dtype, weight.shape, weight.stride())
    fingerprint = _fingerprint(weight)
    copies = _copies.setdefault(storage, {})
    kept = copies.get(place.offset)
    if kept is None or kept[0] != key or not torch.equal(kept[1], fingerprint):
        kept = copies[place.offset] = (key, fingerprint, number_format.quantize_weight(weight, hadamard_size))
    quantized: Quantized = kept[2]
    return quantized


def _fingerprint(weight: Tensor) -> Tensor:
    """A vector (C_in,) that changes when the weight changes.

    The version counter and the address do not always change with it: PEFT merges adapters by `weight.data += ...`, and
    some optimisers and sharded training also write without changing the counter.
    """
    return torch.mv(weight.float().t(), torch.from_numpy(_weights_of_rows(len(weight))))


@functools.lru_cache(maxsize=256)
def _weights_of_rows(rows: int) -> np.ndarray:
    """Random numbers from 1 to 2, so that every row counts and no pattern among rows cancels."""
    return np.random.default_rng(0).uniform(1, 2, rows).astype(np.float32)
