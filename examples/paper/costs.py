"""Measures the cost of a training step: its time, in which methods take turns, and the peak memory of each method."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from benchmarks.methods import NotAvailable
from torch import nn

from lbp_peft.environment import environment
from lbp_peft.measure import peak_memory
from lbp_peft.measure.running import loss_of_output
from lbp_peft.measure.steps import idle_optimiser, time_step
from lbp_peft.measure.timing import quartiles, ratios, run_interleaved

from .bench import Bench
from .methods import method_named

_STEPS = 3  # in the measurement of the peak
_RUN = Path(__file__).with_name("run.py")


def step_times(bench: Bench, methods: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of a whole training step on images, the frozen part of the model included.

    Returns:
        The quartiles of forward pass, backward pass and optimiser together, and those of the ratios to the first
        method, by method.
    """
    built = {}
    for name in methods:
        method = method_named(name)
        try:
            model, _ = bench.adapted(method, next(iter(method.ranks), None), seed=0, cut=False)
        except NotAvailable as error:
            print(f"left out {name}: {error}")
            continue
        built[name] = model
    batch = first_batch(bench)
    steps, loss = [], partial(loss_in_run, bench)
    for model in built.values():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps.append(partial(time_step, model, batch, loss, idle_optimiser(trained)))
    run_interleaved(steps, range(2))  # the first steps allocate memory, and find the layouts
    times = [[sum(parts) for parts in own] for own in run_interleaved(steps, range(rounds), unmeasured=1)]
    return {
        name: {
            "step_ms": [1000 * value for value in quartiles(own)],
            "over_first": quartiles(ratios(own, times[0])),
        }
        for name, own in zip(built, times, strict=True)
    }


def peak_of(bench: Bench, name: str) -> dict[str, float]:
    """The peak resident size of this process over some steps with AdamW."""
    method = method_named(name)
    model, _ = bench.adapted(method, next(iter(method.ranks), None), seed=0, cut=False)
    batch = first_batch(bench)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = idle_optimiser(trained)
    with peak_memory(bench.accelerator.device) as peak:
        for _ in range(_STEPS):
            time_step(model, batch, partial(loss_in_run, bench), optimiser)
    return {"peak_mib": peak.mib}


def peak_in_a_process(arguments: list[str], name: str) -> dict[str, float] | None:
    """[`peak_of`] in a new process, which gets the arguments of this program."""
    command = [sys.executable, str(_RUN), *arguments, "--methods", name, "--peak"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"no peak of {name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def loss_in_run(bench: Bench, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss, computed in the precision of the runs."""
    with bench.accelerator.autocast():
        return loss_of_output(model, batch)


def first_batch(bench: Bench) -> dict[str, torch.Tensor]:
    batch = next(iter(bench.images.loaders(0, "validation")[0]))
    return send_to_device(batch, bench.accelerator.device)


def costs(bench: Bench, methods: list[str], rounds: int, arguments: list[str]) -> dict[str, Any]:
    """The content of `costs.json`. Without rounds, only peaks are measured, which other work does not disturb."""
    before = environment()
    times = step_times(bench, methods, rounds) if rounds else {name: {} for name in methods}
    for name, own in times.items():
        own |= peak_in_a_process(arguments, name) or {}
    return {
        "environment": before, "batch_size": bench.options.batch_size, "image_size": list(bench.size), "rounds": rounds,
        "mixed_precision": bench.accelerator.mixed_precision, "methods": times,
    }  # fmt: skip
