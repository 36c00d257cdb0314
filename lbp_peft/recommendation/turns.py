"""Trains candidates in turns: other work on the machine affects their times alike, and their memory stops growing."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import psutil
import torch
from tqdm.auto import tqdm

from ..measure.timing import ratios
from ..measure.undisturbed import device_of, undisturbed
from .candidates import Candidate
from .processes import Apart, Here, WorkerError
from .training import Step
from .trial import Trial

_FEWEST_ROUNDS, _MOST_ROUNDS = 4, 10


class Scales(NamedTuple):
    """The median ratios of what was measured in turns to what was measured in trials.

    Attributes:
        seconds: Of step times.
        peak_bytes: Of peaks, without Python and its libraries.
    """

    seconds: float = 1.0
    peak_bytes: float = 1.0


def take_turns(
    place: Apart | Here,
    tried: Sequence[tuple[Candidate, Trial]],
    end: float,
    progress: bool,
) -> Scales:
    """Train candidates in turns, a step of each in a round, and replace what their trials say of time and memory.

    Args:
        place: Where they train. Its model is not changed.
        tried: Candidates with their trials, the most important ones first. Those at the end are left out if time or
            memory is short.
        end: The time, by `time.monotonic()`, at which it has to be over.
        progress: Whether to show a progress bar.

    Returns:
        How the new figures differ from the old ones; ratios of 1 if there was no time for rounds.
    """
    with warnings.catch_warnings(), undisturbed(place.job.model):
        warnings.simplefilter("ignore")
        chosen, steps = _started(place, tried, end)
        if len(chosen) < 2:
            return Scales()
        rounds = _rounds(sum(trial.seconds for trial in chosen), end)
        bar = tqdm(rounds, desc="step times and memory", total=_MOST_ROUNDS, leave=False, disable=not progress)
        measured: list[list[Step]] = []
        with suppress(WorkerError, MemoryError, torch.OutOfMemoryError):  # the rounds before are as good
            for _ in bar:
                measured.append([step() for step in steps])
    if not measured:
        return Scales()
    of_each = list(zip(*measured, strict=True))
    times = [[step.seconds for step in own] for own in of_each]
    # The median of each round's ratio to the first program varies less than the ratio of medians.
    typical = [statistics.median(times[0]) * statistics.median(ratios(seconds, times[0])) for seconds in times]
    scale = statistics.median(seconds / trial.seconds for trial, seconds in zip(chosen, typical, strict=True))
    growths = []
    for trial, seconds, own in zip(chosen, typical, of_each, strict=True):
        trial.seconds, trial.is_timed = seconds, True
        if peak := own[-1].peak_bytes:
            growths.append((peak - place.libraries) / max(trial.peak_bytes - place.libraries, 1))
            trial.peak_bytes, trial.is_settled = peak, True
    return Scales(scale, statistics.median(growths) if growths else 1.0)


def _started(
    place: Apart | Here, tried: Sequence[tuple[Candidate, Trial]], end: float
) -> tuple[list[Trial], list[Callable[[], Step]]]:
    """The trials for which time and memory suffice, and a function for each that runs a step."""
    device = device_of(place.job.model)
    room = 0.5 * psutil.virtual_memory().available
    if device.type == "cuda":
        room = 0.8 * torch.cuda.mem_get_info(device)[0]
    chosen: list[Trial] = []
    steps: list[Callable[[], Step]] = []
    for candidate, trial in tried:
        room -= max(trial.peak_bytes - place.libraries, 0)
        rounds = _FEWEST_ROUNDS * (trial.seconds + sum(one.seconds for one in chosen))
        is_late = time.monotonic() + trial.warm_up_seconds + rounds > end
        if is_late or (len(chosen) >= 3 and room < 0):
            break
        try:
            steps.append(place.training(candidate, end))
        except (torch.OutOfMemoryError, MemoryError):
            break
        except WorkerError:  # all trainings ended with the process
            return [], []
        chosen.append(trial)
    return chosen, steps


def _rounds(seconds: float, end: float) -> Iterable[int]:
    """The rounds that the time allows. Each takes so many seconds, or as long as the longest one so far."""
    for number in range(_MOST_ROUNDS):
        began = time.monotonic()
        if began + seconds > end:
            return
        yield number
        seconds = max(seconds, time.monotonic() - began)
