"""Write the tables of supported models in docs/models.md: builds each model of the tests and runs it once.

    python docs/models_table.py

Needs timm, and the packages of the tests (`pip install ".[test,timm]"`).
"""

from __future__ import annotations

import datetime
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests" / "support")]

import architectures  # noqa: E402
import checks  # noqa: E402
import timm_architectures  # noqa: E402
import vlm_architectures  # noqa: E402
from choices import deciding  # noqa: E402
from models import layers_of  # noqa: E402

from lbp_peft import TokenLayout  # noqa: E402
from lbp_peft.bases.packed import PackedLayout  # noqa: E402

# Adapted and low-rank layers in the version of 2026-11-23, which recognised a grid by the number of its tokens.
BY_COUNTS = json.loads(
    (DOCS.parent / "examples" / "benchmarks" / "results" / "0.1.0" / "low_rank_by_counts.json").read_text()
)
BEGIN, END = "<!-- written by models_table.py: begin -->", "<!-- end -->"


def main() -> None:
    import timm

    listed = {architecture.model_type for architecture in architectures.ARCHITECTURES} | set(architectures.LEFT_OUT)
    if unlisted := architectures.mapped_types() - listed:
        print(f"Neither checked nor left out in tests/support/architectures.py: {', '.join(sorted(unlisted))}")
    page = DOCS / "models.md"
    before, rest = page.read_text().split(BEGIN)
    made = (
        f"Made by `python docs/models_table.py` with transformers {transformers.__version__}, timm {timm.__version__} "
        f"and torch {torch.__version__.split('+')[0]}, {datetime.date.today()}."
    )
    header = ("adapted", "low-rank", "by counts", "exact")
    with_grids = ("built by", "adapted", "low-rank", "by counts", "grids found", "exact")
    tables = [
        "## transformers",
        _table(("model type", "built by", *header), _rows(architectures.ARCHITECTURES)),
        "Not checked:",
        _table(("model type", "why"), sorted(architectures.LEFT_OUT.items())),
        "## Vision-language and encoder-decoder models",
        _table(("model type", *with_grids), _rows(vlm_architectures.ARCHITECTURES, with_grids=True)),
        "## timm",
        _table(("model", *header), _rows(timm_architectures.ARCHITECTURES, prefix="timm ")),
        made,
    ]
    page.write_text("\n\n".join([before + BEGIN, *tables, END]) + rest.split(END)[1])


def _rows(models: Iterable[Any], with_grids: bool = False, prefix: str = "") -> Iterator[tuple[str, ...]]:
    for architecture in sorted(models, key=lambda architecture: architecture.name):
        print(architecture.name, flush=True)
        built_by = [f"`{architecture.task}`"] if hasattr(architecture, "task") else []
        adapted, low_rank, grids, exact = _counts(architecture)
        before = BY_COUNTS.get(f"{prefix}{architecture.name}")
        by_counts = "" if before is None else f"{before[1]} of {before[0]}"
        yield (architecture.name, *built_by, adapted, low_rank, by_counts, *([grids] if with_grids else []), exact)


def _counts(architecture: Any) -> tuple[str, str, str, str]:
    """How many layers are adapted and low-rank; on which grids; how many are exact for which reasons."""
    base = architecture.build()
    model = checks.adapted(base, r=checks.R)
    record = checks.Record(base, list(layers_of(model)))
    batch = architecture.batch()
    with warnings.catch_warnings(), deciding(use_low_rank=True):
        warnings.simplefilter("ignore")  # and layers this narrow are not left exact, as in the tests
        checks.tensors(base, batch)
        read = checks.read_without_a_call(model, checks.tensors(model, batch))
    whys: Counter[str] = Counter()
    grids: dict[str, None] = {}  # in their order
    report = checks.report_of(model)
    for name, ran in report.items():
        if ran is None:
            whys["weight read without a call" if name in read else "not used"] += 1
        elif ran.why_exact:
            layout = checks.layout_of(architecture, name, record.layers[name], record.inputs[name][-1])
            few = "a grid of few tokens" if "as many rows as there are tokens" in ran.why_exact else ran.why_exact
            whys[layout if isinstance(layout, str) else few] += 1
        if ran is not None and ran.layout is not None:
            grids[_words_for(ran.layout)] = None
    exact = "; ".join(f"{count}: {why}" for why, count in whys.most_common())
    return str(len(report)), str(len(report) - whys.total()), "; ".join(grids), exact


def _words_for(layout: TokenLayout) -> str:
    """A layout, such as "8 x 12 after 1 token, 2 grids in a row"."""
    if isinstance(layout, PackedLayout):
        return ", then ".join(map(_words_for, layout.parts))
    parts = [f"{layout.grid[0]} x {layout.grid[1]}"]
    sides = (("after", layout.num_prefix_tokens), ("before", layout.num_suffix_tokens))
    beside = [f"{word} {count} token{'s' if count > 1 else ''}" for word, count in sides if count]
    parts += [" and ".join(beside)] if beside else []
    parts += ["in another order"] if layout.order is not None else []
    return " ".join(parts) + (f", {layout.packed} grids in a row" if layout.packed > 1 else "")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
