"""The search of a method's learning rate and rank on validation images, by the same number of trials for each method.

The learning rate is searched first, in steps of a factor of 3. While the best rate is the largest or the smallest one
so far, the next trial goes beyond it. Then each trial takes the next rank, or halves the step if no rank is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STEP = 3.0


class Setting(NamedTuple):
    """A peak learning rate, and a rank if the method has one."""

    learning_rate: float
    rank: int | None = None


class Trial(NamedTuple):
    """A setting and its score on the validation images."""

    setting: Setting
    score: float


def best(trials: Sequence[Trial]) -> Setting:
    """The setting with the highest score, the first one in a tie."""
    return max(trials, key=lambda trial: trial.score).setting


def next_setting(trials: Sequence[Trial], start: float, ranks: Sequence[int]) -> Setting:
    """The setting of the next trial.

    Args:
        trials: The trials so far, in order.
        start: The learning rate of the first trial.
        ranks: The ranks to try. The learning rate is searched with the first. Empty for a method without ranks.
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
    """The value in two significant digits."""
    return float(f"{value:.1e}")
