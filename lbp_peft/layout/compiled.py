"""Provides layouts while torch.compile traces a model. They come from an eager pass: positions cannot be followed then.

If the model has not run eagerly yet, it runs once, on zeros of the shapes that are being compiled. The compiler calls
these functions as ordinary Python while it traces, and treats their results as constants of the graph.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bases import TokenLayout, TokenOrder

if TYPE_CHECKING:
    from .finder import LayoutFinder, LayoutRecord

FINDERS: weakref.WeakValueDictionary[int, LayoutFinder] = weakref.WeakValueDictionary()
_inputs: dict[int, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
_BATCH = 2


def note_inputs(key: int, args: tuple, kwargs: dict[str, Any]) -> None:
    """Record the shapes and dtypes of the inputs with which the model is called while the compiler traces it."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            _note_input(key, str(index), value.dtype, *(int(n) for n in value.shape[1:]))
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            _note_input(key, name, value.dtype, *(int(n) for n in value.shape[1:]))


@torch.compiler.assume_constant_result
def _note_input(key: int, name: str, dtype: torch.dtype, *shape: int) -> int:
    _inputs.setdefault(key, {})[name] = (shape, dtype)
    return 0


def record(key: int, name: str, x: Tensor, channels_axis: int) -> LayoutRecord:
    """The record of the input of a layer."""
    from .finder import LayoutRecord

    shape = list(x.shape)
    del shape[channels_axis]
    known, *grid, before, after, order, axes, packed, why, text = _plain_record(key, name, *(int(n) for n in shape[1:]))
    if not known:
        return LayoutRecord(why_unknown=why)
    return LayoutRecord(TokenLayout((grid[0], grid[1]), before, after, order, axes, packed), text=text)


@torch.compiler.assume_constant_result
def _plain_record(key: int, name: str, *shape: int) -> tuple:
    """The layout of a layer's inputs of shape (N, ...) as plain values, if exactly one is known."""
    finder = FINDERS[key]
    found = _found(finder, name, shape)
    if not found and key in _inputs:
        _run_eagerly(finder.model(), _inputs[key])
        found = _found(finder, name, shape)
    if len(found) != 1:
        why = "its tokens lay otherwise in different passes" if found else "the model has not run eagerly yet"
        return (False, 0, 0, 0, 0, None, None, 1, why, "")
    (layout, why, text), *_ = found
    if layout is None:
        return (False, 0, 0, 0, 0, None, None, 1, why, "")
    order = None if layout.order is None else tuple(layout.order)
    outside = layout.num_prefix_tokens, layout.num_suffix_tokens
    return (True, *layout.grid, *outside, order, layout.axes, layout.packed, "", text)


def _found(finder: LayoutFinder, name: str, shape: tuple[int, ...]) -> list[tuple[TokenLayout | None, str, str]]:
    from .finder import fits

    records = [r for r in finder.known(name) if r.shape[1:] == shape and fits(r, r.shape)]
    return list({(r.layout, r.why_unknown, r.text): None for r in records})


@torch.compiler.disable
def _run_eagerly(model: nn.Module | None, inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Run one forward pass that leaves nothing behind but its trace."""
    if model is None:
        return
    device = next(model.parameters()).device
    tensors = {name: torch.zeros(_BATCH, *shape, dtype=dtype, device=device) for name, (shape, dtype) in inputs.items()}
    args = [tensor for name, tensor in tensors.items() if name.isdigit()]
    kwargs = {name: tensor for name, tensor in tensors.items() if not name.isdigit()}
    state = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        model(*args, **kwargs)
    with torch.no_grad():
        for buffer, before in state:
            buffer.copy_(before)


__all__ = ["FINDERS", "TokenOrder", "note_inputs", "record"]
