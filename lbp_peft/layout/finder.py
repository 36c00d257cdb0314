"""Finds the layout of each layer's input in the current forward pass, or in one that is run again.

The first forward pass with inputs of new shapes is traced, and the layouts are kept; later passes look them up. Layers
that gradient checkpointing runs again in the backward pass use the layouts of their own forward pass, see `reruns.py`.
Each pass also checks what else the layouts depend on, see `dependencies.py`.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bounded import BoundedCache
from ..encoder_of_pass import PassedLayer
from ..transforms import in_transform, outside_transforms
from . import compiled
from .dependencies import random_state, why_undecided
from .hooks import PassHooks
from .inputs import (
    assign_positions,
    describe_inputs,
    merge_size,
    named_inputs,
    positions_of_images,
    signature,
    tensors_in,
)
from .masks import mask_of, padding_masks_in
from .model_state import ModelState
from .notices import Notices
from .passes import ForwardPass, RecordedPositions, Trace, equal_or_none
from .positions import compact, mix_channels
from .records import (
    CALLED_ALONE,
    NOT_TRACED,
    LayoutRecord,
    fits,
    matching_record,
    positions_of_tokens,
    read_record,
    record_of_positions,
    token_shape,
)
from .reruns import (
    AmbiguousRerunError,
    PassHistory,
    ambiguity_message,
    calls_to_rerun,
    common_answer,
    forget_rerun,
    frames_to_rerun,
    in_backward,
)
from .target_check import PassedLayers, TargetCheck
from .tracer import PositionTracer

_MOST_TRACES = 64


class _Thread(threading.local):
    """The forward passes that one thread is running."""

    def __init__(self) -> None:
        self.passes: list[tuple[nn.Module, ForwardPass]] = []


class LayoutFinder:
    """Finds the [`TokenLayout`] of each adapted layer's input. All layers of a model share one finder."""

    def __init__(self) -> None:
        self.exact: frozenset[str] = frozenset()  # the names of layers whose backward pass is to be exact
        self.compiled_padding_masks: dict[str, Tensor] = {}
        self.layouts = ""  # a summary of the layouts of the current eager pass
        self.layers_warned_of: set[str] = set()  # when the model was compiled
        self._notices = Notices()
        self._hooks = PassHooks()
        self._merge_size = 1
        self._names: frozenset[str] = frozenset()
        self._others: dict[str, int] = {}
        self._checks_targets = False
        self._reset()

    def _reset(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._traces: OrderedDict[Hashable, Trace] = OrderedDict()
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._recorded_positions: RecordedPositions | None = None
        self.left_out: list[PassedLayer] = []  # in the last pass that was traced
        self._target_check = TargetCheck()
        self.num_traced = 0  # the number of passes that were traced
        self._history = PassHistory()
        # The records of layers that were not called by the model, by the shapes of their inputs.
        self._lone_records: BoundedCache[Hashable, LayoutRecord] = BoundedCache(_MOST_TRACES)
        self._state = ModelState(ignored=_is_adapted_layer)
        # Not a number: the compiler would make one dynamic if it differed between models.
        self.key = f"finder {next(_keys)}"
        compiled.FINDERS[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the hooks and the causes that were warned about, but none of the passes."""
        pickled = ("exact", "_notices", "_hooks", "_merge_size", "_names", "_others", "_checks_targets")
        empty = {"compiled_padding_masks": {}, "layouts": "", "layers_warned_of": set()}
        return empty | {name: self.__dict__[name] for name in pickled}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    # Watching a model

    def watch(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        others: Mapping[str, int] | None = None,
        checks_targets: bool = False,
    ) -> None:
        """Follow a model's forward passes from now on, by hooks. Call it again when the modules have changed.

        Args:
            model: The model.
            layers: The model's adapted layers, by name.
            others: The axis of the channels in the input of each layer that could be adapted but is not, by name.
            checks_targets: Whether to warn of these other layers if patches pass through them between adapted layers.
        """
        self.detach()
        self._names = frozenset(layers)
        self._others = dict(others or {})
        self._checks_targets = checks_targets
        self._model = weakref.ref(model)
        self._layers = weakref.WeakSet(layers.values())
        self._merge_size = merge_size(model)
        self._hooks.attach(self, model, layers)
        self._traces.clear()

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._hooks.detach()

    def model(self) -> nn.Module | None:
        """The model that is followed; None if it no longer exists."""
        return None if self._model is None else self._model()

    # Forward passes

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        """Begin a pass: a module that contains adapted layers is called."""
        thread = self._thread
        if thread.passes or not self._is_training(module):
            return
        if in_backward() and module is not self.model():  # checkpointing runs a part of the model again
            return
        forward_pass = self._begin(module, args, kwargs)
        self.layouts = forward_pass.trace.layouts
        thread.passes.append((module, forward_pass))
        if forward_pass.tracer is not None:
            # Positions are followed through compiled parts of the model too.
            forward_pass.contexts.enter_context(torch.compiler.set_stance("force_eager"))
            forward_pass.contexts.enter_context(forward_pass.tracer)

    def _is_training(self, module: nn.Module) -> bool:
        return module.training or any(layer.training for layer in self._layers)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> ForwardPass:
        """Find the trace of an earlier pass with the same inputs and state, or begin to trace this one."""
        exact = self.exact
        if in_backward():  # the whole model is run again
            answers = [other.exact for other in self._history.to_rerun()]
            exact = common_answer(answers, "the model", "exact_backward") or exact
        else:
            forget_rerun()
        inputs = named_inputs(module, args, kwargs)
        padding_masks = padding_masks_in(inputs)
        has_padding = None if in_transform() else tuple(bool(mask.any()) for mask in padding_masks.values())
        # The state is the one before the pass. If the pass changes it, the next pass is traced as well, since its code
        # may choose otherwise. transformers does so once, with the first loss (`config.problem_type`) or hidden states.
        key = (id(module), self._state.key(module), signature(inputs), has_padding)
        trace = self._traces.get(key)
        if trace is not None and trace.is_valid and trace.depends_on.are_unchanged(module, self._state):
            forward_pass = ForwardPass(trace, exact, padding_masks)
        elif torch.is_grad_enabled():
            forward_pass = self._begin_traced(module, inputs, ForwardPass(Trace(), exact, padding_masks, key=key))
        else:  # no layer needs its layout unless the pass is run again
            forward_pass = ForwardPass(Trace(is_valid=False), exact, padding_masks)
        self._history.begin(forward_pass)
        return forward_pass

    def _begin_traced(self, module: nn.Module, inputs: dict[str, object], forward_pass: ForwardPass) -> ForwardPass:
        """Give a pass a tracer that knows the positions of its inputs."""
        self.num_traced += 1
        if forward_pass.key not in self._traces:
            self._notices.note_inputs(describe_inputs(inputs) | self._state.described(module))
        tensors = [value for _, value in tensors_in(inputs) if isinstance(value, Tensor)]
        forward_pass.trace.input_shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
        forward_pass.generators = self._state.generators(module)
        forward_pass.unseen = self._state.unseen(module)
        forward_pass.random_state = random_state(forward_pass.generators)
        forward_pass.passed_layers = PassedLayers(self._others)
        forward_pass.tracer = PositionTracer(module, self.model(), partial(self._note_passed, forward_pass))
        with outside_transforms():
            forward_pass.texts = assign_positions(forward_pass.tracer, inputs, self._merge_size)
        return forward_pass

    def after(self, module: nn.Module) -> None:
        """End the pass, if the module that returns or raises is the one that began it."""
        thread = self._thread
        if not thread.passes or thread.passes[-1][0] is not module:
            return
        _, forward_pass = thread.passes.pop()
        if forward_pass.tracer is not None:
            self._keep(forward_pass)
        self.layouts = ""
        forward_pass.end()

    def _keep(self, forward_pass: ForwardPass) -> None:
        """Keep the trace of a pass that ends, for later passes with the same inputs."""
        trace = forward_pass.trace
        trace.layouts = trace.summary()
        if trace.is_ambiguous():  # calls may come in another order next time
            trace.is_valid = False
        self.left_out = forward_pass.passed_layers.left_out()
        if self._checks_targets and (model := self.model()) is not None:
            self._target_check.check(model, forward_pass.passed_layers.by_name, trace.records, self._notices)
        if forward_pass.tracer is not None and (read := self._read_without_a_call(forward_pass.tracer.applied, trace)):
            self._notices.note_read_without_a_call(read)
        if forward_pass.decided_by:
            trace.is_valid = False
            self._notices.note_decisions(forward_pass.decided_by)
        with self._lock:
            self._traces[forward_pass.key] = trace
            self._traces.move_to_end(forward_pass.key)
            if len(self._traces) > _MOST_TRACES:
                self._traces.popitem(last=False)

    def _read_without_a_call(self, applied: set[str], trace: Trace) -> list[str]:
        """The adapted layers whose weights were applied in a pass although the layers were never called."""
        parts = (name.split(".") for name in applied)
        containers = {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}
        return sorted(containers & self._names - trace.records.keys())

    def before_compiled(self, names: tuple[str, ...], args: tuple, kwargs: dict[str, object]) -> None:
        """Prepare for a call of the model that the compiler is about to trace; its arguments have these names."""
        compiled.note_inputs(self.key, args, kwargs)
        self.compiled_padding_masks = padding_masks_in({**dict(zip(names, args, strict=False)), **kwargs})

    def after_compiled(self) -> None:
        """Clean up after a call of the model that the compiler has traced."""
        self.compiled_padding_masks = {}

    # Traces

    def known(self, name: str, shapes: dict[str, tuple[int, ...]]) -> list[LayoutRecord]:
        """All records of a layer's inputs so far.

        If a part of the model is compiled by itself, these are the records of the current pass, otherwise those of all
        passes whose inputs had the same shapes.

        Args:
            name: The layer's name.
            shapes: The shapes of the inputs without the axis of images, by name or number.
        """
        if (forward_pass := self._current()) is not None:
            return forward_pass.trace.records.get(name, [])
        traces = [trace for trace in self._traces.values() if shapes and trace.has_inputs(list(shapes.values()))]
        return [record for trace in traces for record in trace.records.get(name, [])]

    def forget_traces(self) -> None:
        """Forget all traces, so that the next forward pass is traced."""
        self._traces.clear()

    @contextmanager
    def record_positions(self) -> Iterator[RecordedPositions]:
        """Trace all passes within the block, and yield an object that collects the positions of layers' tokens."""
        self.forget_traces()
        self._recorded_positions = RecordedPositions()
        try:
            yield self._recorded_positions
        finally:
            self._recorded_positions = None

    # Calls by layers

    def record(self, name: str, x: Tensor, channels_axis: int = -1) -> LayoutRecord:
        """The record of the input of a layer that is being called.

        Args:
            name: The layer's name.
            x: The layer's input.
            channels_axis: The axis of the channels in x.
        """
        if torch.compiler.is_dynamo_compiling():
            return compiled.record(self.key, name, x, channels_axis, self.layouts)
        forward_pass, shape = self._current(), token_shape(x, channels_axis)
        if forward_pass is None:
            return self._record_to_rerun(name, shape) if in_backward() else self._record_alone(x, channels_axis)
        number = forward_pass.counts.get(name, 0)
        forward_pass.counts[name] = number + 1
        if forward_pass.tracer is not None:
            record = self._record_traced(forward_pass, name, x, channels_axis)
        else:
            record = matching_record(forward_pass.trace.records.get(name, []), number, shape)
            if record is NOT_TRACED:
                forward_pass.trace.is_valid = False  # so that the next pass is traced again
                self._notices.note_not_traced(name)
        self._note(forward_pass, name, record)
        return record

    def _note(self, forward_pass: ForwardPass, name: str, record: LayoutRecord) -> None:
        frames = frames_to_rerun()
        forward_pass.note(name, record, frames)
        self._history.add_frames(forward_pass, frames)

    def _note_passed(self, forward_pass: ForwardPass, name: str, x: Tensor, output: Tensor) -> None:
        if forward_pass.tracer is None:
            return
        if self._recorded_positions is not None and (positions := forward_pass.tracer.positions(output)) is not None:
            self._recorded_positions.of_outputs.append(compact(positions))
        if forward_pass.passed_layers.asks_for(name):
            record = read_record(forward_pass.tracer, forward_pass.texts, x, self._others[name])
            forward_pass.passed_layers.note(name, x, output, record)

    def _record_traced(self, forward_pass: ForwardPass, name: str, x: Tensor, channels_axis: int) -> LayoutRecord:
        assert forward_pass.tracer is not None
        with forward_pass.tracer.pause():
            record = read_record(forward_pass.tracer, forward_pass.texts, x, channels_axis)
            if self._recorded_positions is not None:
                positions = positions_of_tokens(forward_pass.tracer, x, channels_axis)
                self._recorded_positions.of_inputs.setdefault(name, []).append(positions)
        forward_pass.trace.records.setdefault(name, []).append(record)
        if record.layout is not None or record.is_surprising:  # not in a head, which receives one token of each image
            forward_pass.passed_layers.note_adapted(name)
        # What code does after the last call of a layer has no effect on the layers.
        forward_pass.trace.depends_on.update(forward_pass.tracer.consulted)
        forward_pass.decided_by = forward_pass.decided_by or why_undecided(
            forward_pass.tracer.read_by, forward_pass.random_state, forward_pass.generators, forward_pass.unseen
        )
        return record

    def _record_alone(self, x: Tensor, channels_axis: int) -> LayoutRecord:
        """The record for a layer that is not called by the model: its input may be images."""
        key = (x.shape, channels_axis)
        record = self._lone_records.get(key)
        if record is None:
            with outside_transforms():
                positions = positions_of_images("", x, [], 1)
            is_image = x.dim() == 4 and channels_axis == 1
            record = CALLED_ALONE
            if positions is not None and is_image:
                record = record_of_positions(positions, x, channels_axis)
            self._lone_records[key] = record
        return record

    def note_call(self, name: str, x: Tensor, channels_axis: int = -1) -> None:
        """Record a call that needs no layout now: gradient checkpointing may run the layer again later."""
        if torch.compiler.is_dynamo_compiling():
            return
        if self._current() is not None:
            self.record(name, x, channels_axis)
        elif in_backward():
            with suppress(AmbiguousRerunError):
                self.record(name, x, channels_axis)

    def as_one_operation(self, x: Tensor, run: Callable[[], Tensor], channels_axis: int = -1) -> Tensor:
        """Run a function of x that only mixes the channels of each token; it is traced as a single operation."""
        if torch.compiler.is_dynamo_compiling():
            return run()
        forward_pass = self._current()
        if forward_pass is None or forward_pass.tracer is None:
            return run()
        with forward_pass.tracer.pause():
            output = run()
            with outside_transforms(), torch.no_grad():
                size = output.shape[channels_axis]
                positions = mix_channels(forward_pass.tracer.positions(x), size, channels_axis)
        forward_pass.tracer.continue_at(output, x, positions)
        return output

    def is_exact(self, name: str) -> bool:
        """Whether the backward pass of a layer that is being called is to be exact."""
        if torch.compiler.is_dynamo_compiling():
            return name in self.exact
        forward_pass = self._current()
        if forward_pass is None and in_backward():
            answers = [name in other.exact for other in self._history.to_rerun()]
            return bool(common_answer(answers, name, "exact_backward"))
        return name in (self.exact if forward_pass is None else forward_pass.exact)

    def padding_mask(self, name: str, record: LayoutRecord, x: Tensor) -> Tensor | None:
        """A mask of shape (N, L), True where a word is padding; None if the model was given no attention mask."""
        if not record.text:
            return None
        is_sequence_first = record.layout is not None and record.layout.axes == (0,)
        shape = x.shape[1::-1] if is_sequence_first else x.shape[:2]
        if torch.compiler.is_dynamo_compiling():
            mask = mask_of(self.compiled_padding_masks, record.text)
            return None if mask is None or mask.shape != shape else mask
        forward_pass = self._current()
        passes = [forward_pass] if forward_pass is not None else self._history.to_rerun() if in_backward() else []
        masks = [mask_of(other.padding_masks, record.text) for other in passes]
        masks = [None if mask is None or mask.shape != shape else mask for mask in masks]
        if not all(equal_or_none(mask, masks[0]) for mask in masks):
            raise AmbiguousRerunError(ambiguity_message(name, "attention masks"))
        return masks[0] if masks else None

    def warn_once(self, cause: str, message: str) -> None:
        """Warn, unless there was a warning for the same cause about any layer of this model."""
        self._notices.warn_once(cause, message)

    # Layers that are run again

    def _current(self) -> ForwardPass | None:
        passes = self._thread.passes
        return passes[-1][1] if passes else None

    def _record_to_rerun(self, name: str, shape: tuple[int, ...]) -> LayoutRecord:
        passes = self._history.to_rerun()
        records: list[LayoutRecord] = []
        for forward_pass in passes:
            records += [record for record in calls_to_rerun(forward_pass, name) if fits(record, shape)]
            self._history.add(forward_pass)
        record = common_answer(records, name, "layouts of tokens", key=lambda r: (r.layout, r.why_unknown, r.text))
        if record is None:
            return NOT_TRACED
        if len(passes) == 1:  # a part within the one that is run again will be run again by itself
            self._note(passes[0], name, record)
        return record


def _is_adapted_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of this package, whose attributes have no effect on the model's code."""
    return isinstance(module.__dict__.get("finder"), LayoutFinder)


_keys = itertools.count()
