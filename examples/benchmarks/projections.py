"""Measures the time to project tokens and to lift them back, axis by axis and by one matrix.

    python examples/benchmarks/projections.py
    python examples/benchmarks/projections.py --batch-size 64 --r 3 10 21 36

`lbp_peft.heuristics.Heuristics.use_dense_projection` chooses between the two by k; its bounds were read off this table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tables import aligned, number
from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.grids import TokenLayout
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.heuristics import active
from lbp_peft.measure.timing import now, quartiles, ratios, run_interleaved
from lbp_peft.projection import DenseProjection, SeparableProjection, num_coefficients

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = [TokenLayout((8, 8), 1), TokenLayout((14, 14), 1), TokenLayout((16, 16), 5), TokenLayout((32, 32))]
CHANNELS = (384, 768, 3072)


def timed(run: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = now()
    run()
    return now() - start


@torch.no_grad()
def measured(layout: TokenLayout, r: int, channels: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The times of both ways, for projecting and for lifting, in ms as quartiles."""
    kind, device, bases = DTYPES[dtype], torch.device(options.device), BasisSet(r)
    ways = [way(layout, bases, kind, device) for way in (SeparableProjection, DenseProjection)]
    tokens = torch.randn(options.batch_size, layout.num_tokens, channels, device=device, dtype=kind)
    small = ways[0].project(tokens)
    runs = [lambda way=way: timed(lambda: way.project(tokens)) for way in ways]
    runs += [lambda way=way: timed(lambda: way.lift(small)) for way in ways]
    for run in runs:
        run(), run()
    times = run_interleaved(runs, range(options.rounds))
    kept = num_coefficients(layout, bases)
    names = ("project_by_axis", "project_at_once", "lift_by_axis", "lift_at_once")
    return {
        "grid": layout.grid,
        "outside": layout.num_outside,
        "channels": channels,
        "dtype": dtype,
        "r": r,
        "k": kept,
        "chosen": "one matrix" if active().use_dense_projection(kept, kind, device) else "by axis",
        **{f"{name}_ms": [1e3 * value for value in quartiles(own)] for name, own in zip(names, times, strict=True)},
        "project_ratio": quartiles(ratios(times[1], times[0])),
        "lift_ratio": quartiles(ratios(times[3], times[2])),
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["dtype", "grid", "outside", "C", "r", "k", "project: by axis ms", "one matrix ms", "ratio"]
    header += ["lift: by axis ms", "one matrix ms", "ratio", "chosen"]
    lines = []
    for row in rows:
        line = [row["dtype"], " x ".join(map(str, row["grid"]))]
        line += [str(row[name]) for name in ("outside", "channels", "r", "k")]
        for name in ("project", "lift"):
            line += [number(row[f"{name}_{way}_ms"][1], 2) for way in ("by_axis", "at_once")]
            line.append(number(row[f"{name}_ratio"][1], 2))
        lines.append([*line, row["chosen"]])
    return aligned(header, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument("--r", type=int, nargs="+", default=[3, 6, 10, 15, 21], help="bases per block")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "projections.json"), help="JSON file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment()
    print(in_words(where), f"batch {options.batch_size}, {options.device}", sep="\n")
    cases = [
        (layout, r, channels, dtype)
        for dtype in DTYPES
        for layout in LAYOUTS
        for channels in CHANNELS
        for r in options.r
    ]
    rows = [measured(*case, options) for case in tqdm(cases, leave=False)]
    print(table(rows))
    write_record(options.output, where, vars(options), rows=rows)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
