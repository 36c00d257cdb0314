"""Forward passes of a model, and their traces."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .dependencies import Dependencies
from .records import LayoutRecord
from .reruns import next_number
from .target_check import PassedLayers
from .tracer import PositionTracer


@dataclass
class Trace:
    """The result of tracing a forward pass.

    Attributes:
        records: The records of each layer's calls, in order, by the layer's name.
        is_valid: Whether later passes with the same inputs may use it; if not, the next one is traced again.
        input_shapes: The shapes of all tensors that the model was given, without their first axes.
        layouts: A string that is the same for traces with the same layouts.
        depends_on: The tensors of the model by which the tokens were ordered.
    """

    records: dict[str, list[LayoutRecord]] = field(default_factory=dict)
    is_valid: bool = True
    input_shapes: tuple[tuple[int, ...], ...] = ()
    layouts: str = ""
    depends_on: Dependencies = field(default_factory=Dependencies)

    def has_inputs(self, shapes: list[tuple[int, ...]]) -> bool:
        """Whether its inputs had these shapes, without their axis of images, in any order."""
        # Labels and numbers, whose shapes are empty without their first axis, have no effect on layouts.
        return sorted(shape for shape in shapes if shape) == sorted(shape for shape in self.input_shapes if shape)

    def is_ambiguous(self) -> bool:
        """Whether inputs of one layer and one shape had different layouts in different calls."""
        return any(
            record.shape[1:] == following.shape[1:] and record.layout != following.layout
            for records in self.records.values()
            for record, following in itertools.pairwise(records)
        )

    def summary(self) -> str:
        """A string that is the same for traces with the same layouts."""
        layouts = ((name, *(record.layout for record in records)) for name, records in sorted(self.records.items()))
        return str(hash(tuple(layouts)))


@dataclass
class RecordedPositions:
    """Positions in a pass that is traced to check layouts.

    Attributes:
        of_inputs: The positions of the tokens of each adapted layer's inputs, call by call, by the layer's name.
        of_outputs: The positions of the outputs of layers that are not adapted, such as the patch embedding.
    """

    of_inputs: dict[str, list[Tensor | None]] = field(default_factory=dict)
    of_outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        name: The layer's name.
        record: The record that the layer used.
        number: The number of the next node of autograd's graph at that moment.
        had_grad: Whether autograd was on; it is off within gradient checkpointing with use_reentrant=True.
        frames: The frames of the nested parts of the pass that gradient checkpointing with use_reentrant=False will
            run again. The references are weak, since a frame holds the inputs of its part, which must be released
            together with the graph of the pass.
    """

    name: str
    record: LayoutRecord
    number: int
    had_grad: bool
    frames: tuple[weakref.ref[object], ...] = ()

    def is_in(self, frame: object) -> bool:
        """Whether the call was made in the part of the pass that a frame belongs to."""
        return any(other() is frame for other in self.frames)


@dataclass(eq=False)
class ForwardPass:
    """A forward pass of the model that is running, or a past one whose layers may be run again.

    Attributes:
        trace: The trace of this pass, or of an earlier one with the same inputs.
        exact: Names of the layers whose backward pass is to be exact.
        padding_masks: The padding masks of the texts that the model was given, by the names of their masks: True where
            a word is padding.
        key: The key under which the trace is kept.
        tracer: The tracer; None unless the pass is being traced.
        texts: The names of the texts, while the pass is being traced.
        passed_layers: The layers that patches pass through, while the pass is being traced.
        calls: The calls of layers so far.
        counts: The number of calls of each layer so far.
        contexts: The contexts that are entered until the pass ends.
        generators: The random generators that the model's Python code may use.
        unseen: The attributes of the model whose state cannot be compared.
        random_state: The state of these generators when tracing began.
        decided_by: An action of Python code before the last call of a layer that may make the next pass differ, such as
            "draws random numbers"; "" if there was none.
    """

    trace: Trace
    exact: frozenset[str]
    padding_masks: dict[str, Tensor]
    key: Hashable = None
    tracer: PositionTracer | None = None
    texts: dict[int, str] = field(default_factory=dict)
    passed_layers: PassedLayers = field(default_factory=PassedLayers)
    calls: list[Call] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    contexts: ExitStack = field(default_factory=ExitStack)
    generators: list[object] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    random_state: Hashable = None
    decided_by: str = ""

    def note(self, name: str, record: LayoutRecord, frames: tuple[object, ...]) -> None:
        """Record a call of a layer."""
        self.calls.append(Call(name, record, next_number(), torch.is_grad_enabled(), tuple(map(weakref.ref, frames))))

    def end(self) -> None:
        """End the pass, and release what only a running pass needs."""
        self.contexts.close()
        self.tracer = self.random_state = None

    def is_like(self, other: ForwardPass) -> bool:
        """Whether layers that are run again get the same layouts, settings and masks from both passes."""
        same_masks = self.padding_masks.keys() == other.padding_masks.keys() and all(
            equal_or_none(mask, other.padding_masks[name]) for name, mask in self.padding_masks.items()
        )
        return self.trace is other.trace and self.exact == other.exact and same_masks


def equal_or_none(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal, or both None."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
