"""Times candidates in turns, so that other work on the machine affects them all alike."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence

import psutil
import torch
from tqdm.auto import tqdm

from ..measure.steps import idle_optimiser, timed_step
from ..measure.timing import interleaved, ratios
from ..measure.undisturbed import device_of, undisturbed
from ..measure.warming_up import warmed_up
from .candidates import Candidate, sharing_copy
from .trial import Job, Trial

_FEWEST_ROUNDS, _MOST_ROUNDS = 2, 7


def time_in_turns(
    job: Job, tried: Sequence[tuple[Candidate, Trial]], libraries: float, end: float, progress: bool
) -> float:
    """Replace the step times of trials by those from rounds in which their candidates take turns in this process.

    Args:
        job: The model, which is not changed, and the data.
        tried: Candidates with their trials, the most important ones first. Those at the end are left out if time or
            memory is short.
        libraries: The bytes of the trials' peak memory that are Python and its libraries.
        end: The time, by `time.monotonic()`, at which it has to be over.
        progress: Whether to show a progress bar.

    Returns:
        The median ratio of the new to the old times; 1 if there was no time for rounds.
    """
    with warnings.catch_warnings(), undisturbed(job.model):
        warnings.simplefilter("ignore")
        chosen, runs = _prepared(job, tried, libraries, end)
        if len(chosen) < 2:
            return 1.0
        rounds = _rounds(sum(trial.seconds for trial in chosen), end)
        bar = tqdm(rounds, desc="step times", total=_MOST_ROUNDS, leave=False, disable=not progress)
        times = interleaved(runs, bar)
    if not times[0]:
        return 1.0
    # The median of each round's ratio to the first program varies less than the ratio of medians.
    typical = [statistics.median(times[0]) * statistics.median(ratios(seconds, times[0])) for seconds in times]
    scales = [seconds / trial.seconds for trial, seconds in zip(chosen, typical, strict=True)]
    for trial, seconds in zip(chosen, typical, strict=True):
        trial.seconds, trial.is_timed = seconds, True
    return statistics.median(scales)


def _prepared(
    job: Job, tried: Sequence[tuple[Candidate, Trial]], libraries: float, end: float
) -> tuple[list[Trial], list[Callable[[], float]]]:
    """The trials for which time and memory suffice, and a function for each that runs a step and returns its time."""
    device = device_of(job.model)
    room = 0.5 * psutil.virtual_memory().available
    if device.type == "cuda":
        room = 0.8 * torch.cuda.mem_get_info(device)[0]
    chosen: list[Trial] = []
    runs: list[Callable[[], float]] = []
    for candidate, trial in tried:
        room -= max(trial.peak_bytes - libraries, 0)
        rounds = _FEWEST_ROUNDS * (trial.seconds + sum(one.seconds for one in chosen))
        is_late = time.monotonic() + trial.warm_up_seconds + rounds > end
        if is_late or (len(chosen) >= 3 and room < 0):
            break
        try:
            runs.append(_warm_step(job, candidate))
        except (torch.OutOfMemoryError, MemoryError):
            break
        chosen.append(trial)
    return chosen, runs


def _warm_step(job: Job, candidate: Candidate) -> Callable[[], float]:
    """A function that runs a training step and returns its time, after the steps that trace and compile the model."""
    model = candidate.applied(sharing_copy(job.model), job.heads).train()
    optimiser = idle_optimiser([parameter for parameter in model.parameters() if parameter.requires_grad])
    batch = job.batches[0]

    def step() -> float:
        return sum(timed_step(model, batch, job.loss, optimiser))

    warmed_up(model, step)
    return step


def _rounds(seconds: float, end: float) -> Iterable[int]:
    """The rounds that the time allows. Each takes so many seconds, or as long as the longest one so far."""
    for number in range(_MOST_ROUNDS):
        began = time.monotonic()
        if began + seconds > end:
            return
        yield number
        seconds = max(seconds, time.monotonic() - began)
