"""Shows where the time of a training step goes: layers' products, projections, attention, copies, the rest, and Python.

    python examples/benchmarks/step_profile.py
    python examples/benchmarks/step_profile.py --bf16 --methods full lora-all lora-all+lbp-wht:r=10

PyTorch's profiler gives the time that each operation takes itself, without those that it calls. These times are summed
by kind, see `KINDS`. What is left of the step is Python, autograd and the profiler. The methods take turns as in
training_step.py, whose options these are; the table shows medians.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import training_step
from benchmarks.tables import aligned, number
from benchmarks.training_step import Step, check_methods, completed, prepared, title
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.measure.timing import now, rounds_within, run_interleaved, touch

METHODS = ["full", "lora-all", "lora-one-product", "lbp-wht:r=10", "lora-all+lbp-wht:r=10"]
# Names of operations of PyTorch on a CPU, by what they are used for in the models that are measured here.
KINDS = {
    "layers' products": ("aten::addmm", "aten::mm", "aten::addmm_", "aten::_int_mm", "aten::mkldnn_convolution",
                         "aten::convolution_backward"),
    "projections and lifts": ("aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index_select", "aten::gather", "aten::constant_pad_nd"),
    "GELU and norms": ("aten::gelu", "aten::gelu_backward", "aten::native_layer_norm",
                       "aten::native_layer_norm_backward"),
}  # fmt: skip
OTHERS, PYTHON = "other operations", "Python, autograd"
COLUMNS = (*KINDS, OTHERS, PYTHON)
PHASES = ("forward", "backward")
_KIND_OF = {operation: kind for kind, operations in KINDS.items() for operation in operations}


def profiled(step: Step) -> dict[str, Counter[str]]:
    """The milliseconds of a step's phases, by the columns of the table."""
    touch(step.model)
    result = {}
    loss, result["forward"] = _times(step.forward)
    _, result["backward"] = _times(loss.backward)
    step.model.zero_grad(set_to_none=True)
    return result


def _times(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a function returns, and the milliseconds that it takes, by column."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = now()
        value = run()
        seconds = now() - start
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):  # others are autograd's nodes, whose own time is Python
            times[_KIND_OF.get(event.key, OTHERS)] += event.self_cpu_time_total / 1e3
    times[PYTHON] = 1e3 * seconds - sum(times.values())
    return value, times


def row(method: str, rounds: list[dict[str, Counter[str]]]) -> dict[str, Any]:
    """The medians of a method's rounds, in milliseconds, by phase and column."""
    phases = {
        phase: {column: statistics.median(times[phase][column] for times in rounds) for column in COLUMNS}
        for phase in PHASES
    }
    return {"method": method, "rounds": len(rounds), **phases}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["method"], phase, *(number(row[phase][column]) for column in COLUMNS), number(sum(row[phase].values()))]
        for phase in PHASES
        for row in rows
    ]
    return aligned(["method", "pass", *COLUMNS, "together, ms"], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = training_step.parser(__doc__)
    parser.set_defaults(methods=METHODS, rounds=5, device="cpu")
    options = parser.parse_args(arguments)
    if options.output is None:
        name = f"profile-{options.model}-{'bf16' if options.bf16 else 'float32'}.json"
        options.output = Path("runs", "benchmarks", name)
    options = completed(options, parser)
    check_methods(options.methods, parser)
    if options.device != "cpu":
        parser.error("--device: on a GPU, use training_step.py, and PyTorch's profiler for its kernels")
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment()
    print(in_words(where), title(options), sep="\n")
    steps = prepared(options)
    if not steps:
        raise SystemExit("None of the methods can be had.")
    taking_turns = tqdm(
        rounds_within(options.minutes, options.rounds), desc="rounds", total=options.rounds, leave=False
    )
    rounds = run_interleaved([lambda step=step: profiled(step) for step in steps.values()], taking_turns, unmeasured=1)
    rows = [row(method, own) for method, own in zip(steps, rounds, strict=True)]
    print(table(rows))
    write_record(options.output, where, vars(options), rows=rows)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
