"""Finds the forward pass, and the call in it, that a layer belongs to when gradient checkpointing runs it again.

With use_reentrant=False, PyTorch keeps a frame object for each part of a pass that will be run again. It is reached
through the hooks on saved tensors that are in force, in the forward pass as in the rerun, so the frame identifies the
part.

With use_reentrant=True, the part is run again by the node of autograd's graph that ran it before. Autograd numbers
nodes in the order in which a thread creates them, so the number of the node that is executing identifies the part.

Parts may be nested. A part within another is run again with the outer one first, and by itself later; what is found in
the first rerun is recorded as a call for the second.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils import checkpoint as _checkpointing

if TYPE_CHECKING:
    from .passes import ForwardPass
    from .records import LayoutRecord

Answer = TypeVar("Answer")

_MOST_PASSES = 128
_MOST_DISTINCT = 64
_Frame: object = getattr(_checkpointing, "_CheckpointFrame", ())


class PassHistory:
    """The most recent forward passes of a model, each with the number of the first node that it may have created."""

    def __init__(self) -> None:
        self._passes: dict[int, deque[tuple[int, ForwardPass]]] = {}
        self._forgotten: dict[int, int] = {}
        self._by_frame: weakref.WeakKeyDictionary[object, ForwardPass] = weakref.WeakKeyDictionary()
        # One pass for each distinct trace, setting and mask, for layers whose own pass cannot be found.
        self._distinct: list[ForwardPass] = []
        self._lock = threading.Lock()

    def begin(self, forward_pass: ForwardPass) -> None:
        """Record that a pass begins."""
        with self._lock:
            if not any(forward_pass.is_like(other) for other in self._distinct):
                self._distinct = [*self._distinct[-_MOST_DISTINCT:], forward_pass]
        self.add(forward_pass)

    def add(self, forward_pass: ForwardPass) -> None:
        """Record that a pass begins, or continues in a rerun."""
        thread, start = threading.get_ident(), next_number()
        with self._lock:
            passes = self._passes.setdefault(thread, deque())
            if passes and passes[-1][1] is forward_pass:
                return
            passes.append((start, forward_pass))
            if len(passes) > _MOST_PASSES:
                passes.popleft()
                self._forgotten[thread] = passes[0][0]

    def add_frames(self, forward_pass: ForwardPass, frames: tuple[object, ...]) -> None:
        """Record that frames of parts that will be run again belong to a pass."""
        for frame in frames:
            self._by_frame[frame] = forward_pass

    def to_rerun(self) -> list[ForwardPass]:
        """The passes that may be the one whose code is run again now."""
        return self._candidates() or self._distinct

    def _candidates(self) -> list[ForwardPass]:
        """The passes that may be the one that is run again now; empty if they may have been forgotten."""
        frame, _ = rerun_frame()
        if frame is not None and (forward_pass := self._by_frame.get(frame)) is not None:
            return [forward_pass]
        number = current_number()
        if number is None:
            return []
        candidates = []
        with self._lock:
            for thread, passes in self._passes.items():
                if number < self._forgotten.get(thread, 0):
                    return []
                latest = None
                for start, forward_pass in passes:
                    if start > number:
                        break
                    latest = forward_pass
                if latest is not None:
                    candidates.append(latest)
        return candidates


class _Rerun(threading.local):
    """The number of reruns of each layer, by name, of the part that one thread is running again."""

    part: object = None  # a node, or the hook of the rerun of a frame
    counts: Counter[str]


_rerun = _Rerun()


def forget_rerun() -> None:
    """Release the node of the last backward pass."""
    _rerun.part = None


def calls_to_rerun(forward_pass: ForwardPass, name: str) -> list[LayoutRecord]:
    """The records of a layer in the part of a pass that is run again; several if the call cannot be identified."""
    distinct = list(dict.fromkeys(call.record for call in forward_pass.calls if call.name == name))
    if len(distinct) <= 1:
        return distinct
    frame, hook = rerun_frame()
    if frame is not None:
        calls = [call for call in forward_pass.calls if call.is_in(frame)]
    else:  # use_reentrant=True: the part was run, without autograd, right after the executing node had been created
        calls = [call for call in forward_pass.calls if not call.had_grad]
        number = current_number()
        calls = list(itertools.dropwhile(lambda call: number is None or call.number <= number, calls))
    part = torch._C._current_autograd_node() if hook is None else hook
    if _rerun.part is not part:
        _rerun.part, _rerun.counts = part, Counter()
    count = _rerun.counts[name]
    _rerun.counts[name] += 1
    of_name = [call.record for call in calls if call.name == name]
    return of_name[count : count + 1] or distinct


def next_number() -> int:
    """The number of the next node that this thread creates."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def current_number() -> int | None:
    """The number of the node that is executing in a backward pass; None outside of one."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def frames_to_rerun() -> tuple[object, ...]:
    """The frames of the nested parts of the forward pass that the current code will be run again with."""
    return tuple(frame for pack in _hooks() for frame, is_rerun in [_frame_of(pack)] if frame and not is_rerun)


def rerun_frame() -> tuple[object, object]:
    """The frame of the innermost part that is being run again, and the hook of that rerun; or None and None."""
    for pack in reversed(_hooks()):
        frame, is_rerun = _frame_of(pack)
        if is_rerun:
            return frame, pack
    return None, None


def _hooks() -> list[Callable[..., object]]:
    """The hooks in force that pack saved tensors, the outermost first."""
    autograd = torch._C._autograd
    hooks: list[tuple[Callable[..., object], Callable[..., object]]] = []
    try:
        while top := autograd._top_saved_tensors_default_hooks(False):
            hooks.append(top)
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
    return [pack for pack, _ in reversed(hooks)]


def _frame_of(pack: Callable[..., object]) -> tuple[object, bool]:
    """The frame that a hook of gradient checkpointing belongs to, and whether it is that of a rerun."""
    if not isinstance(_Frame, type):
        return None, False
    function = getattr(pack, "_torchdynamo_orig_callable", pack)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned
            continue
        if isinstance(value, _Frame):
            return value, False
        if isinstance(value, weakref.ref) and isinstance(value(), _Frame):
            return value(), True
    return None, False


class AmbiguousRerunError(RuntimeError):
    """A layer is run again, and it is not known for which of several forward passes."""


def in_backward() -> bool:
    """Whether a backward pass is running, so that a forward pass now is a rerun by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def common_answer(
    answers: Sequence[Answer], name: str, subject: str, key: Callable[[Answer], object] | None = None
) -> Answer | None:
    """The answer that all passes that may be run again have in common; None if there are no passes.

    Args:
        answers: The answer of each of these passes.
        name: The layer's name, for the message.
        subject: The subject of the answers, such as "layouts of tokens", for the message.
        key: A function of an answer by which answers are compared; None: they are compared themselves.

    Raises:
        AmbiguousRerunError: the answers differ.
    """
    keys: list[object] = list(answers) if key is None else [key(answer) for answer in answers]
    if any(other != keys[0] for other in keys):
        raise AmbiguousRerunError(ambiguity_message(name, subject))
    return answers[0] if answers else None


def ambiguity_message(name: str, subject: str) -> str:
    """The message for a layer that is run again for an unknown one of several passes."""
    return (
        f"Gradient checkpointing runs {name} again, and it is not known for which of several forward passes with "
        f"different {subject}: they cannot be told apart. Call backward after each forward pass, or do without "
        "gradient checkpointing."
    )
