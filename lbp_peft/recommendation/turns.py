"""Trains candidates in turns: other work on the machine affects their times alike, and their memory stops growing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import psutil
import torch
from tqdm.auto import tqdm

from ..measure.running import device_of
from .candidates import Candidate
from .runners import Runner, WorkerError
from .training import Step
from .trial import Trial

_FEWEST_ROUNDS, _MOST_ROUNDS, _FURTHER_ROUNDS = 4, 10, 6
_SECONDS = 10.0  # of the first rounds, as long as these are neither too few nor too many


class Scales(NamedTuple):
    """The median ratios of what was measured in turns to what was measured in trials.

    Attributes:
        seconds: Of step times.
        peak_bytes: Of peaks, without Python and its libraries.
    """

    seconds: float = 1.0
    peak_bytes: float = 1.0


class _Member(NamedTuple):
    """A candidate that trains.

    Attributes:
        trial: Its trial, whose step time and peak are replaced.
        seconds, peak_bytes: Those that were measured in the trial.
        step: Runs a step.
    """

    trial: Trial
    seconds: float
    peak_bytes: float
    step: Callable[[], Step]


class Turns:
    """Candidates that train in turns, a step of each in a round.

    The first candidate has a step in every round, so that the times of the others can be given relative to its time.

    Args:
        runner: It trains the candidates. Its model is not changed.
        deadline: The time, by `time.monotonic()`, at which the last round has to be over.
        progress: Whether to show a progress bar.
    """

    def __init__(self, runner: Runner, deadline: float, progress: bool):
        self._runner, self._deadline, self._progress = runner, deadline, progress
        self._members: list[_Member] = []
        self._rounds: list[dict[str, Step]] = []
        self._is_over = False

    def has(self, trial: Trial) -> bool:
        """Whether a candidate trains, given its trial."""
        return any(member.trial is trial for member in self._members)

    def train(self, tried: Sequence[tuple[Candidate, Trial]]) -> bool:
        """Train further candidates in a few rounds with the first one, and replace the times and peaks of their trials.

        Args:
            tried: Candidates with their trials, the most important ones first. Those at the end are left out if time or
                memory is short.

        Returns:
            Whether any of them took turns.
        """
        first = self._members[:1]
        started = self._start(tried)
        self._members += started
        taking_part = [*first, *started]
        seconds = sum(member.trial.seconds for member in taking_part)
        return self._take_turns(taking_part, max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(_SECONDS / max(seconds, 0.1)))))

    def go_on(self) -> None:
        """Train all candidates in further rounds, as long as there is time."""
        self._take_turns(self._members, _FURTHER_ROUNDS)

    @property
    def scales(self) -> Scales:
        """The ratios of the new figures to those of the trials; 1 as long as there were no rounds."""
        seconds = [member.trial.seconds / member.seconds for member in self._members if member.trial.is_timed]
        libraries = self._runner.libraries_bytes
        growths = [
            (member.trial.peak_bytes - libraries) / max(member.peak_bytes - libraries, 1)
            for member in self._members
            if member.trial.is_settled
        ]
        return Scales(*(statistics.median(ratios) if ratios else 1.0 for ratios in (seconds, growths)))

    def _start(self, tried: Sequence[tuple[Candidate, Trial]]) -> list[_Member]:
        """Start to train as many candidates as time and memory allow."""
        device = device_of(self._runner.job.model)
        free_bytes = 0.5 * psutil.virtual_memory().available
        if device.type == "cuda":
            free_bytes = 0.8 * torch.cuda.mem_get_info(device)[0]
        started: list[_Member] = []
        seconds_of_round = sum(member.trial.seconds for member in self._members[:1])
        for candidate, trial in tried:
            free_bytes -= max(trial.peak_bytes - self._runner.libraries_bytes, 0)
            seconds_of_round += trial.seconds
            is_late = time.monotonic() + trial.warm_up_seconds + _FEWEST_ROUNDS * seconds_of_round > self._deadline
            if self._is_over or is_late or (len(self._members) + len(started) >= 3 and free_bytes < 0):
                break
            try:
                step = self._runner.start_training(candidate, self._deadline)
            except (torch.OutOfMemoryError, MemoryError):
                break
            except WorkerError:  # all trainings ended with the process
                self._is_over = True
                return []
            started.append(_Member(trial, trial.seconds, trial.peak_bytes, step))
        return started

    def _take_turns(self, members: Sequence[_Member], most_rounds: int) -> bool:
        """Run rounds with these members, and replace the figures of their trials. Return whether there were any."""
        if self._is_over or len(members) < 2:
            return False
        rounds = _rounds(sum(member.trial.seconds for member in members), self._deadline, most_rounds)
        bar = tqdm(rounds, desc="step times and memory", total=most_rounds, leave=False, disable=not self._progress)
        before = len(self._rounds)
        try:
            for _ in bar:
                self._rounds.append({member.trial.label: member.step() for member in members})
        except (WorkerError, MemoryError, torch.OutOfMemoryError):  # the rounds before are still valid
            self._is_over = True
        if len(self._rounds) == before:
            return False
        first = self._members[0].trial.label
        seconds_of_first = statistics.median(steps[first].seconds for steps in self._rounds)
        for trial in (member.trial for member in members):
            together = [(steps[first], steps[trial.label]) for steps in self._rounds if trial.label in steps]
            # The median of each round's ratio to the first candidate varies less than the ratio of medians.
            trial.seconds = seconds_of_first * statistics.median(step.seconds / one.seconds for one, step in together)
            trial.is_timed = True
            if peak := together[-1][1].peak_bytes:
                trial.peak_bytes, trial.is_settled = peak, True
        return True


def _rounds(seconds: float, deadline: float, most: int) -> Iterable[int]:
    """Yield 0, 1, ... as long as there is time for another round.

    Args:
        seconds: The expected time of a round, which later rounds correct upwards.
        deadline: The time, by `time.monotonic()`, at which the last round has to be over.
        most: The most rounds.
    """
    for number in range(most):
        began = time.monotonic()
        if began + seconds > deadline:
            return
        yield number
        seconds = max(seconds, time.monotonic() - began)
