"""Runs of methods on one model, one protocol and one set of images."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from common.models import train_mode, trainable_parameters
from common.processes import make_accelerator
from common.training import Run, train
from torch import nn
from transformers import PreTrainedModel

from lbp_peft.environment import environment
from lbp_peft.loading.options import as_size
from lbp_peft.measure import peak_memory

from .counting import mean_counts
from .data import ImageData, load_source
from .features import FeatureData, without_frozen_part
from .methods import Method
from .models import AdaptedPart, Backbone, adapted_part, load_timm
from .recipe import TABLES
from .search import Setting

# Options that results depend on; they are kept with each record.
_OF_RESULT = (
    "dataset", "train_files", "test_files", "image_size", "train_images", "train_images_per_class", "validation_images",
    "test_images", "data_seed", "classes", "epochs", "batch_size", "head_learning_rate", "weight_decay", "scheduler",
    "warmup_steps", "warmup_ratio", "max_grad_norm", "horizontal_flip", "min_crop", "boundary",
    "head", "head_channels",
)  # fmt: skip

_OF_FEATURES = (
    "weights", "dataset", "train_files", "test_files", "image_size", "train_images", "train_images_per_class",
    "validation_images", "test_images", "data_seed", "classes", "horizontal_flip",
)  # fmt: skip


class Bench:
    """One model, one protocol, one set of images.

    Args:
        table: The kind of task, a key of `TABLES`.
        name: The name of the model in records.
        backbone: The model.
        weights: The place of its weights; None: the one that the backbone names.
        protocol: "partial" or "full".
        options: The options of the recipe.
        cache: The folder for the features of the frozen part; None: every step begins with images.
    """

    def __init__(
        self,
        table: str,
        name: str,
        backbone: Backbone,
        weights: str | None,
        protocol: str,
        options: Any,
        cache: Path | None,
    ):
        self.task, self.backbone, self.protocol = TABLES[table](), backbone, protocol
        self.options = replace(options, model=weights or backbone.weights)
        self.accelerator: Accelerator = make_accelerator(self.options)
        self.cut = cache is not None
        self.source = load_source(self.task, self.options)
        base = self.base(seed=0)
        self.images = ImageData(base, self.task, self.source, self.options)
        self.about = {
            "table": table, "model": name, "weights": _short(self.options.model), "protocol": protocol,
            "cached": self.cut, **{key: _short(getattr(self.options, key, None)) for key in _OF_RESULT},
        }  # fmt: skip
        if self.accelerator.mixed_precision != "no":
            self.about["mixed_precision"] = self.accelerator.mixed_precision
        self.data: Any = self.images
        if cache is not None:
            if protocol != "partial":
                raise SystemExit("--cache: only the partial protocol leaves a part of the model frozen")
            of_data = {key: self.about[key] for key in _OF_FEATURES}
            file = Path(self.options.model).expanduser()
            if file.is_file():  # another pre-training may have replaced it
                of_data["weights_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            digest = hashlib.sha256(json.dumps(of_data, default=str).encode()).hexdigest()[:12]
            self.data = FeatureData(base, backbone, self.images, cache, f"{name}-{digest}")

    def base(self, seed: int) -> PreTrainedModel:
        """The pretrained model with a new head, the same one for equal seeds."""
        names, path = self.source.names, self.options.model
        if self.backbone.architecture is not None:
            return load_timm(self.backbone.architecture, path, names, seed, as_size(self.options.image_size))
        return self.task.model(path, names, seed, self.options)

    def adapted(
        self, method: Method, rank: int | None, seed: int, cut: bool | None = None
    ) -> tuple[nn.Module, AdaptedPart]:
        """The model, adapted by a method, and its adapted part.

        Args:
            method: The method.
            rank: Its rank, if it has one.
            seed: The seed of the head and the adapters.
            cut: Whether the model takes features in place of images; None: as in the runs.

        Raises:
            NotAvailable: the model does not admit the method.
        """
        model = self.base(seed)
        settings = {"boundary": self.options.boundary}
        part = adapted_part(model, self.backbone.stages[self.protocol], settings)
        if self.cut if cut is None else cut:
            model = without_frozen_part(model, self.backbone)
            if self.backbone.layout is not None:
                settings |= self.backbone.layout(self.images.preprocessor.size)
        torch.manual_seed(seed)
        model = method.build(model, part, rank).to(self.accelerator.device)
        train_mode(model)
        return model, part

    def run(self, method: Method, setting: Setting, seed: int, scored: str) -> dict[str, Any]:
        """Train by a method with one seed.

        Args:
            method: The method.
            setting: Its learning rate and rank.
            seed: The seed of the run.
            scored: The images that are scored after the last epoch, `validation` or `test`.

        Returns:
            The record of the run. Its score is that after the last epoch; its counts are means over all steps.
        """
        set_seed(seed)
        model, part = self.adapted(method, setting.rank, seed)
        loaders = self.data.loaders(seed, scored)
        batch = send_to_device(next(iter(loaders[0])), self.accelerator.device)
        exact_share = min(method.exact_steps / (len(loaders[0]) * self.options.epochs), 1.0)
        counts = mean_counts(model, part, batch, exact_share)
        label, rate = f"{method.label}, {setting.learning_rate:g}", setting.learning_rate
        run = Run(
            label, Path(), self.options.epochs, rate, seed, part.heads, self.options.head_learning_rate,
            method.exact_steps, scores_last_only=True,
        )  # fmt: skip
        machine, start = environment(), time.perf_counter()
        with peak_memory(self.accelerator.device) as peak:
            _, history = train(self.accelerator, self.task, model, loaders, run, self.options)
        return {
            "label": method.label,
            "score": history[-1]["score"],
            "metric": self.task.metric_name,
            "curve": [epoch | {"score": None if math.isnan(epoch["score"]) else epoch["score"]} for epoch in history],
            "seconds": time.perf_counter() - start,
            "training_seconds": sum(epoch["seconds"] for epoch in history),
            "peak_mib_of_process": peak.mib,
            "trained_parameters": trainable_parameters(model),
            **counts,
            "environment": machine,
        }

    def config(self, method: str, setting: Setting, seed: int, scored: str) -> dict[str, Any]:
        """Everything that the result of a run depends on."""
        return {
            **self.about, "method": method, "learning_rate": setting.learning_rate, "rank": setting.rank, "seed": seed,
            "scored": scored,
        }  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return as_size(self.options.image_size) or self.images.preprocessor.size


def _short(value: Any) -> Any:
    """The value in records: absolute paths are cut to their last two parts, since the rest depends on the machine."""
    if isinstance(value, list):
        return [_short(one) for one in value]
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return "/".join(Path(value).parts[-2:]) if is_path else value
