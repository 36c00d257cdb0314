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
from .runners import Runner, WorkerError
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


def take_turns(runner: Runner, tried: Sequence[tuple[Candidate, Trial]], deadline: float, progress: bool) -> Scales:
    """Train candidates in turns, a step of each in a round, and replace the times and peaks of their trials.

    Args:
        runner: It trains them. Its model is not changed.
        tried: Candidates with their trials, the most important ones first. Those at the end are left out if time or
            memory is short.
        deadline: The time, by `time.monotonic()`, at which the last round has to be over.
        progress: Whether to show a progress bar.

    Returns:
        The ratios of the new figures to the old ones; 1 if there was no time for rounds.
    """
    with warnings.catch_warnings(), undisturbed(runner.job.model):
        warnings.simplefilter("ignore")
        chosen, steps = _start_trainings(runner, tried, deadline)
        if len(chosen) < 2:
            return Scales()
        rounds = _rounds(sum(trial.seconds for trial in chosen), deadline)
        bar = tqdm(rounds, desc="step times and memory", total=_MOST_ROUNDS, leave=False, disable=not progress)
        measured: list[list[Step]] = []
        with suppress(WorkerError, MemoryError, torch.OutOfMemoryError):  # the rounds before are still valid
            for _ in bar:
                measured.append([step() for step in steps])
    if not measured:
        return Scales()
    steps_of_each = list(zip(*measured, strict=True))
    times = [[step.seconds for step in steps] for steps in steps_of_each]
    # The median of each round's ratio to the first program varies less than the ratio of medians.
    typical = [statistics.median(times[0]) * statistics.median(ratios(seconds, times[0])) for seconds in times]
    scale = statistics.median(seconds / trial.seconds for trial, seconds in zip(chosen, typical, strict=True))
    growths = []
    for trial, seconds, steps_of_one in zip(chosen, typical, steps_of_each, strict=True):
        trial.seconds, trial.is_timed = seconds, True
        if peak := steps_of_one[-1].peak_bytes:
            growths.append((peak - runner.libraries_bytes) / max(trial.peak_bytes - runner.libraries_bytes, 1))
            trial.peak_bytes, trial.is_settled = peak, True
    return Scales(scale, statistics.median(growths) if growths else 1.0)


def _start_trainings(
    runner: Runner, tried: Sequence[tuple[Candidate, Trial]], deadline: float
) -> tuple[list[Trial], list[Callable[[], Step]]]:
    """Start to train as many candidates as time and memory allow.

    Returns:
        Their trials, and for each a function that runs a step.
    """
    device = device_of(runner.job.model)
    free_bytes = 0.5 * psutil.virtual_memory().available
    if device.type == "cuda":
        free_bytes = 0.8 * torch.cuda.mem_get_info(device)[0]
    chosen: list[Trial] = []
    steps: list[Callable[[], Step]] = []
    for candidate, trial in tried:
        free_bytes -= max(trial.peak_bytes - runner.libraries_bytes, 0)
        rounds = _FEWEST_ROUNDS * (trial.seconds + sum(other.seconds for other in chosen))
        is_late = time.monotonic() + trial.warm_up_seconds + rounds > deadline
        if is_late or (len(chosen) >= 3 and free_bytes < 0):
            break
        try:
            steps.append(runner.start_training(candidate, deadline))
        except (torch.OutOfMemoryError, MemoryError):
            break
        except WorkerError:  # all trainings ended with the process
            return [], []
        chosen.append(trial)
    return chosen, steps


def _rounds(seconds: float, deadline: float) -> Iterable[int]:
    """Yield 0, 1, ... as long as there is time for another round.

    Args:
        seconds: The expected time of a round, which later rounds correct upwards.
        deadline: The time, by `time.monotonic()`, at which the last round has to be over.
    """
    for number in range(_MOST_ROUNDS):
        began = time.monotonic()
        if began + seconds > deadline:
            return
        yield number
        seconds = max(seconds, time.monotonic() - began)
