"""Measures the cost of a training step of each method: memory, multiply-adds, and times compared side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from lbp_peft.measure import multiply_adds, saved_activations
from lbp_peft.measure.timing import now, ratios, run_interleaved, touch

from .models import trainable_parameters


@dataclass
class Cost:
    """The cost of one training step; times are relative to those of the first model measured beside it."""

    trainable: int
    saved_bytes: int
    backward_multiply_adds: int
    milliseconds: float
    relative_time: float


def measure_costs(
    accelerator: Accelerator, models: list[Callable[[], nn.Module]], batch: dict[str, Any], rounds: int
) -> list[Cost]:
    """Measure forward and backward passes on one batch.

    The models take turns, and times are compared within each round: other work on the machine slows the models of a
    round alike, and the median over rounds removes outliers.

    Args:
        models: Functions that build the models. Times are relative to those of the first model.
    """
    built = [build().to(accelerator.device).train() for build in models]
    counts = [_count(accelerator, model, batch) for model in built]
    runs = [partial(_time, accelerator, model, batch) for model in built]
    times = run_interleaved(runs, tqdm(range(rounds), desc="step times", unit="round"), unmeasured=1)
    return [
        Cost(
            trainable=trainable_parameters(model),
            saved_bytes=saved_bytes,
            backward_multiply_adds=backward,
            milliseconds=1000 * statistics.median(seconds),
            relative_time=statistics.median(ratios(seconds, times[0])),
        )
        for model, (saved_bytes, backward), seconds in zip(built, counts, times, strict=True)
    ]


def _forward(accelerator: Accelerator, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with accelerator.autocast():
        return model(**batch).loss


def _count(accelerator: Accelerator, model: nn.Module, batch: dict[str, Any]) -> tuple[int, int]:
    """The bytes saved by the forward pass, and the multiply-adds of the backward pass."""
    with saved_activations(model) as saved:
        loss = _forward(accelerator, model, batch)
    with multiply_adds() as backward:
        loss.backward()
    model.zero_grad(set_to_none=True)
    return saved.bytes, backward.total


def _time(accelerator: Accelerator, model: nn.Module, batch: dict[str, Any]) -> float:
    touch(model)
    start = now()
    _forward(accelerator, model, batch).backward()
    seconds = now() - start
    model.zero_grad(set_to_none=True)
    return seconds
