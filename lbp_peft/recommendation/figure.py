"""The figure of a recommendation: cosines of the settings against their peak memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .result import Recommendation

_MIB = 2**20
# Okabe and Ito's colours, told apart by readers with any colour vision.
_COLOURS = {"exact": "#999999", "low-rank": "#0072B2", "front": "#D55E00"}


def plot(recommendation: Recommendation, path: str | Path) -> None:
    """Plot cosines against peak memory with the Pareto front. The size of a point is its step time.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('The figure needs matplotlib: pip install "lbp-peft[cli]"') from None
    measured = [trial for trial in recommendation.trials.values() if not trial.failure and trial.cosine is not None]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    longest = max(trial.seconds for trial in measured)
    marks = []
    for number, trial in enumerate(measured, 1):
        candidate = recommendation.candidates[trial.label]
        marks += axes.plot(
            *_point(trial),
            marker="s" if candidate.lora else "o",
            markersize=20 * math.sqrt(trial.seconds / longest),
            color=_COLOURS["exact" if candidate.is_exact else "low-rank"],
            alpha=0.5,
            linestyle="",
            label=f"{number}: {trial.label}, {1e3 * trial.seconds:.0f} ms",
        )
    for is_lora in (False, True):
        front = pareto_front([trial for trial in measured if recommendation.candidates[trial.label].lora is is_lora])
        axes.step(*_outline(front, axes), where="post", color=_COLOURS["front"], linestyle=":" if is_lora else "-")
    for places in _group_close_points([_point(trial) for trial in measured]):
        numbers = ", ".join(str(index + 1) for index in places)
        axes.annotate(numbers, _point(measured[places[0]]), (5, 9), textcoords="offset points", fontsize=8)
    if recommendation.setting is not None:
        axes.plot(*_point(recommendation.chosen), "o", markersize=28, markerfacecolor="none", markeredgecolor="black")
    axes.set_xlabel("peak memory, MiB")
    axes.set_ylabel("cosine of the gradients with the exact ones")
    axes.set_title(
        "The larger the area of a point, the longer its step. Circles: whole weights. Squares: LoRA. Grey: exact.\n"
        "Ring: recommended. Lines: Pareto fronts, of whole weights and (dotted) of LoRA.",
        fontsize=9,
        loc="left",
    )
    legend = axes.legend(
        handles=marks, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, handlelength=1
    )
    for handle in legend.get_lines():
        handle.set_markersize(6)
    figure.savefig(path, dpi=130)


def pareto_front(trials: list[Trial]) -> list[Trial]:
    """The trials with better gradients than all others that need no more memory, sorted by memory."""
    front: list[Trial] = []
    best = -math.inf
    for trial in sorted(trials, key=lambda one: (one.peak_bytes, -(one.cosine or 0.0))):
        if trial.cosine is not None and trial.cosine > best:
            front.append(trial)
            best = trial.cosine
    return front


def _point(trial: Trial) -> tuple[float, float]:
    """The coordinates at which the figure shows a trial."""
    return trial.peak_bytes / _MIB, trial.cosine or 0.0


def _outline(front: list[Trial], axes: Axes) -> tuple[list[float], list[float]]:
    """The outline of the area that the settings of the front dominate, up to the borders of the figure."""
    if not front:
        return [], []
    right, low = axes.get_xlim()[1], axes.get_ylim()[0]
    axes.autoscale(False)
    xs, ys = zip(*map(_point, front), strict=True)
    return [xs[0], *xs, right], [low, *ys, ys[-1]]


def _group_close_points(places: list[tuple[float, float]]) -> list[list[int]]:
    """The indices of points, in groups so close that they share a label."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*places, strict=True))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(places):
        for group in groups:
            other_x, other_y = places[group[0]]
            if abs(x - other_x) < 0.03 * wide and abs(y - other_y) < 0.03 * tall:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
