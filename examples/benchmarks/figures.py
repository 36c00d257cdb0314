"""Draws the figure beside the table: time, saved activations and peak memory of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# From Okabe and Ito's palette, told apart by readers with any colour vision.
FORWARD, BACKWARD, SAVED, WEIGHTS, OF_STEP = "#56B4E9", "#0072B2", "#009E73", "#999999", "#E69F00"


def draw_steps(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw three panels with a bar for each method, and its ratio to full fine-tuning if that was measured."""
    figure, (time, saved, peak) = plt.subplots(
        1, 3, figsize=(15, 1.9 + 0.36 * len(rows)), sharey=True, width_ratios=[1.3, 1, 1], layout="constrained"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    steps = [row["step_ms"] for row in rows]
    backward = [row["step_ms"][1] - row["forward_ms"][1] for row in rows]
    _bars(time, [row["forward_ms"][1] for row in rows], backward, (FORWARD, BACKWARD), ("forward", "backward"))
    spread = [[middle - low for low, middle, _ in steps], [high - middle for _, middle, high in steps]]
    medians = [middle for _, middle, _ in steps]
    time.errorbar(medians, range(len(rows)), xerr=spread, fmt="none", color="black", capsize=2)
    _texts(time, rows, [high for *_, high in steps], [f"{m:.0f} ms" for m in medians], "step_over_full")
    time.set_xlabel("ms a step: medians, quartiles of the sum")

    _bars(saved, [row["saved_mib"] for row in rows], None, (SAVED, SAVED), ("saved activations", ""))
    _texts(saved, rows, [r["saved_mib"] for r in rows], [f"{r['saved_mib']:.0f} MiB" for r in rows], "saved_over_full")
    saved.set_xlabel("MiB of saved activations")

    above = [row["peak_mib"] - row["weights_mib"] for row in rows]
    _bars(peak, [row["weights_mib"] for row in rows], above, (WEIGHTS, OF_STEP), ("weights", "step"))
    _texts(peak, rows, [r["peak_mib"] for r in rows], [f"{r['peak_mib']:.0f} MiB" for r in rows], "peak_over_full")
    peak.set_xlabel("MiB at the peak, optimiser not counted")

    time.set_yticks(range(len(rows)), [row["method"] for row in rows])
    time.invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(
    axes: Axes, first: list[float], second: list[float] | None, colours: tuple[str, str], labels: tuple[str, str]
) -> None:
    lines = range(len(first))
    axes.barh(lines, first, height=0.7, color=colours[0], label=labels[0])
    if second is not None:
        axes.barh(lines, second, left=first, height=0.7, color=colours[1], label=labels[1])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _texts(axes: Axes, rows: list[dict[str, Any]], ends: list[float], texts: list[str], ratio: str) -> None:
    for line, (row, end, text) in enumerate(zip(rows, ends, texts, strict=True)):
        over = row.get(ratio)
        if over is not None:
            text += f"  ({over if isinstance(over, float) else over[1]:.2f})"
        axes.annotate(text, (end, line), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.45 * max(ends))
