"""The report: a table, a plot and a JSON file, and a picture for segmentation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import textwrap
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from .measuring import Cost
from .options import Options
from .selection import kept_epoch
from .tables import aligned

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart by readers with any colour vision.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
MARKERS = "osD^vP*"


@dataclass
class Row:
    """The results of a method: the history of each seed's run, and the cost of a step."""

    method: str
    seeds: list[int]
    histories: list[list[dict[str, float]]]
    cost: Cost

    @property
    def scores(self) -> list[float]:
        """The scores of the epochs whose weights are kept, by seed."""
        return [history[kept_epoch(history)]["score"] for history in self.histories]

    def scores_by_epoch(self) -> list[list[float]]:
        """The scores after each epoch, of the seeds that were trained so long; early stopping ends some earlier."""
        longest = max(len(history) for history in self.histories)
        return [[h[epoch]["score"] for h in self.histories if epoch < len(h)] for epoch in range(longest)]


def table(rows: list[Row], metric: str) -> str:
    """A table with one row for each method."""
    header = ["method", "trainable", metric, "step time", "saved activations", "backward mult-adds"]
    lines = []
    for row in rows:
        score = f"{100 * statistics.mean(row.scores):.1f} %"
        if len(row.scores) > 1:
            score += f" ± {100 * statistics.stdev(row.scores):.1f}"
        lines.append(
            [
                row.method,
                f"{row.cost.trainable / 1e6:.2f} M",
                score,
                f"{row.cost.relative_time:.2f} x",
                f"{row.cost.saved_bytes / 2**20:.1f} MiB",
                f"{row.cost.backward_multiply_adds / 1e9:.2f} G",
            ]
        )
    return aligned(header, lines)


