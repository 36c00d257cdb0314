"""Estimates the remaining time of an experiment, over all methods and seeds."""

from __future__ import annotations

import time

from tqdm.auto import tqdm


class Remaining:
    """Estimates the remaining time from the number of runs that this process has finished and the time they took.

    Args:
        runs: The number of training runs in all; each counts the same.
    """

    def __init__(self, runs: int):
        self.runs = runs
        self.finished = 0  # runs
        self.fraction = 0.0  # of the current run
        self._done_before = 0.0  # by another process, which this one resumes
        self._start = time.monotonic()

    def skip(self) -> None:
        """Count a run that was finished before this process started."""
        self.finished += 1
        self._done_before += 1

    def begin(self, fraction: float) -> None:
        """Begin a run, a fraction of which was done before this process started."""
        self.fraction = fraction
        self._done_before += fraction

    def at(self, fraction: float) -> None:
        """Set the fraction of the current run that is done."""
        self.fraction = fraction

    def end(self) -> None:
        """Count the current run as finished."""
        self.finished, self.fraction = self.finished + 1, 0.0

    def seconds(self) -> float | None:
        """The estimated remaining seconds; None while nothing is done."""
        done = self.finished + self.fraction
        own = done - self._done_before
        return (time.monotonic() - self._start) * (self.runs - done) / own if own > 0 else None

    def shown(self) -> list[str]:
        """Text for a progress bar: the number of the run and the remaining time; empty if there is only one run."""
        seconds = self.seconds()
        if self.runs == 1 or seconds is None:
            return []
        number = min(self.finished + 1, self.runs)
        return [f"run {number}/{self.runs}, {tqdm.format_interval(seconds)} left in all"]
