"""Write the tables of supported models in docs/models.md: builds each model of the tests and runs it once.

    python docs/models_table.py

Needs timm, and the packages of the tests (`pip install ".[test,timm]"`).
"""

from __future__ import annotations

import datetime
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

import architectures  # noqa: E402
import checks  # noqa: E402
import timm_architectures  # noqa: E402
from models import layers_of  # noqa: E402

BEGIN, END = "<!-- written by models_table.py: begin -->", "<!-- end -->"


def main() -> None:
    import timm

    listed = {architecture.model_type for architecture in architectures.ARCHITECTURES} | set(architectures.LEFT_OUT)
    if unlisted := architectures.mapped_types() - listed:
        print(f"Neither checked nor left out in tests/architectures.py: {', '.join(sorted(unlisted))}")
    page = DOCS / "models.md"
    before, rest = page.read_text().split(BEGIN)
    made = (
        f"Made by `python docs/models_table.py` with transformers {transformers.__version__}, timm {timm.__version__} "
        f"and torch {torch.__version__.split('+')[0]}, {datetime.date.today()}."
    )
    header = ("adapted", "low-rank", "exact")
    tables = [
        "## transformers",
        _table(("model type", "built by", *header), _rows(architectures.ARCHITECTURES)),
        "Not checked:",
        _table(("model type", "why"), sorted(architectures.LEFT_OUT.items())),
        "## timm",
        _table(("model", *header), _rows(timm_architectures.ARCHITECTURES)),
        made,
    ]
    page.write_text("\n\n".join([before + BEGIN, *tables, END]) + rest.split(END)[1])


def _rows(models: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    for architecture in sorted(models, key=lambda architecture: architecture.name):
        print(architecture.name, flush=True)
        built_by = [f"`{architecture.task}`"] if hasattr(architecture, "task") else []
        yield (architecture.name, *built_by, *_counts(architecture))


def _counts(architecture: Any) -> tuple[str, str, str]:
    """How many layers are adapted, low-rank, and exact for which reasons."""
    base = architecture.build()
    model = checks.adapted(base, r=checks.R)
    record = checks.Record(base, list(layers_of(model)))
    batch = architecture.batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (base, model):
            checks.tensors(each, batch)
    whys: Counter[str] = Counter()
    report = checks.report_of(model)
    for name, ran in report.items():
        if ran is None:
            whys["weight read without a call"] += 1
        elif ran.why_exact:
            layout = checks.layout_of(architecture, name, record.layers[name], record.inputs[name][-1])
            few = "a grid of few tokens" if "as many rows as there are tokens" in ran.why_exact else ran.why_exact
            whys[layout if isinstance(layout, str) else few] += 1
    exact = "; ".join(f"{count}: {why}" for why, count in whys.most_common())
    return str(len(report)), str(len(report) - whys.total()), exact


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
