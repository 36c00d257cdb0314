"""Finds the forward pass that a layer belongs to when gradient checkpointing runs it again in the backward pass.

Autograd numbers the nodes of its graph in the order in which a thread creates them. The node that is executing when a
layer is run again was created in the layer's own forward pass, so its number identifies that pass and the part of it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .passes import ForwardPass
    from .records import LayoutRecord

_MOST_PASSES = 128


class PassHistory:
    """The most recent forward passes of a model, by the number of the first node that each may have created."""

    def __init__(self) -> None:
        self._passes: dict[int, deque[tuple[int, ForwardPass]]] = {}
        self._forgotten: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, one: ForwardPass) -> None:
        """Record that a pass begins, or continues in a rerun."""
        thread, start = threading.get_ident(), next_number()
        with self._lock:
            passes = self._passes.setdefault(thread, deque())
            if passes and passes[-1][1] is one:
                return
            passes.append((start, one))
            if len(passes) > _MOST_PASSES:
                passes.popleft()
                self._forgotten[thread] = passes[0][0]

    def of_current_node(self) -> list[ForwardPass] | None:
        """The passes that may have created the executing node; None if they may have been forgotten."""
        number = current_number()
        if number is None:
            return None
        found = []
        with self._lock:
            for thread, passes in self._passes.items():
                if number < self._forgotten.get(thread, 0):
                    return None
                latest = None
                for start, one in passes:
                    if start > number:
                        break
                    latest = one
                if latest is not None:
                    found.append(latest)
        return found or None


class _Rerun(threading.local):
    """The number of reruns of each layer, by name, for the node that one thread is executing."""

    node: Any = None
    counts: dict[str, int]


_rerun = _Rerun()


def forget_rerun() -> None:
    """Release the node of the last backward pass."""
    _rerun.node = None


def calls_to_rerun(one: ForwardPass, name: str) -> list[LayoutRecord]:
    """The records of a layer in the part of a pass that is run again; several if the call cannot be identified."""
    records = [call.record for call in one.calls if call.name == name]
    distinct = list(dict.fromkeys(records))
    if len(distinct) <= 1:
        return distinct
    node, number = torch._C._current_autograd_node(), current_number()
    assert number is not None
    if _rerun.node is not node:
        _rerun.node, _rerun.counts = node, {}
    count = _rerun.counts[name] = _rerun.counts.get(name, 0) + 1
    # With use_reentrant=True, the executing node ran this part in the forward pass, without creating further nodes.
    part = [call for call in one.calls if call.number == number + 1 and not call.had_grad]
    if not part:
        before = [index for index, call in enumerate(one.calls) if call.number <= number and call.had_grad]
        if not before or one.calls[before[-1]].region == 0:
            return distinct
        part = [call for call in one.calls if call.region == one.calls[before[-1]].region]
    of_name = [call.record for call in part if call.name == name]
    return of_name[count - 1 : count] or distinct


def next_number() -> int:
    """The number of the next node that this thread creates."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def current_number() -> int | None:
    """The number of the node that is executing in a backward pass; None outside of one."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def current_hook() -> Any:
    """The current hook on saved tensors: gradient checkpointing sets a new one for each part that it runs again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks else None


def in_backward() -> bool:
    """Whether a backward pass is running, so that a forward pass now is a rerun by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def the_only(answers: list[Any], name: str, what: str, values: list[Any] | None = None) -> Any:
    """The common answer, or the first of the values that go with the answers; None if there are no answers.

    Args:
        answers: What each of the passes that may be run again says.
        name: The layer's name, for the message.
        what: What the answers are, for the message.
        values: One for each answer.

    Raises:
        RuntimeError: the answers differ.
    """
    if any(answer != answers[0] for answer in answers):
        raise RuntimeError(cannot_be_told_apart(name, what))
    return (answers if values is None else values)[0] if answers else None


def cannot_be_told_apart(name: str, what: str) -> str:
    """The message for a layer that is run again for one of several passes, of which it is not known which."""
    return (
        f"Gradient checkpointing runs {name} again, and it is not known for which of several forward passes with "
        f"different {what}: they cannot be told apart. Call backward after each forward pass, or do without gradient "
        "checkpointing."
    )
