"""Finds the layout of each layer's input in the current forward pass, or in one that is run again.

The first forward pass with inputs of new shapes is traced, and the layouts are kept; later passes look them up. Layers
that gradient checkpointing runs again in the backward pass use the layouts of their own forward pass, see `reruns.py`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.grids import LayoutError, TokenLayout
from ..bounded import BoundedCache
from ..transforms import outside_transforms
from . import compiled
from .inputs import named_inputs, positions_of_images, signature, start, tensors_in
from .operations import with_mixed_channels
from .positions import FIRST_TEXT, mixed
from .recognition import NoTokensError, SingleTokenError, UnknownLayoutError, read_layout
from .reruns import PassHistory, calls_to_rerun, current_hook, forget_rerun, next_number
from .tracer import PositionTracer

_MOST_TRACES = 64


class GridMismatchError(ValueError):
    """A `grid_size` or `num_prefix_tokens` from the configuration does not fit the number of tokens."""


@dataclass(frozen=True)
class LayoutRecord:
    """What the tracer found about the input of one call of a layer.

    Attributes:
        layout: Where its tokens lie; None where that is not known.
        why_unknown: The reason.
        remedy: What the user can do about it.
        steps: Operations between the model's input and the layer's.
        text: Name of the input that the tokens are words of; "" for patches of an image.
        shape: Of the input, without channels.
        is_surprising: Whether there may be tokens that would be worth it if their layout were known.
        source: Number of the input that the tokens come from.
    """

    layout: TokenLayout | None = None
    why_unknown: str = ""
    steps: int = 0
    text: str = ""
    shape: tuple[int, ...] = ()
    is_surprising: bool = True
    source: int = 0
    remedy: str = UnknownLayoutError.remedy


NOT_TRACED = LayoutRecord(why_unknown="it was not called in the forward pass in which the model was traced")


CALLED_ALONE = LayoutRecord(why_unknown="it was called by itself, so that its input cannot be followed from an image")


@dataclass
class Trace:
    """The result of tracing a forward pass: the records of each layer's calls in order, by the layer's name."""

    records: dict[str, list[LayoutRecord]] = field(default_factory=dict)
    is_complete: bool = True
    input_shapes: tuple[tuple[int, ...], ...] = ()
    layouts: str = ""

    def has_inputs(self, shapes: list[tuple[int, ...]]) -> bool:
        """Whether its inputs had these shapes, without their axis of images, in any order."""
        given, own = (sorted(shape for shape in several if shape) for several in (shapes, self.input_shapes))
        return given == own  # labels and numbers decide no layout

    def is_ambiguous(self) -> bool:
        """Whether inputs of one shape, of one layer, lay otherwise in different calls."""
        return any(
            one.shape[1:] == other.shape[1:] and one.layout != other.layout
            for records in self.records.values()
            for one, other in itertools.pairwise(records)
        )

    def summary(self) -> str:
        """The same for traces with the same layouts."""
        return str(hash(tuple((name, *(r.layout for r in found)) for name, found in sorted(self.records.items()))))


@dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        name: The layer's name.
        record: The record that the layer used.
        number: The number of the next node of autograd's graph at that moment.
        had_grad: Whether autograd was on; it is off within gradient checkpointing with use_reentrant=True.
        region: The number of the part of the pass that gradient checkpointing with use_reentrant=False will run again;
            0 outside of such parts.
    """

    name: str
    record: LayoutRecord
    number: int
    had_grad: bool
    region: int


