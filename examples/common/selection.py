"""Chooses the weights to keep: those of the best epoch on validation images, or an average over the updates.

Validation images are used neither for training nor for testing, so the test score is unbiased.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lbp_peft.loading.datasources import VALIDATION, Source, hold_out

from .options import Options
from .task import Task


def with_validation(task: Task, source: Source, options: Options) -> tuple[Source, str]:
    """The source with validation images: the split that was loaded, or else a part of the training images.

    Returns:
        The source, and a sentence that says where the validation images come from.

    Raises:
        SystemExit: there are too few images to hold some out for validation.
    """
    if source.validation is not None:
        split = options.validation_split or VALIDATION
        return source, f"Validation: the {len(source.validation)} images of the split {split!r}."
    labels = task.classes(source.train)
    train, validation = hold_out(source.train, options, labels, "validate")
    stratified = "" if labels is None else ", stratified by class"
    return dataclasses.replace(source, train=train, validation=validation), (
        f"Validation: {len(validation)} images held out of the training images{stratified}; {len(train)} are trained "
        "on."
    )


def kept_epoch(history: list[dict[str, float]]) -> int:
    """The index of the epoch whose weights are kept: the first of those with the best validation score, or the last."""
    if "validation" not in history[0]:
        return len(history) - 1
    return max(range(len(history)), key=lambda epoch: (history[epoch]["validation"], -epoch))


def is_over(history: list[dict[str, float]], epochs: int, patience: int | None) -> bool:
    """Whether all epochs are done, or the last `patience` ones had no better validation score."""
    if len(history) >= epochs:
        return True
    return bool(history) and patience is not None and len(history) - 1 - kept_epoch(history) >= patience


class Best:
    """The trained weights, and the statistics of batch norms, as they were after the best epoch."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights: dict[str, Tensor] = {}

    def _live(self) -> dict[str, Tensor]:
        saved = self.model.state_dict().keys()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    def keep(self) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in self._live().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Set the model's weights to those that were kept."""
        live = self._live()
        for name, tensor in self.weights.items():
            live[name].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        live = self._live()
        self.weights = {name: tensor.to(live[name].device) for name, tensor in weights.items()}


class Average:
    """An exponential moving average of the trained weights over the updates.

    Args:
        model: The model, on its device already.
        decay: The decay of the average, which covers about 1 / (1 - decay) updates.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.live = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.averaged = AveragedModel(self.live, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """Update the average with the current weights."""
        self.averaged.update_parameters(self.live)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the model's weights to their average."""
        for live, averaged in zip(self.live, self.averaged.module, strict=True):
            live.copy_(averaged)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the model's weights to their average within the block, and restore them afterwards, bit for bit."""
        own = [parameter.detach().clone() for parameter in self.live]
        self.apply()
        yield
        with torch.no_grad():
            for live, tensor in zip(self.live, own, strict=True):
                live.copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.averaged.load_state_dict(state)
