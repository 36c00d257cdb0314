"""Compares LoRA's forward pass as one product with W + s B A with the usual branch: time, and error against float64.

    python examples/benchmarks/summed_weights.py
    python examples/benchmarks/summed_weights.py --rows 3152 --rank 16

The update s B A is scaled to a share of the norm of W. The table has two errors, each relative to float64: the error of
the whole output, and the error of the update's contribution, which is the output minus that of the same layer with
B = 0. Weights
are float32, float32 under bf16 autocast, or bfloat16; in the last case the package never sums them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tables import aligned
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.measure.timing import now, quartiles, ratios, run_interleaved
from lbp_peft.ops.summed_weight import summed_weight

LAYERS = {"q, k, v or out": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}  # features in and out, of a ViT-B
SHARES = (1e-4, 1e-3, 1e-2, 1e-1)
KINDS = ("float32", "bf16 autocast", "bfloat16")


def branch(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, down), up)


def one_product(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(x, summed_weight(weight, (down, up), (1.0,), x.dtype))


def errors(rows: int, inputs: int, outputs: int, rank: int, share: float, kind: str) -> dict[str, list[float]]:
    """The errors of the output and of the update's contribution to it, by way."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, down, up = draw(rows, inputs), 0.02 * draw(outputs, inputs), draw(rank, inputs), draw(outputs, rank)
    up *= share * weight.norm() / (up @ down).norm()
    stored = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x, weight, down, up = (tensor.to(stored) for tensor in (x, weight, down, up))
    exact = [branch(*(t.double() for t in (x, weight, down, factor))) for factor in (up, torch.zeros_like(up))]
    narrow = torch.float32 if kind == "float32" else torch.bfloat16
    found = {}
    for name, way in (("branch", branch), ("one product", one_product)):
        of_branch = weight.to(narrow) if way is branch else weight
        part = [way(x.to(narrow), of_branch, down.to(narrow), u.to(narrow)) for u in (up, torch.zeros_like(up))]
        whole = float((part[0].double() - exact[0]).norm() / exact[0].norm())
        update = (part[0].double() - part[1].double()) - (exact[0] - exact[1])
        found[name] = [whole, float(update.norm() / (exact[0] - exact[1]).norm())]
    return found


def seconds(rows: int, inputs: int, outputs: int, rank: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """The quartiles of the ratios of each way's time to that of the layer without LoRA, in float32."""
    x, weight = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
    down, up = torch.randn(rank, inputs, device=device), torch.randn(outputs, rank, device=device)

    def timed(run: Any) -> float:
        start = now()
        run()
        return now() - start

    ways = {"plain": lambda: F.linear(x, weight)}
    ways["branch"] = lambda: branch(x, weight, down, up)
    ways["one product"] = lambda: one_product(x, weight, down, up)
    for way in ways.values():
        way()
    times = run_interleaved([lambda way=way: timed(way) for way in ways.values()], range(rounds))
    of = dict(zip(ways, times, strict=True))
    found = {f"{name} / plain": quartiles(ratios(own, of["plain"])) for name, own in of.items() if name != "plain"}
    return {"plain_ms": 1e3 * quartiles(of["plain"])[1], **found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1576, help="tokens of all images")
    parser.add_argument("--rows-of-errors", type=int, default=197, help="tokens that errors are taken over")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "summed-weights.json"))
    options = parser.parse_args(arguments)
    where = environment()
    print(in_words(where))
    rows: list[dict[str, Any]] = []
    for layer, (inputs, outputs) in tqdm(LAYERS.items(), leave=False):
        taken = seconds(options.rows, inputs, outputs, options.rank, options.rounds, torch.device(options.device))
        rows.append({"layer": layer, **taken})
        for kind in KINDS:
            for share in SHARES:
                found = errors(options.rows_of_errors, inputs, outputs, options.rank, share, kind)
                rows.append({"layer": layer, "weights": kind, "share": share, "errors": found})
    ways = ("branch", "one product")
    timed = [row for row in rows if "plain_ms" in row]
    times = [
        [row["layer"], f"{row['plain_ms']:.1f}", *(f"{row[f'{w} / plain'][1]:.3f}" for w in ways)] for row in timed
    ]
    print(aligned(["layer", "plain ms", *(f"{way} / plain" for way in ways)], times))
    lines = []
    for row in rows:
        if "share" in row:
            both = [f"{row['errors'][way][index]:.1e}" for index in (0, 1) for way in ways]
            lines.append([row["layer"], row["weights"], f"{row['share']:g}", *both])
    header = [f"{part}: {way}" for part in ("output", "update") for way in ways]
    print(aligned(["layer", "weights", "update / W", *header], lines))
    write_record(options.output, where, vars(options), rows=rows)


if __name__ == "__main__":
    main()
