"""The search of a method's learning rate and rank on validation images, by the same number of trials for each method.

The learning rate comes first, by steps of a factor of 3 that go on beyond whichever end of the tried values is best.
Once the best one lies between two others, each further trial takes the next rank, or halves the step where there is no
rank left to try.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STEP = 3.0


class Setting(NamedTuple):
    """What is searched: a peak learning rate, and a rank where the method has one."""

    learning_rate: float
    rank: int | None = None


class Trial(NamedTuple):
    """A setting and its score on the validation images."""

    setting: Setting
    score: float


def best(trials: Sequence[Trial]) -> Setting:
    """The setting of the highest score; the first of several."""
    return max(trials, key=lambda trial: trial.score).setting


def next_setting(trials: Sequence[Trial], start: float, ranks: Sequence[int]) -> Setting:
    """What to try next.

    Args:
        trials: Those so far, in order.
        start: The learning rate to begin with.
        ranks: To choose from; the learning rate is searched with the first. None are there for a method without ranks.
    """
    rank = ranks[0] if ranks else None
    if not trials:
        return Setting(start, rank)
    so_far = best([trial for trial in trials if trial.setting.rank == rank]).learning_rate
    tried = sorted(trial.setting.learning_rate for trial in trials if trial.setting.rank == rank)
    if math.isclose(so_far, tried[-1]):
        return Setting(rounded(so_far * STEP), rank)
    if math.isclose(so_far, tried[0]):
        return Setting(rounded(so_far / STEP), rank)
    untried = [one for one in ranks if all(trial.setting.rank != one for trial in trials)]
    if untried:
        return Setting(so_far, untried[0])
    place = tried.index(so_far)
    wider = max(tried[place - 1 : place + 1], tried[place : place + 2], key=lambda ends: ends[1] / ends[0])
    return Setting(rounded(math.sqrt(wider[0] * wider[1])), rank)


def rounded(value: float) -> float:
    """To two significant digits, as a person would write it."""
    return float(f"{value:.1e}")
