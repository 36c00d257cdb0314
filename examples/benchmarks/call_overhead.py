"""Measures what calling an adapted layer costs beside its computation, with layers whose computation takes no time.

    python examples/benchmarks/call_overhead.py

A model of 24 layers has 64 tokens of 16 features, so that products take a few microseconds and the rest is Python and
autograd. The table has the time of a forward and a backward pass for each layer, and by how much it exceeds that of the
plain layer, or of LoRA for a stack, which has LoRA beneath. "auto, exact" is what a narrow layer gets, and "low-rank"
what a wide one gets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tables import aligned
from lbp_peft import LBPWHTConfig
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.measure.timing import now, quartiles, run_interleaved

TOKENS, FEATURES, LAYERS = 64, 16, 24
_CALLS = 5  # of the model, in one measurement
_TARGETS = r"layers\.\d+"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def lora() -> nn.Module:
    return get_peft_model(Layers(), LoraConfig(r=4, target_modules=_TARGETS))


def adapted(**settings: object) -> nn.Module:
    return get_peft_model(Layers(), LBPWHTConfig(r=3, target_modules=_TARGETS, grid_size=(8, 8), **settings))


def stacked(**settings: object) -> nn.Module:
    return get_peft_model(lora(), LBPWHTConfig(r=3, grid_size=(8, 8), train_base_weight=False, **settings))


MAKE: dict[str, Callable[[], nn.Module]] = {
    "plain": Layers,
    "auto, exact": adapted,
    "low-rank": lambda: adapted(grad_input_dtype="full"),
    "LoRA": lora,
    "LoRA + auto, exact": stacked,
    "LoRA + low-rank": lambda: stacked(grad_input_dtype="full"),
}
PLAIN = {name: "LoRA" if "LoRA" in name else "plain" for name in MAKE}


def microseconds(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[float, float]:
    """Microseconds of a layer's forward and backward pass, means over the layers and several calls."""
    forward = backward = 0.0
    for _ in range(_CALLS):
        start = now()
        y = model(x)
        middle = now()
        y.backward(grad)
        backward += now() - middle
        forward += middle - start
    return 1e6 * forward / (_CALLS * LAYERS), 1e6 * backward / (_CALLS * LAYERS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "call-overhead.json"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, FEATURES, requires_grad=True)
    grad = torch.randn(1, TOKENS, FEATURES)
    runs = [partial(microseconds, make().train(), x, grad) for make in MAKE.values()]
    run_interleaved(runs, range(2))
    times = dict(zip(MAKE, run_interleaved(runs, tqdm(range(options.rounds), leave=False)), strict=True))
    rows = []
    for name, own in times.items():
        of_plain = times[PLAIN[name]]
        extra = quartiles([sum(mine) - sum(plain) for mine, plain in zip(own, of_plain, strict=True)])
        rows.append({"way": name, "us": [quartiles([part[i] for part in own]) for i in (0, 1)], "extra_us": extra})
    where = environment()
    print(in_words(where))
    lines = [[row["way"], *(f"{part[1]:.0f}" for part in row["us"]), f"{row['extra_us'][1]:.0f}"] for row in rows]
    print(aligned(["layer", "forward us", "backward us", "more than plain or LoRA, us"], lines))
    write_record(options.output, where, vars(options), rows=rows)


if __name__ == "__main__":
    main()
