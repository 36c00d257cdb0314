"""Measures the peak memory of training, in a process of its own for each method, and the time of a step.

    python examples/benchmarks/peak_memory_table.py
    python examples/benchmarks/peak_memory_table.py --model vit-s --batch-sizes 8 32 --methods full lbp-wht

Memory is measured over whole steps, with AdamW and its state: on a CPU it is the largest resident set of the process,
and on a GPU the most that PyTorch's allocator held. The table also has the memory of libraries and tensors at the end
of the forward pass, which is counted. The difference is what the backward pass works with, or what the C library keeps.
Environment variables that set the library's allocator, such as `MALLOC_MMAP_THRESHOLD_=262144`, therefore matter, and
are recorded. Times are those of a forward and a backward pass; for them, the methods take turns in one process, as in
training_step.py. Every figure is written as soon as it is measured: if the program is started again with the same
options, it continues where it was stopped. examples/benchmarks/methods.py describes how methods are written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.methods import NotAvailable, applied, compressed, words
from benchmarks.models import MODELS
from benchmarks.tables import aligned, number
from benchmarks.training_step import prepared
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.measure import saved_activations
from lbp_peft.measure.timing import quartiles, ratios, rounds_within, run_interleaved
from lbp_peft.tuner.layers.linear import LBPWHTLinear

MIB = 2**20
METHODS = (
    "full",
    "full+checkpointing",
    "lora-all",
    "lora-all+checkpointing",
    "lora-fa",
    "velora",
    "lbp-wht",
    f"lbp-wht:{compressed()}",
    "lora-all+lbp-wht",
    f"lora-all+lbp-wht:{compressed()}",
    "lbp-wht+checkpointing",
    f"lbp-wht:{compressed()}+checkpointing",
    "lora-all+lbp-wht+checkpointing",
    f"lora-all+lbp-wht:{compressed()}+checkpointing",
    "full+checkpointing:every=2",
    "lbp-wht+checkpointing:every=2",
    "lora-all+lbp-wht+checkpointing:every=2",
)
REFERENCES = (("full", "/ full"), ("lora-all", "/ LoRA all"))
PARTS = ("peaks", "tensors", "times")  # of a record
# Options that decide what is measured. A file with others is not continued.
DECISIVE = ("model", "image_size", "bf16", "steps", "threads", "device", "malloc")
# Environment variables that change how memory is allocated: by the C library, by another in its place, by PyTorch.
_OF_MALLOC = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")


def peak_of_process() -> int:
    """The bytes of the resident set of this process when it was largest.

    Linux counts this value from the start of each program, whereas `getrusage` includes the program that started this
    one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensors(options: argparse.Namespace, method: str) -> dict[str, float]:
    """The memory of a method's tensors when its forward pass ends, which is counted. The resident set is never smaller.

    Returns:
        The MiB of weights, trained copies and AdamW's state, which stay; and the MiB of the activations saved for each
        image. The resident set also has libraries, what the backward pass works with, and what the C library keeps.
    """
    kind, device = MODELS[options.model], torch.device(options.device)
    torch.manual_seed(0)
    model = applied(kind.build(options.image_size).to(device), method, list(kind.heads)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batch = {name: tensor.to(device) for name, tensor in kind.batch(1, options.image_size).items()}
    for _ in range(2):  # base weights are offloaded when the first backward pass ends
        with saved_activations(model) as saved, torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = kind.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = [module for module in model.modules() if isinstance(module, LBPWHTLinear)]
    away = {id(module.get_base_layer().weight) for module in adapted if module.base_weight_is_offloaded}
    stay = [parameter for parameter in model.parameters() if id(parameter) not in away]
    stay += [value for state in optimizer.state.values() for value in state.values()]
    return {"stay_mib": sum(tensor.nbytes for tensor in stay) / MIB, "saved_mib_an_image": saved.mib}


def train(options: argparse.Namespace, method: str, batch_size: int) -> dict[str, float]:
    """Train for a few steps in this process.

    Returns:
        The peak in MiB, and the part of it that was in use before the model was built.

    Raises:
        NotAvailable: the model or an installed version does not admit the method.
    """
    kind, device = MODELS[options.model], torch.device(options.device)
    on_gpu = device.type == "cuda"
    before = 0 if on_gpu else peak_of_process()
    torch.manual_seed(0)
    model = applied(kind.build(options.image_size).to(device), method, list(kind.heads)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batch = {name: tensor.to(device) for name, tensor in kind.batch(batch_size, options.image_size).items()}
    for _ in range(options.steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = kind.loss(model, batch)
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_of_process()
    return {"peak_mib": peak / MIB, "libraries_mib": before / MIB}


def take_turns(options: argparse.Namespace) -> dict[str, Any]:
    """The times of the methods' steps: quartiles [first, median, third] and minimum in ms, and ratios to others."""
    options.batch_size = options.batch_sizes[0]
    steps = prepared(options)
    for step in steps.values():  # tables are made, and base weights offloaded
        step.timed()
    turns = rounds_within(options.minutes, options.rounds)
    seconds = run_interleaved([step.timed for step in steps.values()], turns, unmeasured=1)
    wholes = {method: [sum(pair) for pair in own] for method, own in zip(steps, seconds, strict=True)}
    found: dict[str, Any] = {}
    for method, whole in wholes.items():
        found[method] = {"step_ms": [1e3 * value for value in quartiles(whole)], "least_ms": 1e3 * min(whole)}
        found[method]["rounds"] = len(whole)
        for reference, _ in REFERENCES:
            if reference in wholes:
                found[method][f"over {reference}"] = quartiles(ratios(whole, wholes[reference]))
    return found


def in_a_process(arguments: list[str], limit: float) -> tuple[dict[str, Any] | None, str]:
    """Run this program for one measurement.

    Returns:
        The figures; or None, and the reason why there are none.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"stopped after {limit:.0f} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return (None, result["left out"]) if "left out" in result else (result, "")
    if done.returncode < 0:
        return None, f"ended by signal {-done.returncode} (9: the system had no memory left)"
    return None, (done.stderr.strip().splitlines() or ["no output"])[-1]


def measured(options: argparse.Namespace, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure what is missing in the record."""
    given = ["--model", options.model, "--device", options.device, "--steps", str(options.steps)]
    given += ["--image-size", *map(str, options.image_size), *(["--bf16"] if options.bf16 else [])]
    given += ["--threads", str(options.threads)] if options.threads else []
    for batch_size in options.batch_sizes:
        peaks = record["peaks"].setdefault(str(batch_size), {})
        for method in options.methods:
            if method in peaks:
                continue
            start = time.perf_counter()
            own = [*given, "--batch-sizes", str(batch_size), "--only", "peak", "--methods", method]
            result, why = in_a_process(own, options.limit)
            if result is None:
                print(f"left out {method}, batch {batch_size}: {why}")
                continue
            peaks[method] = result
            print(f"{method}, batch {batch_size}: {result['peak_mib']:.0f} MiB ({time.perf_counter() - start:.0f} s)")
            save()
    for method in options.methods:
        if method not in record["tensors"]:
            result, why = in_a_process([*given, "--only", "tensors", "--methods", method], options.limit)
            if result is None:
                print(f"no tensors of {method}: {why}")
                continue
            record["tensors"][method] = result
            save()
    missing = [method for method in options.methods if method not in record["times"]]
    if options.rounds and missing:
        # All methods are timed again, since times of different runs cannot be compared.
        own = [*given, "--batch-sizes", str(options.batch_sizes[0]), "--only", "times", "--methods", *options.methods]
        own += ["--rounds", str(options.rounds), "--minutes", str(options.minutes)]
        result, why = in_a_process(own, 60 * options.minutes + options.limit)
        if result is None:
            print(f"no times: {why}")
        else:
            record["times"] = result
            save()


def table(record: dict[str, Any], methods: list[str]) -> str:
    header = ["method"]
    for batch_size in record["peaks"]:
        header += [f"peak MiB, batch {batch_size}", *(heading for _, heading in REFERENCES), "libraries and tensors"]
    header += ["step ms", "(least)", *(heading for _, heading in REFERENCES)] if record["times"] else []
    lines = []
    for method in methods:
        line = [method]
        counted = record["tensors"].get(method)
        for batch_size, peaks in record["peaks"].items():
            own = peaks.get(method)
            line.append(number(own and own["peak_mib"]))
            for reference, _ in REFERENCES:
                other = peaks.get(reference)
                line.append(number(own["peak_mib"] / other["peak_mib"] if own and other else None, 3))
            least = own and counted and counted["stay_mib"] + int(batch_size) * counted["saved_mib_an_image"]
            line.append(number(least and own["libraries_mib"] + least))
        if record["times"]:
            own = record["times"].get(method)
            line += [number(own and own["step_ms"][1]), number(own and own["least_ms"])]
            for reference, _ in REFERENCES:
                ratio = own and own.get(f"over {reference}")
                line.append(number(ratio and ratio[1], 3))
        lines.append(line)
    return aligned(header, lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit-b")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=list(METHODS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8], help="times are measured for the first")
    parser.add_argument("--image-size", type=int, nargs="+", help="side, or height and width (default: the model's)")
    parser.add_argument("--bf16", action="store_true", help="everything under bf16 autocast")
    parser.add_argument("--steps", type=int, default=2, help="of training; the first one makes AdamW's state")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each method; 0: no times")
    parser.add_argument("--minutes", type=float, default=4, help="for the timed rounds; later ones are left out")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a process is given up")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file (default: in runs/benchmarks)")
    parser.add_argument(
        "--only", choices=("peak", "times", "tensors"), help=argparse.SUPPRESS
    )  # in a process that was started for one measurement
    options = parser.parse_args(arguments)
    sides = options.image_size or MODELS[options.model].size
    if len(sides) > 2:
        parser.error("--image-size takes one side, or height and width")
    options.image_size = (sides[0], sides[-1])
    if options.steps < 2:
        parser.error("--steps must be at least 2: in the first step there is no optimiser state yet")
    for method in options.methods:
        try:
            words(method)
        except ValueError as error:
            parser.error(str(error))
    options.malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_OF_MALLOC)}
    if options.output is None:
        precision = "bf16" if options.bf16 else "float32"
        options.output = Path("runs", "benchmarks", f"peaks-{options.model}-{precision}-{options.device}.json")
    return options


def resumed(options: argparse.Namespace) -> dict[str, Any]:
    """The figures that an earlier run with the same options has measured."""
    if options.output.exists():
        try:
            record: dict[str, Any] = json.loads(options.output.read_text())
            earlier = record["options"]
        except (ValueError, KeyError) as error:
            raise SystemExit(f"{options.output} is no file of this program. Give another --output.") from error
        now = json.loads(json.dumps({name: getattr(options, name) for name in DECISIVE}))
        if {name: earlier.get(name, {} if name == "malloc" else None) for name in DECISIVE} != now:
            raise SystemExit(f"{options.output} was measured with other options. Remove it, or give another --output.")
        return {part: record.get(part, {}) for part in PARTS}
    return {part: {} for part in PARTS}


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.only:
        try:
            result: dict[str, Any]
            if options.only == "times":
                result = take_turns(options)
            elif options.only == "tensors":
                result = tensors(options, options.methods[0])
            else:
                result = train(options, options.methods[0], options.batch_sizes[0])
        except NotAvailable as why:
            result = {"left out": str(why)}
        print(json.dumps(result))
        return
    where, record = environment(), resumed(options)
    height, width = options.image_size
    precision = "bf16 autocast" if options.bf16 else "float32"
    print(in_words(where), f"{options.model}, {height} x {width} px, {precision}, {options.device}", sep="\n")

    def save() -> None:
        write_record(options.output, where, {name: getattr(options, name) for name in DECISIVE}, **record)

    measured(options, record, save)
    print(table(record, options.methods))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
