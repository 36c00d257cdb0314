"""Measures the time of the input gradient by itself, by basis and rank, against the exact product g W.

    python examples/benchmarks/input_gradients.py
    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \
        python examples/benchmarks/input_gradients.py --threads 1 --cpu-time

The ways take turns. For each of them, the table has the least time, and the median of the ratios to the exact product
within a round. For adaptive bases, it also has the parts of the least time: finding the basis and the coefficients
(fit), the product with the weight, and lifting. The second command restricts a CPU with AVX-512 to AVX2, and counts the
time that the process itself had a core, so that it can be used on a machine with other work.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import aligned, number
from lbp_peft import AdaptiveBasis, BasisSet, ExactProduct, FixedBasis, InputGradient, TokenLayout
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.formats.products import product
from lbp_peft.measure.timing import now, quartiles, ratios, run_interleaved

LAYERS = {"qkv, proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # C_in and C_out, as multiples of the model's width
PARTS = ("fit", "product", "lift")


class Timed:
    """One way to compute the input gradient of a layer, step by step."""

    def __init__(
        self, way: InputGradient, layout: TokenLayout, grad: Tensor, weight: Tensor, clock: Callable[[], float]
    ):
        self.projection = way.projection(layout, grad.dtype, grad.device, None)
        self.precision, self.grad, self.weight, self.clock = way.precision, grad, weight, clock

    def run(self) -> tuple[float, ...]:
        """The seconds of each of the `PARTS`."""
        times = [self.clock()]
        fitted, coefficients = (None, self.grad) if self.projection is None else self.projection.fit(self.grad)
        times.append(self.clock())
        rows = product(coefficients, self.weight, self.precision)
        times.append(self.clock())
        _ = rows if fitted is None else fitted.lift(rows)
        times.append(self.clock())
        return tuple(end - start for start, end in itertools.pairwise(times))


def ways(options: argparse.Namespace) -> dict[str, InputGradient]:
    found: dict[str, InputGradient] = {"exact": ExactProduct()}
    found |= {f"walsh r={r}": FixedBasis(BasisSet(r)) for r in options.walsh}
    return found | {f"adaptive k={k}": AdaptiveBasis(k) for k in options.adaptive}


@torch.no_grad()
def measured(layer: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, with times in ms."""
    in_features, out_features = (options.width * factor for factor in LAYERS[layer])
    layout = TokenLayout((options.grid, options.grid), 1)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(options.batch_size, layout.num_tokens, out_features, generator=generator).to(options.device)
    weight = torch.randn(out_features, in_features, generator=generator).to(options.device)
    clock = time.process_time if options.cpu_time else now
    timed = {name: Timed(way, layout, grad, weight, clock) for name, way in ways(options).items()}
    for each in timed.values():
        each.run(), each.run()
    all_times = run_interleaved([each.run for each in timed.values()], range(options.rounds))
    exact = [sum(parts) for parts in all_times[0]]
    rows = []
    for name, times in zip(timed, all_times, strict=True):
        totals = [sum(parts) for parts in times]
        least = min(times, key=sum)
        rows.append(
            {
                "layer": layer,
                "features": (in_features, out_features),
                "way": name,
                "least_ms": 1e3 * sum(least),
                "parts_ms": {part: 1e3 * seconds for part, seconds in zip(PARTS, least, strict=True)},
                "least_over_exact": sum(least) / min(exact),
                "over_exact": quartiles(ratios(totals, exact)),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["layer", "C_in x C_out", "way", "least ms", "/ exact", "median ratio", *PARTS]
    lines = []
    for row in rows:
        line = [row["layer"], " x ".join(map(str, row["features"])), row["way"], number(row["least_ms"], 2)]
        line += [number(row["least_over_exact"], 2), number(row["over_exact"][1], 2)]
        lines.append([*line, *(number(row["parts_ms"][part], 2) for part in PARTS)])
    return aligned(header, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument("--grid", type=int, default=14, help="side of the patch grid, beside which there is one token")
    parser.add_argument("--width", type=int, default=768, help="features of the model")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--walsh", type=int, nargs="*", default=[10], help="Walsh bases a block")
    parser.add_argument("--adaptive", type=int, nargs="*", default=[8, 16, 24, 32], help="rows of an adaptive basis")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument("--cpu-time", action="store_true", help="time that the process itself had a core")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "input_gradients.json"), help="JSON")
    options = parser.parse_args(arguments)
    if options.cpu_time and options.device != "cpu":
        parser.error("--cpu-time is for --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment()
    print(in_words(where), f"batch {options.batch_size}, {options.device}", sep="\n")
    rows = [row for layer in tqdm(options.layers, leave=False) for row in measured(layer, options)]
    print(table(rows))
    write_record(options.output, where, vars(options), rows=rows)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
