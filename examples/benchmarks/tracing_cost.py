"""Measures what it costs to find the positions of tokens: in a first pass with new input shapes, and in later passes.

    python examples/benchmarks/tracing_cost.py
    python examples/benchmarks/tracing_cost.py --models segformer-b0 --batch-size 1

A first pass is traced: the positions of the pixels follow every operation of the model. A later pass compares the model
and its inputs with those of the traced pass, and each layer looks up its layout. The time of that code is measured by
itself, within the same passes. The peak is that of the tensors that are allocated in a step, which is traced or later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.models import MODELS, Model
from benchmarks.tables import aligned, number
from lbp_peft import LBPWHTConfig
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.layout import LayoutFinder
from lbp_peft.measure.memory import allocated
from lbp_peft.measure.timing import now, quartiles, ratios, run_interleaved

# The methods of a finder that run in each forward pass.
IN_EACH_PASS = ("before", "after", "record", "padding_mask", "is_exact")


@contextmanager
def time_of_look_ups() -> Iterator[list[float]]:
    """Collect the seconds that each call of the finder's code takes within the block."""
    seconds: list[float] = []

    def timed(method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.append(now() - start)

        return run

    methods = {name: timed(getattr(LayoutFinder, name)) for name in IN_EACH_PASS}
    with mock.patch.multiple(LayoutFinder, **methods):
        yield seconds


def measured(name: str, kind: Model, options: argparse.Namespace) -> dict[str, Any]:
    """The times in ms as quartiles, the ratios of times in the same round, and the peaks of single steps in MiB."""
    size = tuple(options.image_size) if options.image_size else kind.size
    model = get_peft_model(kind.build(size), LBPWHTConfig(r=options.r)).to(options.device).train()
    batch = {key: value.to(options.device) for key, value in kind.batch(options.batch_size, size).items()}
    finder = next(module.finder for module in model.modules() if hasattr(module, "finder"))

    def traced() -> tuple[float, float]:
        finder.forget_traces()
        return step(model, kind, batch)

    def later() -> tuple[float, float]:
        return step(model, kind, batch)

    def looking_up() -> tuple[float, float]:
        with time_of_look_ups() as seconds:
            kind.loss(model, batch)
        return sum(seconds), 0.0

    traced(), later()
    peaks = {}
    for run in (traced, later):
        model.zero_grad()
        with allocated(torch.device(options.device)) as memory:
            run()
        peaks[run] = memory.peak / 2**20
    first, following, look_ups = run_interleaved((traced, later, looking_up), range(options.rounds))
    forward, whole = ([times[part] for times in following] for part in (0, 1))
    return {
        "model": name,
        "forward_ms": _in_ms(forward),
        "step_ms": _in_ms(whole),
        "look_ups_ms": _in_ms([time for time, _ in look_ups]),
        "traced_forward_ratio": quartiles(ratios([times[0] for times in first], forward)),
        "traced_step_ratio": quartiles(ratios([times[1] for times in first], whole)),
        "look_ups_of_step": quartiles(ratios([time for time, _ in look_ups], whole)),
        "peak_mib": peaks[later],
        "traced_peak_mib": peaks[traced],
    }


def step(model: nn.Module, kind: Model, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The seconds of a forward pass, and of a forward and a backward pass."""
    model.zero_grad()
    start = now()
    loss = kind.loss(model, batch)
    forward = now() - start
    loss.backward()
    return forward, now() - start


def _in_ms(seconds: list[float]) -> list[float]:
    return [1e3 * value for value in quartiles(seconds)]


def table(rows: list[dict[str, Any]]) -> str:
    of_times = ["forward ms", "step ms", "traced / forward", "traced step / step", "look-ups ms", "of step %"]
    header = ["model", *of_times, "peak MiB", "traced peak MiB"]
    return aligned(
        header,
        [
            [
                row["model"],
                *(number(row[name][1], 1) for name in ("forward_ms", "step_ms")),
                *(number(row[name][1], 2) for name in ("traced_forward_ratio", "traced_step_ratio", "look_ups_ms")),
                number(100 * row["look_ups_of_step"][1], 2),
                *(number(row[name], 0) for name in ("peak_mib", "traced_peak_mib")),
            ]
            for row in rows
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["vit-b", "swinv2-s"])
    parser.add_argument("--image-size", type=int, nargs=2, help="pixels (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument("--r", type=int, default=10, help="bases per block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "tracing_cost.json"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment()
    print(in_words(where), f"batch {options.batch_size}, {options.device}", sep="\n")
    rows = [measured(name, MODELS[name], options) for name in tqdm(options.models, leave=False)]
    print(table(rows))
    write_record(options.output, where, vars(options), rows=rows)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
