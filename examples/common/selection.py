"""Which weights are kept: those of the epoch that is best on validation images, or an average over the updates.

Validation images are neither trained on nor tested on, so that the test score stays an honest one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import ClassLabel, Dataset, get_dataset_split_names
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .datasources import Source
from .options import Options
from .task import Task


def needs_validation(options: Options) -> bool:
    """Whether an option was given that chooses by validation score."""
    return options.keep_best or options.patience is not None


def check_selection(options: Options) -> None:
    """Stop with one line, before anything is written, where an option has a value that makes no sense."""
    if options.patience is not None and options.patience < 1:
        raise SystemExit(f"--patience is a number of epochs, at least 1, not {options.patience}.")
    if options.ema_decay is not None and not 0 < options.ema_decay < 1:
        raise SystemExit(f"--ema_decay is between 0 and 1, such as 0.99, not {options.ema_decay}.")
    if options.validation_split and not options.dataset:
        raise SystemExit("--validation_split names a split of --dataset, which is not given.")
    if options.validation_split and not needs_validation(options):
        raise SystemExit("--validation_split is of use only with --keep_best or --patience.")


def with_validation(task: Task, source: Source, options: Options) -> tuple[Source, str]:
    """The source with validation images: a split of the dataset, or else a part of the training images.

    Returns:
        The source, and a sentence that says where the validation images come from.

    Raises:
        SystemExit: the split to validate on is the one to test on; or there are too few images to hold some out.
    """
    if name := _validation_split(options):
        # Read as test images are, so columns, label names and checks are the same.
        source = dataclasses.replace(source, validation=task.load(dataclasses.replace(options, test_split=name)).test)
        return source, f"Validation: the {len(source.validation)} images of the split {name!r}."
    held_out = _held_out(source.train, options)
    if not 0 < len(held_out) < len(source.train):
        raise SystemExit(
            f"Of {len(source.train)} training images none can be held out for validation (--held_out "
            f"{options.held_out}). Name a split with --validation_split, or leave out --keep_best and --patience."
        )
    kept = np.setdiff1d(np.arange(len(source.train)), held_out)
    stratified = ", stratified by class" if isinstance(source.train.features["label"], ClassLabel) else ""
    found = dataclasses.replace(source, train=source.train.select(kept), validation=source.train.select(held_out))
    return found, (
        f"Validation: {len(held_out)} images held out of the training images{stratified}; {len(kept)} are trained on."
    )


def _validation_split(options: Options) -> str | None:
    """The split that the options name, or one called validation that is neither trained nor tested on."""
    if not options.dataset:
        return None
    try:
        names = get_dataset_split_names(options.dataset, options.dataset_config)
    except (ValueError, OSError):  # data that `datasets` alone cannot read
        names = []
    tested = options.test_split or ("test" if "test" in names else "validation")
    if options.validation_split in (tested, options.train_split):
        raise SystemExit(
            f"--validation_split {options.validation_split}: this split is trained or tested on. Name another one, or "
            "leave the option out to hold out a part of the training images."
        )
    taken = (tested, options.train_split)
    return options.validation_split or ("validation" if "validation" in names and "validation" not in taken else None)


def _held_out(train: Dataset, options: Options) -> np.ndarray:
    """Indices of a part of the images, the same part of each class; a class with a single image keeps it."""
    random = np.random.default_rng(options.data_seed)
    by_class = isinstance(train.features["label"], ClassLabel)
    labels = np.asarray(train["label"]) if by_class else np.zeros(len(train), dtype=int)
    chosen = []
    for label in np.unique(labels):
        indices = random.permutation(np.flatnonzero(labels == label))
        count = round(options.held_out * len(indices))
        chosen.append(indices[: min(max(count, 1), len(indices) - 1)])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=int)


def kept_epoch(history: list[dict[str, float]]) -> int:
    """The index of the epoch whose weights are kept: the first of those with the best validation score, or the last."""
    if "validation" not in history[0]:
        return len(history) - 1
    return max(range(len(history)), key=lambda epoch: (history[epoch]["validation"], -epoch))


def is_over(history: list[dict[str, float]], epochs: int, patience: int | None) -> bool:
    """Whether all epochs are done, or the last `patience` ones brought no better validation score."""
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
        """Give the model the weights that were kept."""
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
        model: As it is on its device.
        decay: Of the average; it remembers about 1 / (1 - decay) updates.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.live = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.averaged = AveragedModel(self.live, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """Take in the weights after an update."""
        self.averaged.update_parameters(self.live)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged weights."""
        for live, averaged in zip(self.live, self.averaged.module, strict=True):
            live.copy_(averaged)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged weights; afterwards its own again, to the bit."""
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
