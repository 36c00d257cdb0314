"""Draws accuracy against cost, with a panel for each cost. A line joins the methods that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

# From Okabe and Ito's palette, told apart by readers with any colour vision.
OURS, OTHERS, FRONT = "#D55E00", "#0072B2", "#999999"


class Point(NamedTuple):
    """The cost of a method, and the mean and standard deviation of its score."""

    label: str
    cost: float
    score: float
    deviation: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points for which no other point costs at most as much and scores more, the cheapest first."""
    result: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not result or point.score > result[-1].score:
            result.append(point)
    return result


def draw_pareto(path: Path, panels: dict[str, list[Point]], score: str, title: str) -> None:
    """Draw the panels side by side. Points are numbered by score, and a list beside the panels names them.

    Args:
        path: The file to write.
        panels: The points of each panel, by the label of its horizontal axis.
        score: The label of the vertical axis.
        title: The title of the figure.
    """
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 2.6, 4.4), sharey=True, layout="constrained", squeeze=False
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    every = sorted({(point.score, point.label) for points in panels.values() for point in points}, reverse=True)
    numbers = {label: number for number, (_, label) in enumerate(every, start=1)}
    for axes, (cost, points) in zip(all_axes[0], panels.items(), strict=True):
        joined = front(points)
        axes.plot([p.cost for p in joined], [p.score for p in joined], color=FRONT, linewidth=1, zorder=1)
        for point in points:
            axes.errorbar(
                point.cost, point.score, yerr=point.deviation, fmt="o", color=_colour(point.label), capsize=2,
                elinewidth=0.8, zorder=2,
            )  # fmt: skip
        axes.set_xlabel(cost)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12, y=0.08)
        _number(axes, points, numbers)
    all_axes[0][0].set_ylabel(score)
    names = [
        Line2D([], [], marker="o", linestyle="", color=_colour(label), label=f"{number}  {label}")
        for label, number in numbers.items()
    ]
    figure.legend(handles=names, loc="outside right center", frameon=False, fontsize=8, handletextpad=0.2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _colour(label: str) -> str:
    return OURS if "LBP-WHT" in label else OTHERS


def _number(axes: plt.Axes, points: Sequence[Point], numbers: dict[str, int]) -> None:
    """Write the numbers of the points beside them: on the right, or on the left if another point is close there."""
    if not points:
        return
    width, height = (high - low for low, high in (axes.get_xlim(), axes.get_ylim()))
    for point in points:
        is_taken = any(
            0 <= other.cost - point.cost < 0.06 * width and abs(other.score - point.score) < 0.05 * height
            for other in points
            if other is not point
        )
        axes.annotate(
            str(numbers[point.label]),
            (point.cost, point.score),
            xytext=(-6 if is_taken else 6, 0),
            textcoords="offset points",
            ha="right" if is_taken else "left",
            va="center",
            fontsize=9,
            color=_colour(point.label),
        )
