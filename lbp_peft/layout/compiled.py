"""Provides layouts while torch.compile traces a model. They come from an eager pass.

Positions cannot be followed while the compiler traces. If the model has not run eagerly yet, it runs once, on zeros of
the shapes that are being compiled. The compiler calls these functions as ordinary Python, and treats their results as
constants of the graph.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..bases.grids import TokenLayout
from ..bases.packed import PackedLayout

if TYPE_CHECKING:
    from .finder import LayoutFinder
    from .records import LayoutRecord

FINDERS: weakref.WeakValueDictionary[str, LayoutFinder] = weakref.WeakValueDictionary()
# The arguments that each finder's model is compiled for: tensors as (shape without batch, dtype), others unchanged.
_inputs: dict[str, dict[str, object]] = {}
_BATCH = 2


def note_inputs(key: str, args: tuple, kwargs: dict[str, object]) -> None:
    """Record the arguments with which the model is called while the compiler traces it."""
    _forget_inputs(key)
    for index, value in enumerate(args):
        _note(key, str(index), value)
    for name, value in kwargs.items():
        _note(key, name, value)


def _note(key: str, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        _note_tensor(key, name, value.dtype, *(int(n) for n in value.shape[1:]))
    elif value is None or isinstance(value, (bool, int, float, str)):
        _note_value(key, name, value)


@torch.compiler.assume_constant_result
def _forget_inputs(key: str) -> int:
    _inputs[key] = {}
    return 0


@torch.compiler.assume_constant_result
def _note_tensor(key: str, name: str, dtype: torch.dtype, *shape: int) -> int:
    _inputs[key][name] = (shape, dtype)
    return 0


@torch.compiler.assume_constant_result
def _note_value(key: str, name: str, value: object) -> int:
    _inputs[key][name] = value
    return 0


def record(key: str, name: str, x: Tensor, channels_axis: int, layouts: str) -> LayoutRecord:
    """The record of the input of a layer.

    Args:
        key: The key of the finder.
        name: The name of the layer.
        x: The input.
        channels_axis: The axis of the channels in x.
        layouts: The summary of the layouts of the eager pass that the compiled part belongs to; "" without one. The
            compiler guards on it.
    """
    from .records import LayoutRecord

    shape = list(x.shape)
    del shape[channels_axis]
    sizes = (int(n) for n in shape[1:])
    known, *grid, before, after, order, axes, packed, why, text = _plain_record(key, name, layouts, *sizes)
    if not known:
        return LayoutRecord(why_unknown=why)
    return LayoutRecord(TokenLayout((grid[0], grid[1]), before, after, order, axes, packed), text=text)


@torch.compiler.assume_constant_result
def _plain_record(key: str, name: str, layouts: str, *shape: int) -> tuple:
    """The layout of a layer's inputs of a shape (N, ...) as plain values, if exactly one is known."""
    finder, inputs = FINDERS[key], _inputs.get(key, {})
    records = _known_layouts(finder, name, shape, inputs)
    if not records and inputs:
        try:
            _run_eagerly(finder.model(), inputs)
        except Exception as error:  # a model may fail on zeros in any way
            warnings.warn(
                f"To find where its tokens lie, the model was run on zeros before it was compiled, and that failed "
                f"({type(error).__name__}: {error}). Its layers use exact backpropagation. Run it before compiling.",
                stacklevel=2,
            )
        records = _known_layouts(finder, name, shape, inputs)
    if len(records) != 1:
        why = "its tokens had different layouts in different passes" if records else "the model has not run eagerly yet"
        if name not in finder.layers_warned_of:
            finder.layers_warned_of.add(name)
            warnings.warn(
                f"{name} uses exact backpropagation in a compiled model: {why}. Run the model once with such inputs "
                "before compiling it, or set grid_size.",
                stacklevel=2,
            )
        return (False, 0, 0, 0, 0, None, None, 1, why, "")
    (layout, why, text), *_ = records
    if isinstance(layout, PackedLayout):
        layout, why = None, "its tokens lie on several grids, one after another, which only eager models can use"
        if "packed" not in finder.layers_warned_of:
            finder.layers_warned_of.add("packed")
            warnings.warn(
                f"{name} uses exact backpropagation, as do any layers like it: {why}. Do not compile the model, or "
                "give it images of one size at a time.",
                stacklevel=2,
            )
    if layout is None:
        return (False, 0, 0, 0, 0, None, None, 1, why, "")
    order = None if layout.order is None else tuple(layout.order)
    outside = layout.num_prefix_tokens, layout.num_suffix_tokens
    return (True, *layout.grid, *outside, order, layout.axes, layout.packed, "", text)


def _known_layouts(
    finder: LayoutFinder, name: str, shape: tuple[int, ...], inputs: dict[str, object]
) -> list[tuple[TokenLayout | None, str, str]]:
    """The distinct layouts, reasons and texts in all records of a layer's inputs of a shape (N, ...)."""
    from .records import fits

    shapes = {input_name: value[0] for input_name, value in inputs.items() if isinstance(value, tuple)}
    records = [r for r in finder.known(name, shapes) if r.shape[1:] == shape and fits(r, r.shape)]
    return list({(r.layout, r.why_unknown, r.text): None for r in records})


@torch.compiler.disable
def _run_eagerly(model: nn.Module | None, inputs: dict[str, object]) -> None:
    """Run one forward pass for its trace, and undo its other effects."""
    if model is None:
        return
    device = next(model.parameters()).device
    arguments = {
        name: torch.zeros(_BATCH, *value[0], dtype=value[1], device=device) if isinstance(value, tuple) else value
        for name, value in inputs.items()
    }
    args = [value for name, value in arguments.items() if name.isdigit()]
    kwargs = {name: value for name, value in arguments.items() if not name.isdigit()}
    state = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"), _own_hooks():
        model(*args, **kwargs)
    with torch.no_grad():
        for buffer, before in state:
            buffer.copy_(before)


def _own_hooks() -> AbstractContextManager:
    """Hide the tensors that are saved within the block from the caller's hooks: autograd calls only the innermost ones.

    A result that an operation saves is detached, since it would refer to the operation otherwise, and neither of them
    would ever be freed.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


__all__ = ["FINDERS", "note_inputs", "record"]
