"""Tables and figures of docs/paper.md, and accuracies on other pages of docs/, from the records of `run.py`.

python examples/paper/report.py                 # prints every table
python examples/paper/report.py --docs docs     # puts tables into the pages, figures into docs/images
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.tables import markdown, with_table

from paper.methods import METHODS
from paper.pareto import Point, draw_pareto
from paper.records import COSTS, Experiment, experiments, records_of

RESULTS = Path(__file__).parent / "results"
# The rows of the table of warm-ups in docs/choosing-settings.md: the experiment of each.
WARM_UPS = {
    "DINOv2-small, read at [CLS], LP_L1-4": "dinov2_small-full-cifar100-1000",
    "EfficientNet-Lite0, pooled, LP_L1-4": "tf_efficientnet_lite0-partial-cifar100-1000",
}
HEADER = (
    "method", "rate", "rank", "trials", "seeds", "validation %", "test {metric} %", "trained", "MFLOPs as in the paper",
    "backward M multiply-adds", "step ms", "/ exact", "peak MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method of an experiment.

    Attributes:
        method: The name of the method.
        scores: The scores on the test images, one for each seed.
        trials: The scores of the trials on the validation images.
        record: The record of one seed, or of the best trial if no seed was tested, for what both have in common.
        cost: The entry of the method in `costs.json`; empty if its steps were not measured.
        has_own_runs: Whether the scores, the trials and the record are those of this method, and not of one with the
            same gradients.
    """

    method: str
    scores: list[float]
    trials: list[float]
    record: dict[str, Any]
    cost: dict[str, Any]
    has_own_runs: bool = True

    @property
    def label(self) -> str:
        """The name of the method in tables; that of the record if the method is gone."""
        return METHODS[self.method].label if self.method in METHODS else str(self.record["label"])

    @property
    def mean(self) -> float | None:
        """The mean of the scores; None if no seed was tested."""
        return statistics.mean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def score(self) -> str:
        """The mean and the standard deviation in percent; empty if no seed was tested."""
        if self.mean is None:
            return ""
        return f"{100 * self.mean:.1f}" + ("" if self.deviation is None else f" ± {100 * self.deviation:.1f}")

    def cells(self, exact: Row | None) -> list[str]:
        record, config = self.record, self.record["config"]
        step = self.cost.get("step_ms")
        reference = exact.cost.get("step_ms") if exact else None
        return [
            self.label,
            f"{config['learning_rate']:g}",
            "" if config["rank"] is None else str(config["rank"]),
            str(len(self.trials)),
            str(len(self.scores)),
            f"{100 * max(self.trials):.1f}" if self.trials else "",
            self.score,
            f"{record['trained_parameters'] / 1e6:.2f} M",
            f"{record['paper_flops'] / 1e6:.1f}" if self.has_own_runs else "",
            f"{record['backward_multiply_adds'] / 1e6:.1f}" if self.has_own_runs else "",
            f"{step[1]:.0f}" if step else "",
            f"{step[1] / reference[1]:.2f}" if step and reference else "",
            f"{self.cost['peak_mib']:.0f}" if "peak_mib" in self.cost else "",
        ]


def rows_of(experiment: Experiment) -> list[Row]:
    """The methods that have records, the best first, those that were not tested last.

    A method whose gradients are those of another, and of which only the cost was measured, has a row too.
    """
    file = experiment.folder / COSTS
    measured = json.loads(file.read_text())["methods"] if file.exists() else {}
    rows = []
    for method, records in records_of(experiment).items():
        tested = [record for record in records if record["config"]["scored"] == "test"]
        tried = [record for record in records if record["config"]["scored"] == "validation"]
        scores, trials = ([record["score"] for record in part] for part in (tested, tried))
        shown = tested[0] if tested else max(tried, key=lambda record: record["score"])
        rows.append(Row(method, scores, trials, shown, _mean_cost(method, shown["config"], measured)))
    by_method = {row.method: row for row in rows}
    for method in measured.keys() - by_method.keys():
        same = by_method.get(METHODS[method].same_as or "") if method in METHODS else None
        if same:
            rows.append(replace(same, method=method, cost=measured[method], has_own_runs=False))
    return sorted(rows, key=lambda row: (row.mean or 0, max(row.trials, default=0)), reverse=True)


