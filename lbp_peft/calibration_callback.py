"""Calibrates the bases of a model while transformers' Trainer trains it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .calibration import CalibratedSelection
from .callback import LBPWHTCallback
from .measure.running import LossFunction, device_of
from .tuner.calibrate import calibrate
from .tuner.layers.base import LBPWHTLayer


class CalibrationCallback(TrainerCallback):
    """Calls [`lbp_peft.calibrate`] before the first step, unless the bases were loaded, and at a given interval.

    A run that is resumed uses the bases of its checkpoint until the next calibration, as an uninterrupted run would.
    Every process calibrates by its own batches, and all choose the same bases.

    Args:
        batches: See [`lbp_peft.calibrate`]. A list or a DataLoader, since they are run again in each calibration.
        every: Steps from one calibration to the next. None: only the first one is made.
        loss_fn: (model, batch) -> scalar loss; None: `model(**batch).loss`.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[CalibrationCallback(batches, every=500)], ...)
    """

    def __init__(self, batches: Iterable[Any], every: int | None = None, loss_fn: LossFunction | None = None):
        if every is not None and every < 1:
            raise ValueError(f"every must be None or at least 1, got {every}.")
        if iter(batches) is batches:
            raise ValueError("The batches are run again in each calibration: give a list or a DataLoader.")
        self.batches, self.every, self.loss_fn = batches, every, loss_fn

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (model := kwargs.get("model")) is None:
            return
        is_due = self.every is not None and state.global_step > 0 and state.global_step % self.every == 0
        if is_due or not _is_calibrated(model):
            with LBPWHTCallback._autocast(args, device_of(model)):
                calibrate(model, self.batches, self.loss_fn)


def _is_calibrated(model: nn.Module) -> bool:
    rules = [rule for m in model.modules() if isinstance(m, LBPWHTLayer) for rule in m.rules_in_effect()]
    bases = [rule.weight_basis for rule in rules if rule.chosen_by is not None]
    return not bases or any(not isinstance(basis, CalibratedSelection) for basis in bases)
