"""Measures forward and backward passes through one layer, with and without LBP-WHT, beside the least possible time.

    python examples/benchmarks/single_layers.py
    python examples/benchmarks/single_layers.py --bf16 --layers vit-b --modes plain full auto

For each shape, the modes take turns. `plain` is the layer without LBP-WHT. The other modes are number formats of the
input gradient (`grad_input_dtype`), its ranks (`grad_input_rank`), or adaptive-16, a rank in a basis that is adapted to
each image. The two parts of the floor are beside each time: the multiply-adds divided by the rate of matrix products,
and the bytes divided by the memory bandwidth. Both rates are measured at the start. docs/benchmarks.md explains how to
read the table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.floors import Rates, Work, measure_rates
from benchmarks.tables import aligned, number
from lbp_peft import LBPWHTConfig
from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.grids import TokenLayout
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.measure.timing import now, quartiles, ratios, run_interleaved, touch
from lbp_peft.projection import num_coefficients

PLAIN, ADAPTIVE = "plain", "adaptive"
MODES = (PLAIN, "full", "bf16", "int8", "auto")  # and the rank of the weight gradient, as in the paper


@dataclass(frozen=True)
class Shape:
    """A layer and its input: N images of p + H W tokens, C_in and C_out features.

    Attributes:
        layer: Where it is from.
        grid: (H, W).
        prefix: p, the tokens before the grid's.
        features: (C_in, C_out).
        conv: Whether it is a convolution with kernel 1 on (N, C_in, H, W) instead of a linear layer.
        batch: The default of N.
    """

    layer: str
    grid: tuple[int, int]
    prefix: int
    features: tuple[int, int]
    conv: bool = False
    batch: int = 8

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.prefix)


def vit(name: str, width: int) -> list[Shape]:
    inner = 4 * width
    sizes = {"qkv, proj": (width, width), "fc1": (width, inner), "fc2": (inner, width)}
    return [Shape(f"{name} {layer}", (14, 14), 1, features) for layer, features in sizes.items()]


def pyramid(name: str, grids: list[tuple[int, int]], widths: list[int], conv: bool, batch: int) -> list[Shape]:
    return [
        Shape(f"{name} stage {stage} {layer}", grid, 0, features, conv, batch)
        for stage, (grid, width) in enumerate(zip(grids, widths, strict=True))
        for layer, features in (("fc1", (width, 4 * width)), ("fc2", (4 * width, width)))
    ]


SHAPES = [
    *vit("vit-s", 384),
    *vit("vit-b", 768),
    *vit("vit-l", 1024),
    # The convolutions with kernel 1 of its four stages, 224 px.
    *pyramid("efficientformer-l1", [(56, 56), (28, 28), (14, 14), (7, 7)], [48, 96, 224, 448], True, 8),
    # The linear layers of its four stages, 512 x 1024 px.
    *pyramid("segformer-b0", [(128, 256), (64, 128), (32, 64), (16, 32)], [32, 64, 160, 256], False, 1),
]


class OneLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.layer = nn.Conv2d(*shape.features, 1) if shape.conv else nn.Linear(*shape.features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(shape: Shape, mode: str, r: int) -> nn.Module:
    model = OneLayer(shape)
    if mode == PLAIN:
        return model
    place = {"target_modules": ["layer"], "grid_size": shape.grid, "num_prefix_tokens": shape.prefix}
    return get_peft_model(model, LBPWHTConfig(r=r, **input_gradient(mode), **place))


def input_gradient(mode: str) -> dict[str, Any]:
    name, _, rank = mode.rpartition("-")
    if name == ADAPTIVE and rank.isdigit():
        return {"grad_input_basis": ADAPTIVE, "grad_input_rank": int(rank)}
    return {"grad_input_rank": int(mode)} if mode.isdigit() else {"grad_input_dtype": mode}


def is_known(mode: str) -> bool:
    """Whether this version of LBP-WHT has this mode."""
    try:
        return mode == PLAIN or bool(LBPWHTConfig(**input_gradient(mode)))
    except ValueError:
        return False


class Pass:
    """A forward and a backward pass through one layer, with gradients of the input and the weight."""

    def __init__(self, shape: Shape, mode: str, options: argparse.Namespace):
        batch, device = options.batch_size or shape.batch, torch.device(options.device)
        self.model = adapted(shape, mode, options.r).train().to(device)
        self.bf16, self.device = options.bf16, device
        in_features, out_features = shape.features
        size = (batch, in_features, *shape.grid) if shape.conv else (batch, shape.layout.num_tokens, in_features)
        of_output = (batch, out_features, *shape.grid) if shape.conv else (*size[:-1], out_features)
        dtype = torch.bfloat16 if options.bf16 else torch.float32  # between the layers of a model under autocast too
        self.x = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(of_output, device=device, dtype=dtype)

    def timed(self) -> float:
        """The seconds of one pass."""
        touch(self.model)
        start = now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            y = self.model(self.x)
        y.backward(self.grad)
        seconds = now() - start
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None
        return seconds


def work(shape: Shape, mode: str, r: int, batch: int, bf16: bool, rates: Rates) -> Work:
    """The work that a pass has to do in any case.

    Multiply-adds are those of the three products: forward pass, weight gradient and input gradient. Of the projections,
    only the bytes that they read and write count, since as Walsh transforms they take few additions. In the modes of
    low precision, the small product of the weight gradient counts at the fastest precision; "auto" may choose that
    precision for the input gradient too.

    The forward pass reads x and W, and writes y and, if x is projected, the projection. The backward pass reads the
    gradient of y, what was kept of x, and W, and writes the gradients of x and W.
    """
    tokens, (in_features, out_features) = shape.layout.num_tokens, shape.features
    own = "bf16" if bf16 else "float32"
    fastest = max(rates.multiply_adds, key=lambda precision: rates.multiply_adds[precision])
    for_weight = tokens if mode == PLAIN else num_coefficients(shape.layout, BasisSet(r))
    for_input, of_input, of_weight = tokens, own, own
    if (rank := input_gradient(mode).get("grad_input_rank")) and not mode.isdigit():
        for_input = min(rank + shape.prefix, tokens)
    elif mode.isdigit():
        for_input = num_coefficients(shape.layout, BasisSet(int(mode)))
    elif mode not in (PLAIN, "full"):
        of_input, of_weight = fastest if mode == "auto" else mode, fastest

    multiply_adds = dict.fromkeys((own, of_weight, of_input), 0)
    for precision, rows in ((own, tokens), (of_weight, for_weight), (of_input, for_input)):
        multiply_adds[precision] += batch * rows * in_features * out_features
    kept = batch * for_weight * in_features * (1 if for_weight == tokens else 2)  # x itself is not written again
    activations = 2 * batch * tokens * (in_features + out_features) + kept
    weights = 3 * in_features * out_features * 4  # the parameters stay in float32
    return Work(multiply_adds, activations * (2 if bf16 else 4) + weights)


def measured(shape: Shape, options: argparse.Namespace, rates: Rates) -> list[dict[str, Any]]:
    """A row for each mode, with times in ms as quartiles [first, median, third]."""
    torch.manual_seed(0)
    passes = [Pass(shape, mode, options) for mode in options.modes]
    for each in passes:  # twice, so that what a mode sets up in its first or second pass is not measured
        each.timed(), each.timed()
    times = run_interleaved([each.timed for each in passes], range(options.rounds))
    batch = options.batch_size or shape.batch
    rows = []
    for mode, seconds in zip(options.modes, times, strict=True):
        parts = work(shape, mode, options.r, batch, options.bf16, rates).seconds(rates)
        over = quartiles(ratios(seconds, times[options.modes.index(PLAIN)])) if PLAIN in options.modes else None
        rows.append(
            {
                "layer": shape.layer,
                "batch": batch,
                "grid": shape.grid,
                "prefix": shape.prefix,
                "features": shape.features,
                "mode": mode,
                "ms": [1e3 * value for value in quartiles(seconds)],
                "over_plain": over,
                "floor_multiplying_ms": 1e3 * parts[0] if parts else None,
                "floor_moving_ms": 1e3 * parts[1] if parts else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["layer", "N x L x C_in x C_out", "mode", "ms", "(quartiles)", "/ plain"]
    header += ["floor: multiplying", "moving", "ms / floor"]
    lines = []
    for row in rows:
        low, middle, high = row["ms"]
        tokens = row["prefix"] + row["grid"][0] * row["grid"][1]
        sizes = " x ".join(map(str, (row["batch"], tokens, *row["features"])))
        parts = row["floor_multiplying_ms"], row["floor_moving_ms"]
        over_floor = None if parts[0] is None else middle / max(parts)
        line = [row["layer"], sizes, row["mode"], number(middle, 2), f"{low:.2f}-{high:.2f}"]
        line += [number(row["over_plain"] and row["over_plain"][1], 2), *(number(part, 2) for part in parts)]
        lines.append([*line, number(over_floor, 1)])
    return aligned(header, lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="", help="only those whose name contains this, as in vit-b or fc1")
    parser.add_argument(
        "--modes",
        nargs="+",
        help="plain, formats and ranks of the input gradient (default: all, and r)",
    )
    parser.add_argument("--r", type=int, default=10, help="bases per block for the weight gradient")
    parser.add_argument("--batch-size", type=int, help="images (default: 8, and 1 for the long sequences of SegFormer)")
    parser.add_argument("--bf16", action="store_true", help="everything under bf16 autocast")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rate-side", type=int, help="side of the matrices that the rate is measured with")
    parser.add_argument("--rate-mib", type=int, default=512, help="MiB that are copied to measure the bandwidth")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file (default: in runs/benchmarks)")
    options = parser.parse_args(arguments)
    options.modes = options.modes or [mode for mode in (*MODES, str(options.r)) if is_known(mode)]
    unknown = [mode for mode in options.modes if not is_known(mode)]
    if unknown:
        parser.error(f"LBP-WHT does not know the input gradients {', '.join(unknown)}")
    options.shapes = [shape for shape in SHAPES if options.layers in shape.layer]
    if not options.shapes:
        parser.error(f"no layer's name contains {options.layers!r}: {', '.join(shape.layer for shape in SHAPES)}")
    options.output = options.output or Path(
        "runs", "benchmarks", f"layers-{'bf16' if options.bf16 else 'float32'}.json"
    )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment()
    rates = measure_rates(torch.device(options.device), options.rate_side, options.rate_mib)
    print(
        in_words(where), f"r={options.r}, {'bf16 autocast' if options.bf16 else 'float32'}, {options.device}", sep="\n"
    )
    per_second = [f"{name} {rate / 1e9:.0f} G multiply-adds/s" for name, rate in rates.multiply_adds.items()]
    print(f"measured: {', '.join(per_second)}; memory {rates.bytes / 1e9:.1f} GB/s")
    rows = [row for shape in tqdm(options.shapes, leave=False) for row in measured(shape, options, rates)]
    print(table(rows))
    shown = {**vars(options), "shapes": len(options.shapes)}
    write_record(options.output, where, shown, rates={**rates.multiply_adds, "bytes": rates.bytes}, rows=rows)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
