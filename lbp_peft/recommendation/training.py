"""Trains a candidate step by step, as a training program does, to measure what later steps take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..measure.steps import idle_optimiser, time_step
from ..measure.warming_up import run_until_warm
from .candidates import Candidate
from .trial import SEED, Job, RetainedLoss


class Step(NamedTuple):
    """The measurements of a training step.

    Attributes:
        seconds: The duration of the step.
        peak_bytes: The most bytes that its process has had in memory at once so far; 0 if that is not measured.
    """

    seconds: float
    peak_bytes: int = 0


class Training:
    """A candidate that is trained with a learning rate of 0. The steps that trace and compile the model come first.

    Args:
        model: The plain model, which is changed.
        job: The data.
        candidate: The candidate.
    """

    def __init__(self, model: nn.Module, job: Job, candidate: Candidate):
        torch.manual_seed(SEED)
        self._batches, self._loss = job.batches, RetainedLoss(job)
        self._model = candidate.apply_to(model, job.heads).train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimiser = idle_optimiser(trained)
        self._number = 0
        run_until_warm(self._model, self.step)
        self._number = 0  # so that all candidates train on the same batch in a round

    def step(self) -> float:
        """Run a step on the next batch, and return its duration."""
        batch = self._batches[self._number % len(self._batches)]
        self._number += 1
        return sum(time_step(self._model, batch, self._loss, self._optimiser))
