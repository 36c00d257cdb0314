"""Times of several programs, taken in turns, and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def interleaved(runs: Sequence[Callable[[], Result]], rounds: Iterable[object]) -> list[list[Result]]:
    """Call every function once a round, one after the other, and return what each gave in all rounds.

    What else the machine does meanwhile slows neighbours alike, so compare times within a round, as
    [`ratios`] does.
    """
    results: list[list[Result]] = [[] for _ in runs]
    for _ in rounds:
        for run, own in zip(runs, results, strict=True):
            own.append(run())
    return results


def rounds_within(minutes: float, rounds: int) -> Iterator[int]:
    """0, 1, ... up to `rounds`; stops before a round that, at the pace so far, would end after `minutes`.

    The first round is always given.
    """
    start = time.perf_counter()
    for number in range(rounds):
        if number and (time.perf_counter() - start) * (number + 1) / number > 60 * minutes:
            return
        yield number


def now() -> float:
    """Seconds on a clock, read once the device has done all it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of each round's time to the reference's in the same round."""
    return [own / other for own, other in zip(times, reference, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value, three times that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@torch.no_grad()
def touch(model: torch.nn.Module) -> None:
    """Write to the trained weights, as an optimiser does between two steps: what was derived from them is outdated."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1)
