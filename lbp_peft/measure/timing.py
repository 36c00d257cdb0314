"""Times several programs in turns, and computes the spread of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def run_interleaved(
    runs: Sequence[Callable[[], Result]], rounds: Iterable[object], unmeasured: int = 0
) -> list[list[Result]]:
    """Call all functions once in each round, and return the results of each function.

    Other work on the machine slows all functions of a round alike, so compare times within a round, as [`ratios`] does.

    Args:
        runs: The functions.
        rounds: As many rounds as it has items.
        unmeasured: How many times a function is called before the call whose result counts. Training steps need one:
            the step after another method's takes longer, because it gets memory back that the C library has just
            returned to the system.
    """
    results: list[list[Result]] = [[] for _ in runs]
    for _ in rounds:
        for run, results_of_run in zip(runs, results, strict=True):
            for _ in range(unmeasured):
                run()
            results_of_run.append(run())
    return results


def rounds_within(minutes: float, rounds: int) -> Iterator[int]:
    """Yield 0, 1, ... up to `rounds`, and stop before a round that would end after `minutes` at the pace so far.

    The first round is always yielded.
    """
    start = time.perf_counter()
    for number in range(rounds):
        if number and (time.perf_counter() - start) * (number + 1) / number > 60 * minutes:
            return
        yield number


def now() -> float:
    """The time in seconds, when the device has finished all its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The ratio of each round's time to the reference's in the same round."""
    return [measured / base for measured, base in zip(times, reference, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile, which are equal for a single value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@torch.no_grad()
def touch(model: torch.nn.Module) -> None:
    """Write to the trained weights, as an optimiser does between two steps, so that copies of them are outdated."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1)