def _mean_cost(method: str, config: dict[str, Any], measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cost of a method's steps, its first ones included, which may be those of exact backpropagation."""
    cost, exact = measured.get(method, {}), measured.get("full", {})
    exact_steps = METHODS[method].exact_steps if method in METHODS else 0
    if not exact_steps or not cost or not exact:
        return cost
    share = min(exact_steps / _num_steps(config), 1)
    mean = {name: max(value, exact[name]) for name, value in cost.items() if name == "peak_mib"}
    if "step_ms" in cost and "step_ms" in exact:
        pairs = zip(cost["step_ms"], exact["step_ms"], strict=True)
        mean["step_ms"] = [(1 - share) * own + share * other for own, other in pairs]
    return mean


def _num_steps(config: dict[str, Any]) -> int:
    return int(config["epochs"]) * math.ceil(config["train_images"] / config["batch_size"])


def table(rows: list[Row]) -> str:
    """A table in Markdown."""
    metric = rows[0].record["metric"]
    exact = next((row for row in rows if row.method == "full"), None)
    header = [name.format(metric=metric) for name in HEADER]
    return markdown(header, [row.cells(exact) for row in rows])


def summary(tables: dict[str, list[Row]]) -> str:
    """A table in Markdown of the test scores of the methods that were tested in two experiments or more.

    Args:
        tables: The rows of each experiment, by the heading of its column. If there is one, all its methods are shown.
    """
    scores = [{row.label: row.score for row in rows if row.scores and row.has_own_runs} for rows in tables.values()]
    counts = Counter(label for column in scores for label in column)
    shown = [label for label, count in counts.items() if count >= min(2, len(scores))]
    return markdown(["method", *tables], [[label, *(column.get(label, "") for column in scores)] for label in shown])


def warm_ups(root: Path) -> str:
    """A table in Markdown of the paper's setting with and without exact gradients in the first steps.

    Args:
        root: The folder of the records.
    """
    found = {experiment.name: {row.method: row for row in rows_of(experiment)} for experiment in experiments(root)}
    cells = []
    for heading, name in WARM_UPS.items():
        rows = found[name]
        config = rows["lp_l1-4-warm-up"].record["config"]
        scores = [f"{rows[method].score} %" for method in ("lp_l1-4", "lp_l1-4-warm-up", "full")]
        cells.append([heading, f"{METHODS['lp_l1-4-warm-up'].exact_steps} of {_num_steps(config)}", *scores])
    return markdown(["", "first steps exact", "without warm-up", "with warm-up", "exact backpropagation"], cells)


def contents(root: Path) -> dict[str, str]:
    """All tables by the names of their markers, without those of experiments that have no records."""
    rows = {experiment.name: rows_of(experiment) for experiment in experiments(root)}
    tables = {name: table(own) for name, own in rows.items() if own}
    if tables:
        tables["accuracies"] = summary({_title(own[0].record["config"]): own for own in rows.values() if own})
    if set(WARM_UPS.values()) <= tables.keys():
        tables["warm-ups"] = warm_ups(root)
    return tables


def points(rows: list[Row]) -> dict[str, list[Point]]:
    """The points of each panel of the figure, by the label of its horizontal axis: the methods that were tested."""
    rows = [row for row in rows if row.scores]
    counted = [row for row in rows if row.has_own_runs]
    panels: dict[str, list[Point]] = {
        "MFLOPs of the backward pass, linear layers, one image": [
            _point(row, row.record["paper_flops"] / 1e6) for row in counted
        ],
        "M multiply-adds of the backward pass, one image": [
            _point(row, row.record["backward_multiply_adds"] / 1e6) for row in counted
        ],
    }
    timed = [row for row in rows if "step_ms" in row.cost]
    if timed:
        panels["ms a training step"] = [_point(row, row.cost["step_ms"][1]) for row in timed]
    weighed = [row for row in rows if "peak_mib" in row.cost]
    if weighed:
        panels["MiB at the peak of the process"] = [_point(row, row.cost["peak_mib"]) for row in weighed]
    return panels


def _point(row: Row, cost: float) -> Point:
    return Point(row.label, cost, 100 * (row.mean or 0), 100 * (row.deviation or 0))


def _title(config: dict[str, Any]) -> str:
    data = config["dataset"] or "/".join(Path(file).parent.name for file in config["train_files"] or ())
    images = f", {config['train_images']} images" if config["train_images"] else ""
    classes = "" if config.get("classes") is None else " of classes {} to {}".format(*config["classes"])
    return f"{config['model']}, {config['protocol']} protocol, {data}{images}{classes}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--docs", type=Path, help="the folder of the pages, which get the tables, and of images/")
    parser.add_argument("--figures", type=Path, help="folder for the figures (default: images/ of --docs)")
    options = parser.parse_args(arguments)
    figures = options.figures or (options.docs and options.docs / "images")
    tables = contents(options.records)
    for name, content in tables.items():
        print(f"{name}\n\n{content}\n")
    for page in sorted(options.docs.glob("*.md")) if options.docs else ():
        text = page.read_text()
        for name, content in tables.items():
            text = with_table(text, name, content)
        page.write_text(text)
    for experiment in experiments(options.records) if figures else ():
        if rows := rows_of(experiment):
            figures.mkdir(parents=True, exist_ok=True)
            name, title = f"paper-{experiment.name}.png", _title(rows[0].record["config"])
            draw_pareto(figures / name, points(rows), f"{rows[0].record['metric']} %", title)


if __name__ == "__main__":
    main()
