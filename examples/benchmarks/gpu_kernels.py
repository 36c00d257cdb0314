"""Compares the time of each Triton kernel with plain PyTorch and with the memory bandwidth. It needs a GPU and triton.

    python examples/benchmarks/gpu_kernels.py
    python examples/benchmarks/gpu_kernels.py --batch-size 128 --dtype float32

Each kernel reads its input once and writes its output once, so the least time is the number of these bytes, divided by
the bandwidth, which is measured at the start. The column `/ moving` is the ratio to that time. The plain path also
writes and reads intermediate tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("LBP_PEFT_KERNELS", None)  # the package itself takes the plain path; the kernels are called by name

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.floors import measure_rates
from benchmarks.tables import aligned, number
from lbp_peft import kernels
from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.grids import TokenLayout
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.formats.hadamard import rotate
from lbp_peft.formats.registry import FORMATS
from lbp_peft.measure.timing import now, quartiles, run_interleaved
from lbp_peft.projection import SeparableProjection

DTYPES = {"bf16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CALLS = 20  # in a row, so that the time to launch one is hidden as it is in a training step


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute the same result.

    Attributes:
        name: The name of the kernel, with the shape of its input.
        bytes: The size of the input and the output.
        ways: The kernel and the plain way.
    """

    name: str
    bytes: int
    ways: dict[str, Callable[[], object]]


def of_tokens(layout: TokenLayout, bases: BasisSet, tokens: Tensor) -> list[Comparison]:
    maps = SeparableProjection(layout, bases, tokens.dtype, tokens.device)
    small = maps.project(tokens)
    shape = " x ".join(map(str, tokens.shape))
    moved = tokens.nbytes + small.nbytes
    project = {
        "triton": lambda: kernels.project_tokens(tokens, layout, bases),
        "plain": lambda: maps.project(tokens),
    }
    lift = {
        "triton": lambda: kernels.lift_coefficients(small, layout, bases),
        "plain": lambda: maps.lift(small),
    }
    return [Comparison(f"project {shape}", moved, project), Comparison(f"lift to {shape}", moved, lift)]


def of_rows(rows: Tensor, rotation: int) -> Comparison:
    def plain() -> object:
        return FORMATS["int8"].quantize(rotate(rows, rotation) if rotation else rows, dim=1)

    ways = {"triton": lambda: kernels.quantize_rows(rows, rotation, torch.int8), "plain": plain}
    moved = rows.nbytes + rows.numel() + 4 * len(rows)
    return Comparison(f"round to int8, rotation {rotation}, {' x '.join(map(str, rows.shape))}", moved, ways)


def comparisons(options: argparse.Namespace) -> list[Comparison]:
    found, bases = [], BasisSet(options.r)
    for grid, prefix, channels in (((14, 14), 1, 768), ((14, 14), 1, 4096), ((32, 32), 0, 1024), ((7, 7), 0, 448)):
        layout = TokenLayout(grid, prefix)
        size = (options.batch_size, layout.num_tokens, channels)
        tokens = torch.randn(size, device="cuda", dtype=DTYPES[options.dtype])
        found += of_tokens(layout, bases, tokens)
        found += [of_rows(tokens.flatten(0, 1), rotation) for rotation in (0, 16, 64)]
    return found


def timed(run: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = now()
    for _ in range(CALLS):
        run()
    return (now() - start) / CALLS


def measured(comparison: Comparison, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each way, with times in ms as quartiles."""
    for run in comparison.ways.values():  # the kernel is compiled and tuned at its first call
        run()
    times = run_interleaved([lambda run=run: timed(run) for run in comparison.ways.values()], range(rounds))
    moving = comparison.bytes / bandwidth
    return [
        {
            "name": comparison.name,
            "way": way,
            "ms": [1e3 * value for value in quartiles(seconds)],
            "bytes": comparison.bytes,
            "moving_ms": 1e3 * moving,
        }
        for way, seconds in zip(comparison.ways, times, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    header = ["what", "way", "ms", "(quartiles)", "moving ms", "/ moving"]
    lines = []
    for row in rows:
        low, middle, high = row["ms"]
        line = [row["name"], row["way"], number(middle, 3), f"{low:.3f}-{high:.3f}", number(row["moving_ms"], 3)]
        lines.append([*line, number(middle / row["moving_ms"], 1)])
    return aligned(header, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--r", type=int, default=10, help="bases per block")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "gpu-kernels.json"), help="JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("the kernels need a GPU, and PyTorch sees none here")
    from lbp_peft.kernels import lift, project, quantize  # noqa: F401  registers the operators

    where, bandwidth = environment(), measure_rates(torch.device("cuda")).bytes
    print(in_words(where), f"r={options.r}, {options.dtype}; memory {bandwidth / 1e9:.0f} GB/s", sep="\n")
    rows = [row for each in comparisons(options) for row in measured(each, options.rounds, bandwidth)]
    print(table(rows))
    write_record(options.output, where, vars(options), bandwidth=bandwidth, rows=rows)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
