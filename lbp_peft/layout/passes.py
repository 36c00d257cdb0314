"""Forward passes of a model, and what is kept of them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dependencies import Dependencies
from .records import LayoutRecord
from .reruns import next_number
from .tracer import PositionTracer


@dataclass
class Trace:
    """The result of tracing a forward pass.

    Attributes:
        records: Of each layer's calls in order, by the layer's name.
        is_valid: Whether later passes with the same inputs may use it; if not, the next one is traced again.
        input_shapes: Of all tensors that the model was given, without their first axes.
        layouts: The same for traces with the same layouts.
        depends_on: Tensors of the model by which the tokens were ordered.
    """

    records: dict[str, list[LayoutRecord]] = field(default_factory=dict)
    is_valid: bool = True
    input_shapes: tuple[tuple[int, ...], ...] = ()
    layouts: str = ""
    depends_on: Dependencies = field(default_factory=Dependencies)

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
        frames: Of the parts of the pass, one within the other, that gradient checkpointing with use_reentrant=False
            will run again.
    """

    name: str
    record: LayoutRecord
    number: int
    had_grad: bool
    frames: tuple[Any, ...] = ()


@dataclass(eq=False)
class ForwardPass:
    """A forward pass of the model that is running, or a past one whose layers may be run again.

    Attributes:
        trace: What is known of it.
        exact: Names of the layers whose backward pass is to be exact.
        padding_masks: Of the texts that the model was given, by the names of their masks: True where a word is only
            padding.
        key: Under which its trace is kept.
        tracer: While it is being traced.
        texts: Names of the texts, while it is being traced.
        calls: Of layers, so far.
        counts: How often each was called.
        contexts: In force until it ends.
        generators: Of random numbers, that the model's Python code may draw from.
        random_state: Their state when tracing began.
        decided_by: What Python code did before the last call of a layer that may make the next pass differ, such as
            "draws random numbers"; "" if nothing.
    """

    trace: Trace
    exact: frozenset[str]
    padding_masks: dict[str, Tensor]
    key: Hashable = None
    tracer: PositionTracer | None = None
    texts: dict[int, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    contexts: ExitStack = field(default_factory=ExitStack)
    generators: list[Any] = field(default_factory=list)
    random_state: Hashable = None
    decided_by: str = ""

    def note(self, name: str, record: LayoutRecord, frames: tuple[Any, ...]) -> None:
        """Record a call of a layer."""
        self.calls.append(Call(name, record, next_number(), torch.is_grad_enabled(), frames))

    def end(self) -> None:
        """End the pass, and release what only a running pass needs."""
        self.contexts.close()
        self.tracer = self.random_state = None

    def is_like(self, other: ForwardPass) -> bool:
        """Whether layers that are run again get the same in both."""
        same_masks = self.padding_masks.keys() == other.padding_masks.keys() and all(
            same(mask, other.padding_masks[name]) for name, mask in self.padding_masks.items()
        )
        return self.trace is other.trace and self.exact == other.exact and same_masks


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal, or both None."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