def write_json(path: Path, rows: list[Row], options: Options, extra: dict[str, Any]) -> None:
    """Write the values of the table and the plot, and machine, versions, date and options, as JSON."""
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    packages = ["lbp-peft", "torch", "transformers", "peft", "accelerate", "datasets"]
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "accelerators": accelerators,
        },
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in packages}},
        **extra,
        "results": [dataclasses.asdict(row) for row in rows],
        "options": dataclasses.asdict(options),
    }
    path.write_text(json.dumps(record, indent=2))


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def plot(path: Path, rows: list[Row], reference: Cost, metric: str) -> None:
    """Plot the score against training time, and the cost of a step, both in units of full fine-tuning."""
    colours = {row.method: COLOURS[index % len(COLOURS)] for index, row in enumerate(rows)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), width_ratios=[1.15, 1], layout="constrained")
    _plot_scores(left, rows, colours, metric)
    _plot_costs(right, rows, reference, colours)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_scores(axes: Axes, rows: list[Row], colours: dict[str, str], metric: str) -> None:
    for row, marker in zip(rows, itertools.cycle(MARKERS)):
        by_epoch = row.scores_by_epoch()
        scores = [100 * statistics.mean(epoch) for epoch in by_epoch]
        times = [row.cost.relative_time * (epoch + 1) for epoch in range(len(scores))]
        axes.plot(
            times, scores, color=colours[row.method], marker=marker, markersize=5, linewidth=1.8, label=row.method
        )
        if len(row.histories) > 1:
            spread = [100 * statistics.stdev(epoch) if len(epoch) > 1 else 0.0 for epoch in by_epoch]
            low, high = ([s + sign * d for s, d in zip(scores, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(times, low, high, color=colours[row.method], alpha=0.15, linewidth=0)
    axes.set(xlabel="time in training steps (1 = an epoch of full fine-tuning)", ylabel=f"test {metric} (%)")
    axes.set_title("What is learned, by time", loc="left", fontsize=11)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_costs(axes: Axes, rows: list[Row], reference: Cost, colours: dict[str, str]) -> None:
    groups = [
        ("step time", [(row.cost.relative_time, f"{row.cost.milliseconds:.0f} ms") for row in rows]),
        (
            "saved\nactivations",
            [(row.cost.saved_bytes / reference.saved_bytes, f"{row.cost.saved_bytes / 2**20:.0f} MiB") for row in rows],
        ),
        (
            "backward\nmultiply-adds",
            [
                (
                    row.cost.backward_multiply_adds / reference.backward_multiply_adds,
                    f"{row.cost.backward_multiply_adds / 1e9:.1f} G",
                )
                for row in rows
            ],
        ),
    ]
    height = 0.8 / len(rows)
    for group, (_, bars) in enumerate(groups):
        for index, ((value, text), row) in enumerate(zip(bars, rows, strict=True)):
            y = group + (index - (len(rows) - 1) / 2) * height
            axes.barh(y, value, height=0.9 * height, color=colours[row.method])
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(value + 0.015, y, f"{value:.2f}  ({text})", va="center", fontsize=8, bbox=box)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.invert_yaxis()
    widest = max(value for _, bars in groups for value, _ in bars)
    axes.set_xlim(0, 1.28 * widest)
    axes.set_xlabel("relative to full fine-tuning")
    axes.set_title("What a training step costs", loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def show_maps(path: Path, rows: dict[str, list[Image.Image]], names: list[str]) -> None:
    """Draw a column of images, with their label maps beside them, one colour for each class."""
    count = len(next(iter(rows.values())))
    ratio = max(image.height / image.width for image in next(iter(rows.values())))
    size = (2.2 * len(rows), 2.2 * ratio * count + 0.7)
    figure, axes = plt.subplots(count, len(rows), figsize=size, layout="constrained", squeeze=False)
    colours = matplotlib.colormaps["tab20" if len(names) <= 20 else "gist_ncar"].resampled(len(names))
    for column, (title, images) in enumerate(rows.items()):
        axes[0, column].set_title(textwrap.fill(title, 22), fontsize=8)
        for image, axis in zip(images, axes[:, column], strict=True):
            kind = {"cmap": colours, "vmin": -0.5, "vmax": len(names) - 0.5, "interpolation": "nearest"}
            axis.imshow(np.array(image), **({} if column == 0 else kind))
            axis.set_axis_off()
    if len(names) <= 20:
        patches = [Patch(color=colours(index), label=name) for index, name in enumerate(names)]
        figure.legend(handles=patches, loc="outside lower center", ncols=10, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_classes_json(path: Path, names: list[str], methods: dict[str, Any]) -> None:
    """Write the scores and confusion matrices of each method; rows are true classes, columns predicted ones."""
    parts = [f"  {json.dumps(label)}: {json.dumps(record)}" for label, record in methods.items()]
    joined = ",\n".join(parts)
    path.write_text(f'{{"classes": {json.dumps(names)},\n "methods": {{\n{joined}\n}}}}\n')


def show_confusions(path: Path, matrices: dict[str, torch.Tensor], names: list[str], counted: str) -> None:
    """Draw a confusion matrix for each method, with rows as shares of a class, and names if there are few classes."""
    few = len(names) <= 12
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    side = 1.5 + 0.42 * len(names) if few else 5.5
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns + 1, side * rows + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(matrices) :]:
        axis.set_axis_off()
    for (title, counts), axis in zip(matrices.items(), axes.flat, strict=False):
        shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
        shown = ConfusionMatrixDisplay(shares.numpy(), display_labels=names if few else None)
        shown.plot(
            ax=axis,
            include_values=few,
            values_format=".0f",
            cmap="Blues",
            colorbar=False,
            im_kw={"vmin": 0, "vmax": 100},
        )
        axis.set_title(textwrap.fill(title, 30), fontsize=10)
        axis.set(xlabel="predicted", ylabel="true")
        if few:
            axis.tick_params(axis="x", rotation=90 if max(map(len, names)) > 3 else 0)
        else:  # a tick for every class would be unreadable
            ticks = np.linspace(0, len(names) - 1, 6).round().astype(int)
            axis.set_xticks(ticks, ticks)
            axis.set_yticks(ticks, ticks)
    figure.colorbar(shown.im_, ax=axes, label=f"% of the {counted} of a class", shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