@dataclass(eq=False)
class ForwardPass:
    """A forward pass of the model that is running, or a past one whose layers may be run again.

    Attributes:
        trace: What is known of it.
        exact: Names of the layers whose backward pass is to be exact.
        paddings: Of the texts that the model was given, by the names of their masks: True for words that are only
            padding.
        tracer: While it is being traced.
        texts: Names of the texts, while it is being traced.
        calls: Of layers, so far.
        counts: How often each was called.
        contexts: In force until it ends.
    """

    trace: Trace
    exact: frozenset[str]
    paddings: dict[str, Tensor]
    tracer: PositionTracer | None = None
    texts: dict[int, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    contexts: ExitStack = field(default_factory=ExitStack)
    _hook: Any = None
    _region: int = 0

    def note(self, name: str, record: LayoutRecord) -> None:
        """Record a call of a layer."""
        if (hook := current_hook()) is not None and hook is not self._hook:
            self._region += 1
        self._hook = hook
        region = 0 if hook is None else self._region
        self.calls.append(Call(name, record, next_number(), torch.is_grad_enabled(), region))

    def end(self) -> None:
        """End the pass, and release what only a running pass needs."""
        self.contexts.close()
        self.tracer = self._hook = None

    def is_like(self, other: ForwardPass) -> bool:
        """Whether layers that are run again get the same in both."""
        same_paddings = self.paddings.keys() == other.paddings.keys() and all(
            _same(padding, other.paddings[name]) for name, padding in self.paddings.items()
        )
        return self.trace is other.trace and self.exact == other.exact and same_paddings


class _Thread(threading.local):
    """The forward passes that one thread is running."""

    def __init__(self) -> None:
        self.passes: list[tuple[nn.Module, ForwardPass]] = []


class LayoutFinder:
    """Knows the [`TokenLayout`] of each adapted layer's input. One is shared by all layers of a model."""

    def __init__(self) -> None:
        self.exact: frozenset[str] = frozenset()
        self.compiled_paddings: dict[str, Tensor] = {}
        self.layouts = ""  # of the eager pass under way
        self.told: set[str] = set()
        self._warned: set[str] = set()
        self._hooks: list[Any] = []
        self._merge_size = 1
        self._start_anew()

    def _start_anew(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._traces: OrderedDict[Hashable, Trace] = OrderedDict()
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._kept: dict[str, list[Tensor | None]] | None = None
        self._history = PassHistory()
        self._alone: BoundedCache[Hashable, LayoutRecord] = BoundedCache(_MOST_TRACES)
        # One pass for each distinct trace, setting and mask, for layers whose own pass cannot be found.
        self._kinds: list[ForwardPass] = []
        self.key = next(_keys)
        compiled.FINDERS[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the hooks and the causes that were warned about, but none of the passes."""
        kept = ("exact", "_warned", "_hooks", "_merge_size")
        return {"compiled_paddings": {}, "layouts": "", "told": set()} | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    # Watching a model

    def watch(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """Follow this model's forward passes from now on, by hooks. To be called again when its modules have changed.

        Args:
            model: The model.
            layers: The model's adapted layers, by name.
        """
        self.detach()
        self._model = weakref.ref(model)
        self._layers = weakref.WeakSet(layers.values())
        self._merge_size = next((size for m in model.modules() if (size := _merge_size(m))), 1)
        around = {""}
        for name in layers:
            parts = name.split(".")
            around.update(".".join(parts[:length]) for length in range(1, len(parts)))
        for name in sorted(around):
            module = model.get_submodule(name)
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            before = _Before(self, None if name else tuple(inspect.signature(module.forward).parameters))
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(_After(self, not name), always_call=True))
        self._traces.clear()

    def detach(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a pass: a module that contains adapted layers is called."""
        thread = self._thread
        if thread.passes or not self._is_training(module):
            return
        if _in_backward() and module is not self.model():  # a part of the model is run again, which begins no pass
            return
        one = self._begin(module, args, kwargs)
        self.layouts = one.trace.layouts
        thread.passes.append((module, one))
        if one.tracer is not None:
            one.contexts.enter_context(torch.compiler.set_stance("force_eager"))  # for parts that are compiled apart
            one.contexts.enter_context(one.tracer)

    def _is_training(self, module: nn.Module) -> bool:
        return module.training or any(layer.training for layer in self._layers)

    def after(self, module: nn.Module) -> None:
        """End the pass, if the module that returns or raises is the one that began it."""
        thread = self._thread
        if not thread.passes or thread.passes[-1][0] is not module:
            return
        _, one = thread.passes.pop()
        if one.tracer is not None:
            one.trace.layouts = one.trace.summary()
            if one.trace.is_ambiguous():  # calls may come in another order, so each pass is traced
                one.trace.is_complete = False
        self.layouts = ""
        one.end()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ForwardPass:
        exact = self.exact
        if _in_backward():  # the whole model is run again
            exact = (
                _the_only([other.exact for other in self._passes_to_rerun()], "the model", "exact_backward") or exact
            )
        else:
            forget_rerun()
        inputs = named_inputs(module, args, kwargs)
        key = (_structure(module), signature(inputs))
        paddings = {name: value == 0 for name, value in inputs.items() if _is_mask(name, value)}
        with self._lock:
            trace = self._traces.get(key)
            is_new = trace is None or not trace.is_complete
            if is_new and not torch.is_grad_enabled():  # no layer needs its layout unless the pass is run again
                trace, is_new = Trace(is_complete=False), False
            elif is_new:
                trace = self._traces[key] = trace or Trace()
                if len(self._traces) > _MOST_TRACES:
                    self._traces.popitem(last=False)
            assert trace is not None
            if key in self._traces:
                self._traces.move_to_end(key)
            one = ForwardPass(trace, exact, paddings)
            if is_new:
                trace.is_complete = True
                tensors = [value for _, value in tensors_in(inputs) if isinstance(value, Tensor)]
                trace.input_shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
                one.tracer = PositionTracer(module)
                with outside_transforms():
                    one.texts = start(one.tracer, inputs, self._merge_size)
            if not any(one.is_like(other) for other in self._kinds):
                self._kinds = [*self._kinds[-_MOST_TRACES:], one]
        self._history.add(one)
        return one

    def model(self) -> nn.Module | None:
        """The model that is followed; None if it no longer exists."""
        return None if self._model is None else self._model()

    def known(self, name: str, shapes: dict[str, tuple[int, ...]]) -> list[LayoutRecord]:
        """All that was found of a layer's inputs so far.

        It is that of the pass under way, where a part of the model is compiled by itself; else of all passes whose
        inputs had these shapes, by name or number, without their axis of images.
        """
        if (one := self._current()) is not None:
            return one.trace.records.get(name, [])
        traces = [trace for trace in self._traces.values() if shapes and trace.has_inputs(list(shapes.values()))]
        return [record for trace in traces for record in trace.records.get(name, [])]

    @contextmanager
    def keeping_positions(self) -> Iterator[dict[str, list[Tensor | None]]]:
        """Trace passes anew within the block, and yield a dictionary that collects the positions of layers' tokens."""
        self._traces.clear()
        self._kept = {}
        try:
            yield self._kept
        finally:
            self._kept = None

    # What a layer asks

    def record(self, name: str, x: Tensor, channels_axis: int = -1) -> LayoutRecord:
        """The record of the input of a layer that is being called.

        Args:
            name: The layer's name.
            x: The layer's input.
            channels_axis: The axis of the channels in x.
        """
        if torch.compiler.is_dynamo_compiling():
            return compiled.record(self.key, name, x, channels_axis, self.layouts)
        one, shape = self._current(), token_shape(x, channels_axis)
        if one is None:
            return self._record_to_rerun(name, shape) if _in_backward() else self._record_alone(x, channels_axis)
        number = one.counts.get(name, 0)
        one.counts[name] = number + 1
        if one.tracer is not None:
            record = _read(one, x, channels_axis)
            if self._kept is not None:
                self._kept.setdefault(name, []).append(_positions_of_tokens(one, x, channels_axis))
            _put(one.trace.records.setdefault(name, []), number, record)
        else:
            record = fitting(one.trace.records.get(name, []), number, shape)
            if record is NOT_TRACED:
                one.trace.is_complete = False
        one.note(name, record)
        return record

    def _record_alone(self, x: Tensor, channels_axis: int) -> LayoutRecord:
        """The record for a layer that is not called by the model: its input may be images."""
        key = (x.shape, channels_axis)
        record = self._alone.get(key)
        if record is None:
            with outside_transforms():
                positions = positions_of_images("", x, [], 1)
            is_image = x.dim() == 4 and channels_axis == 1
            record = CALLED_ALONE
            if positions is not None and is_image:
                record = _read_positions(positions, x, channels_axis)
            self._alone[key] = record
        return record

    def note_call(self, name: str, x: Tensor, channels_axis: int = -1) -> None:
        """Record a call that needs no layout now: gradient checkpointing may run the layer again later."""
        if not torch.compiler.is_dynamo_compiling() and self._current() is not None:
            self.record(name, x, channels_axis)

    def as_one_operation(self, x: Tensor, run: Callable[[], Tensor], channels_axis: int = -1) -> Tensor:
        """Run a function of x that only mixes the channels of each token; it is traced as a single operation."""
        if torch.compiler.is_dynamo_compiling():
            return run()
        one = self._current()
        if one is None or one.tracer is None:
            return run()
        with one.tracer.paused():
            output = run()
        with outside_transforms(), torch.no_grad():
            size = output.shape[channels_axis]
            positions = with_mixed_channels(one.tracer.positions(x), size, channels_axis)
        one.tracer.continue_at(output, x, positions)
        return output

    def is_exact(self, name: str) -> bool:
        """Whether the backward pass of a layer that is being called is to be exact."""
        if torch.compiler.is_dynamo_compiling():
            return name in self.exact
        one = self._current()
        if one is None and _in_backward():
            return _the_only([name in other.exact for other in self._passes_to_rerun()], name, "exact_backward")
        return name in (self.exact if one is None else one.exact)

    def padding(self, name: str, record: LayoutRecord, x: Tensor) -> Tensor | None:
        """A mask of shape (N, L), True where a word is padding; None if the model was given no attention mask."""
        if not record.text:
            return None
        if torch.compiler.is_dynamo_compiling():
            padding = mask_of(self.compiled_paddings, record.text)
            return None if padding is None or padding.shape != x.shape[: padding.dim()] else padding
        one = self._current()
        passes = [one] if one is not None else self._passes_to_rerun() if _in_backward() else []
        paddings = [mask_of(other.paddings, record.text) for other in passes]
        paddings = [None if p is None or p.shape != x.shape[: p.dim()] else p for p in paddings]
        if not all(_same(p, paddings[0]) for p in paddings):
            raise RuntimeError(_cannot_be_told_apart(name, "attention masks"))
        return paddings[0] if paddings else None

    def warn_once(self, cause: str, message: str) -> None:
        """Warn, unless there was a warning for the same cause about any layer of this model."""
        if cause not in self._warned and not torch.compiler.is_dynamo_compiling():
            self._warned.add(cause)
            warnings.warn(message, stacklevel=2)

    # Layers that are run again

    def _current(self) -> ForwardPass | None:
        passes = self._thread.passes
        return passes[-1][1] if passes else None

    def _passes_to_rerun(self) -> list[ForwardPass]:
        """The passes that the code that is run again now may belong to."""
        return self._history.of_current_node() or self._kinds

    def _record_to_rerun(self, name: str, shape: tuple[int, ...]) -> LayoutRecord:
        found = []
        for one in self._passes_to_rerun():
            found += [record for record in calls_to_rerun(one, name) if fits(record, shape)]
            self._history.add(one)
        record = _the_only([(r.layout, r.why_unknown, r.text) for r in found], name, "layouts of tokens", found)
        return record or NOT_TRACED


class _Before:
    """A forward pre-hook."""

    def __init__(self, finder: LayoutFinder, names: tuple[str, ...] | None):
        self.finder = finder
        self.names = names  # of the arguments of the whole model

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.finder.before(module, args, kwargs)
        elif self.names is not None:
            compiled.note_inputs(self.finder.key, args, kwargs)
            inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
            self.finder.compiled_paddings = {
                name: value == 0 for name, value in inputs.items() if _is_mask(name, value)
            }


class _After:
    """A forward hook."""

    def __init__(self, finder: LayoutFinder, is_root: bool):
        self.finder = finder
        self.is_root = is_root

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.finder.after(module)
        elif self.is_root:
            self.finder.compiled_paddings = {}


def given_layout(
    num_tokens: int, record: LayoutRecord, grid_size: tuple[int, int], before: int | None, after: int | None
) -> TokenLayout:
    """The layout for a grid given in the configuration.

    Raises:
        GridMismatchError: the grid does not fit the number of tokens.
    """
    rest = num_tokens - grid_size[0] * grid_size[1]
    if before is None and after is None:
        seen = record.layout
        if rest == 0:
            before = after = 0
        elif seen is not None and seen.num_outside == rest:
            before, after = seen.num_prefix_tokens, seen.num_suffix_tokens
    else:
        before, after = before or 0, after or 0
    if before is None or after is None or before + after != rest:
        given = [f"grid_size={grid_size}"]
        given += [f"num_prefix_tokens={before}"] if before else []
        given += [f"num_suffix_tokens={after}"] if after else []
        total = num_tokens - rest + (before or 0) + (after or 0)
        hint = (
            f"If {rest} of them come before the grid, set num_prefix_tokens to that; else "
            if before is None and rest > 0
            else ""
        )
        raise GridMismatchError(
            f"{' and '.join(given)} makes {total} tokens, but {num_tokens} arrived. {hint}"
            "correct grid_size, or leave it out to have the grid found from the model and the image."
        )
    return TokenLayout(grid_size, before, after)


def mask_of(masks: dict[str, Tensor], text: str) -> Tensor | None:
    """The mask, or the padding, that belongs to a text, by name: decoder_attention_mask to decoder_input_ids."""
    for ending in ("input_ids", "inputs_embeds"):
        if text.endswith(ending) and (mask := masks.get(f"{text.removesuffix(ending)}attention_mask")) is not None:
            return mask
    return None


def _is_mask(name: str, value: Any) -> bool:
    """Whether an argument is an attention mask (N, L) of ones and zeros; those of floating point may be summands."""
    is_mask = name.endswith("attention_mask") and isinstance(value, Tensor) and value.dim() == 2
    return is_mask and (not value.is_floating_point() or not value.requires_grad)


def _read(one: ForwardPass, x: Tensor, channels_axis: int) -> LayoutRecord:
    assert one.tracer is not None
    trail, shape = one.tracer.trail(x), token_shape(x, channels_axis)
    if trail is None:
        why = "its tokens do not come from the model's input"
        return LayoutRecord(None, why, 0, "", shape, is_surprising=x.dim() > 2)
    lost = f" (positions were lost in {trail.lost_by!r})" if trail.lost_by else ""
    if not trail.is_certain and channels_axis == -1:
        why = "its input may have its channels along either of two axes"
        return LayoutRecord(None, why, trail.steps, "", shape)
    if trail.positions is None:
        return LayoutRecord(None, f"it is not known where its tokens lie{lost}", trail.steps, "", shape)
    record = _read_positions(trail.positions, x, channels_axis)
    text = one.texts.get(record.source, "") if record.source >= FIRST_TEXT else ""
    return replace(record, why_unknown=record.why_unknown and record.why_unknown + lost, steps=trail.steps, text=text)


def _positions_of_tokens(one: ForwardPass, x: Tensor, channels_axis: int) -> Tensor | None:
    assert one.tracer is not None
    positions = one.tracer.positions(x)
    return None if positions is None else mixed(positions, channels_axis).squeeze(channels_axis)


def _read_positions(positions: Tensor, x: Tensor, channels_axis: int) -> LayoutRecord:
    shape = token_shape(x, channels_axis)
    with outside_transforms(), torch.no_grad():
        try:
            found = read_layout(mixed(positions, channels_axis).squeeze(channels_axis))
        except UnknownLayoutError as error:
            benign = (SingleTokenError, NoTokensError) if x.dim() == 2 else SingleTokenError
            is_surprising = not isinstance(error, benign)
            return LayoutRecord(None, str(error), shape=shape, is_surprising=is_surprising, remedy=error.remedy)
    return LayoutRecord(found.layout, shape=shape, source=found.source)


def _put(records: list[LayoutRecord], number: int, record: LayoutRecord) -> None:
    if number < len(records):
        records[number] = record
    else:
        records.append(record)


def fitting(records: list[LayoutRecord], number: int, shape: tuple[int, ...]) -> LayoutRecord:
    """The record of the same call in the traced pass, or else the only record with this number of tokens."""
    if number < len(records) and fits(records[number], shape):
        return records[number]
    others = {(r.layout, r.text): r for r in records if r.layout is not None and fits(r, shape)}
    return next(iter(others.values())) if len(others) == 1 else NOT_TRACED


def fits(record: LayoutRecord, shape: tuple[int, ...]) -> bool:
    """Whether an input has the number of tokens in a record; its shape is given without channels."""
    layout = record.layout
    return layout is None or num_tokens(shape, layout.axes) == layout.num_tokens * layout.packed


def num_tokens(shape: tuple[int, ...], axes: tuple[int, ...] | None = None) -> int:
    """The number of tokens along some axes of a shape without channels; None: along all axes but the first."""
    return math.prod(shape[1:] if axes is None else (shape[axis] for axis in axes if axis < len(shape)))


def token_shape(x: Tensor, channels_axis: int) -> tuple[int, ...]:
    """The shape of an input without its axis of channels."""
    shape = list(x.shape)
    del shape[channels_axis]
    return tuple(shape)


def _structure(module: nn.Module) -> int:
    """Changes when modules, hooks, strides or forward methods do. Replicas, made for one pass, count by their kinds."""
    is_replica = getattr(module, "_is_replica", False)
    found: list[Hashable] = []
    left = [module]
    while left:  # module.modules() takes five times as long
        one = left.pop()
        attributes = one.__dict__
        found.append(
            (
                id(type(one)) if is_replica else id(one),
                attributes.get("stride"),
                id(attributes.get("forward")),
                len(one._forward_pre_hooks) + len(one._forward_hooks),
            )
        )
        left.extend(child for child in one._modules.values() if child is not None)
    return hash(tuple(found))


def _merge_size(module: nn.Module) -> int:
    size = getattr(module, "spatial_merge_size", None)
    return size if isinstance(size, int) else 0


def _the_only(answers: list[Any], name: str, what: str, values: list[Any] | None = None) -> Any:
    """The common answer, or the first of the values that go with the answers; None if there are no answers.

    Raises:
        RuntimeError: the answers differ.
    """
    if any(answer != answers[0] for answer in answers):
        raise RuntimeError(_cannot_be_told_apart(name, what))
    return (answers if values is None else values)[0] if answers else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _cannot_be_told_apart(name: str, what: str) -> str:
    return (
        f"Gradient checkpointing runs {name} again, and it is not known for which of several forward passes with "
        f"different {what}: they cannot be told apart. Call backward after each forward pass, or do without gradient "
        "checkpointing."
    )


def _in_backward() -> bool:
    """Whether a backward pass is running, so that a forward pass now is a rerun by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


_keys = itertools.count()


__all__ = ["GridMismatchError", "LayoutError", "LayoutFinder", "LayoutRecord", "given_layout"]
