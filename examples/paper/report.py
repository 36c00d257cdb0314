"""Tables and figures of docs/paper.md, and the table of accuracies of docs/results.md, from the records of `run.py`.

python examples/paper/report.py                 # prints every table
python examples/paper/report.py --docs docs     # puts tables into the pages, figures into docs/images
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.tables import markdown, with_table

from paper.methods import METHODS
from paper.pareto import Point, draw_pareto
from paper.records import COSTS, Experiment, experiments, records_of

RESULTS = Path(__file__).parent / "results"
HEADER = (
    "method", "rate", "rank", "trials", "seeds", "validation %", "test {metric} %", "trained", "MFLOPs as in the paper",
    "backward M multiply-adds", "step ms", "/ exact", "peak MiB",
)  # fmt: skip
_SCORE = 6  # the index of the score among the cells of a row


@dataclass(frozen=True)
class Row:
    """One method of an experiment.

    Attributes:
        method: The name of the method.
        scores: The scores on the test images, one for each seed.
        trials: The scores of the trials on the validation images.
        record: The record of one seed, or of the best trial if no seed was tested, for what both have in common.
        cost: The entry of the method in `costs.json`; empty if its steps were not measured.
    """

    method: str
    scores: list[float]
    trials: list[float]
    record: dict[str, Any]
    cost: dict[str, Any]

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

    def cells(self, exact: Row | None) -> list[str]:
        record, config, spread = self.record, self.record["config"], self.deviation
        step = self.cost.get("step_ms")
        reference = exact.cost.get("step_ms") if exact else None
        return [
            self.label,
            f"{config['learning_rate']:g}",
            "" if config["rank"] is None else str(config["rank"]),
            str(len(self.trials)),
            str(len(self.scores)),
            f"{100 * max(self.trials):.1f}" if self.trials else "",
            ""
            if self.mean is None
            else f"{100 * self.mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}"),
            f"{record['trained_parameters'] / 1e6:.2f} M",
            f"{record['paper_flops'] / 1e6:.1f}",
            f"{record['backward_multiply_adds'] / 1e6:.1f}",
            f"{step[1]:.0f}" if step else "",
            f"{step[1] / reference[1]:.2f}" if step and reference else "",
            f"{self.cost['peak_mib']:.0f}" if "peak_mib" in self.cost else "",
        ]


def rows_of(experiment: Experiment) -> list[Row]:
    """The methods that have records, the best first, those that were not tested last."""
    file = experiment.folder / COSTS
    measured = json.loads(file.read_text())["methods"] if file.exists() else {}
    rows = []
    for method, records in records_of(experiment).items():
        tested = [record for record in records if record["config"]["scored"] == "test"]
        tried = [record for record in records if record["config"]["scored"] == "validation"]
        scores, trials = ([record["score"] for record in part] for part in (tested, tried))
        shown = tested[0] if tested else max(tried, key=lambda record: record["score"])
        rows.append(Row(method, scores, trials, shown, measured.get(method, {})))
    return sorted(rows, key=lambda row: (row.mean or 0, max(row.trials, default=0)), reverse=True)


def table(rows: list[Row]) -> str:
    """A table in Markdown."""
    metric = rows[0].record["metric"]
    exact = next((row for row in rows if row.method == "full"), None)
    header = [name.format(metric=metric) for name in HEADER]
    return markdown(header, [row.cells(exact) for row in rows])


def summary(tables: dict[str, list[Row]]) -> str:
    """A table in Markdown of the test scores of the methods that were tested in every experiment.

    Args:
        tables: The rows of each experiment, by the heading of its column.
    """
    scores = {name: {row.label: row.cells(None)[_SCORE] for row in rows if row.scores} for name, rows in tables.items()}
    first, *others = scores.values()
    common = [label for label in first if all(label in other for other in others)]
    return markdown(["method", *tables], [[label, *(column[label] for column in scores.values())] for label in common])


def points(rows: list[Row]) -> dict[str, list[Point]]:
    """The points of each panel of the figure, by the label of its horizontal axis: the methods that were tested."""
    rows = [row for row in rows if row.scores]
    panels: dict[str, list[Point]] = {
        "MFLOPs of the backward pass, linear layers, one image": [
            _point(row, row.record["paper_flops"] / 1e6) for row in rows
        ],
        "M multiply-adds of the backward pass, one image": [
            _point(row, row.record["backward_multiply_adds"] / 1e6) for row in rows
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
    return f"{config['model']}, {config['protocol']} protocol, {data}{images}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--docs", type=Path, help="the folder of the pages, which get the tables, and of images/")
    parser.add_argument("--figures", type=Path, help="folder for the figures (default: images/ of --docs)")
    options = parser.parse_args(arguments)
    figures = options.figures or (options.docs and options.docs / "images")
    tables: dict[str, list[Row]] = {}
    for experiment in experiments(options.records):
        rows = rows_of(experiment)
        if not rows:
            continue
        tables[_title(rows[0].record["config"])] = rows
        content = table(rows)
        print(f"{experiment.table}: {experiment.name}\n\n{content}\n")
        if figures:
            figures.mkdir(parents=True, exist_ok=True)
            name = f"paper-{experiment.name}.png"
            draw_pareto(figures / name, points(rows), f"{rows[0].record['metric']} %", _title(rows[0].record["config"]))
        if options.docs:
            page = options.docs / "paper.md"
            page.write_text(with_table(page.read_text(), experiment.name, content))
    if options.docs and (page := options.docs / "results.md").exists():
        page.write_text(with_table(page.read_text(), "accuracies", summary(tables)))


if __name__ == "__main__":
    main()
