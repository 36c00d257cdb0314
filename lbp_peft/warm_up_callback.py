"""A callback for exact backpropagation in the first steps of transformers' Trainer."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .tuner.layers.base import LBPWHTLayer
from .tuner.report import exact_backward


class ExactWarmUpCallback(TrainerCallback):
    """Trains the first steps with exact backpropagation, and all later ones with LBP-WHT.

    With low-rank input gradients this recovers accuracy, see "Exact gradients at first" in docs/choosing-settings.md.
    The first steps take the time and the memory of exact backpropagation. The callback reads the number of the step
    from the Trainer, so that a training run that is resumed continues as an unbroken one.

    A loop of one's own needs no callback, but `with exact_backward(model):` around the forward passes of these steps.

    Args:
        steps: The number of exact steps, those of the optimizer, which may each consist of several batches.

    Raises:
        ValueError: steps is not an int of at least 1.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[ExactWarmUpCallback(steps=200)], ...)
    """

    def __init__(self, steps: int):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an int of at least 1, got {steps!r}.")
        self.steps = steps
        self._within = ExitStack()
        self._has_warned = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._within.close()  # of a step that was interrupted
        if state.global_step < self.steps:
            self._warn_if_useless(kwargs["model"])
            self._within.enter_context(exact_backward(kwargs["model"]))

    def _warn_if_useless(self, model: nn.Module) -> None:
        if not self._has_warned and not any(isinstance(module, LBPWHTLayer) for module in model.modules()):
            self._has_warned = True
            warnings.warn("ExactWarmUpCallback changes nothing: the model has no LBP-WHT layers.", stacklevel=3)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._within.close()
