"""Accuracy against cost: one panel for each kind of cost. A line joins the methods that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# From Okabe and Ito's palette, told apart by readers with any colour vision.
OURS, OTHERS, FRONT = "#D55E00", "#0072B2", "#999999"


class Point(NamedTuple):
    """The cost of a method, and the mean and standard deviation of its score."""

    label: str
    cost: float
    score: float
    deviation: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points of which no other costs at most as much and scores more, the cheapest first."""
    result: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not result or point.score > result[-1].score:
            result.append(point)
    return result


def draw_pareto(path: Path, panels: dict[str, list[Point]], score: str, title: str) -> None:
    """Draw the panels side by side.

    Args:
        path: The file to write.
        panels: The points of each panel, by the label of its horizontal axis.
        score: The label of the vertical axis.
        title: The title of the figure.
    """
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(5.6 * len(panels), 4.4), sharey=True, layout="constrained", squeeze=False
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for axes, (cost, points) in zip(all_axes[0], panels.items(), strict=True):
        joined = front(points)
        axes.plot([p.cost for p in joined], [p.score for p in joined], color=FRONT, linewidth=1, zorder=1)
        for point in points:
            colour = OURS if "LBP-WHT" in point.label else OTHERS
            axes.errorbar(point.cost, point.score, yerr=point.deviation, fmt="o", color=colour, capsize=2, zorder=2)
        label_points(axes, points)
        axes.set_xlabel(cost)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12, y=0.08)
    all_axes[0][0].set_ylabel(score)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label_points(axes: plt.Axes, points: Sequence[Point]) -> None:
    """Write the labels beside the points, on the side with more room, and lower if another label is near."""
    if not points:
        return
    lowest, highest = min(p.cost for p in points), max(p.cost for p in points)
    middle = (lowest + highest) / 2
    height = max(max(p.score for p in points) - min(p.score for p in points), 1e-9)
    placed: list[tuple[bool, float]] = []
    for point in sorted(points, key=lambda point: -point.score):
        on_left = point.cost > middle
        at = point.score
        for side, other in placed:
            if side == on_left and other - at < 0.045 * height:
                at = other - 0.045 * height
        placed.append((on_left, at))
        axes.annotate(
            point.label,
            (point.cost, at),
            xytext=(-6 if on_left else 6, 0),
            textcoords="offset points",
            ha="right" if on_left else "left",
            va="center",
            fontsize=7.5,
        )
