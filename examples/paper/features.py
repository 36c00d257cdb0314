"""Features of the frozen part of a model, computed once for all runs.

In the partial protocol the first stages never change. If mirroring is the only augmentation, their outputs are the same
in every epoch, trial, seed and method, so the runs can begin with them. The gradients are those of training on images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.images import loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import ImageData
from .models import Backbone

_BATCH = 32


class PassThrough(nn.Module):
    """Takes the place of a frozen module before the adapted part, and returns its first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Reached(Exception):
    """Ends a forward pass at the first module of the adapted part."""


def without_frozen_part(model: PreTrainedModel, backbone: Backbone) -> PreTrainedModel:
    """The model itself, which then takes the output of [`features_of`] in place of images."""
    for name in [name for name, _ in model.named_modules() if re.search(backbone.before, name)]:
        model.set_submodule(name, PassThrough())
    return model


@torch.no_grad()
def features_of(model: PreTrainedModel, backbone: Backbone, batch: dict[str, Any]) -> Tensor:
    """The input of the first module of the adapted part, in evaluation mode."""
    assert backbone.entry is not None
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])
        raise _Reached

    handle = model.get_submodule(backbone.entry).register_forward_pre_hook(catch)
    try:
        model.eval()(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


class StoredFeatures(torch.utils.data.Dataset):
    """Features with labels.

    Args:
        features: Shape (1 or 2, images, ...): those of the images and, for training, those of their mirror images.
        labels: The labels of the images.
        task: The task.
        train: Whether to draw between an image and its mirror image.
        seed: The seed of the draws.
    """

    def __init__(self, features: Tensor, labels: list[Any], task: Any, *, train: bool, seed: int = 0):
        self.features, self.labels, self.task = features, labels, task
        self.train, self.seed, self.epoch = train, seed, 0

    def __len__(self) -> int:
        return self.features.shape[1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.seed, self.epoch, int(index)))
        version = random.integers(len(self.features)) if self.train else 0
        return {"pixel_values": self.features[version, int(index)], "labels": self.labels[int(index)]}


class FeatureData:
    """Batches of features in place of images, see [`ImageData`].

    Args:
        model: The whole model. Its frozen part runs once, unless the folder has the features.
        backbone: The backbone that the model is made from.
        images: The images.
        folder: The folder of the features.
        name: The name of the files in the folder, unique for model, images and size.
    """

    def __init__(self, model: PreTrainedModel, backbone: Backbone, images: ImageData, folder: Path, name: str):
        if backbone.entry is None:
            raise SystemExit("--cache: the frozen part of this model is not known as one that can be cut off")
        if images.options.min_crop < 1 or getattr(images.options, "rand_augment", None):
            raise SystemExit("--cache is for training without random crops: give --min_crop 1")
        self.images = images
        self.extra: dict[str, Any] = {}
        self.parts = {
            part: self._part(model, backbone, part, folder / f"{name}-{part}.pt")
            for part in ("train", "validation", "test")
        }

    def loaders(self, seed: int, scored: str) -> list[DataLoader]:
        task, options = self.images.task, self.images.options
        data = [
            StoredFeatures(*self.parts["train"], task, train=True, seed=seed),
            StoredFeatures(*self.parts[scored], task, train=False),
        ]
        return [loader(one, options, self.extra) for one in data]

    def _part(self, model: PreTrainedModel, backbone: Backbone, part: str, file: Path) -> tuple[Tensor, list[int]]:
        dataset = getattr(self.images.source, part)
        labels = list(dataset["label"])
        if file.exists():
            stored = torch.load(file)
            if stored["labels"] == labels:
                return stored["features"], labels
        mirrored = part == "train" and self.images.options.horizontal_flip
        features = torch.stack(
            [
                torch.cat([features_of(model, backbone, batch) for batch in self._batches(dataset, flip)])
                for flip in ((False, True) if mirrored else (False,))
            ]
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")  # two programs may compute the same features
        torch.save({"features": features, "labels": labels}, new)
        os.replace(new, file)
        return features, labels

    def _batches(self, dataset: Any, mirrored: bool) -> Iterator[dict[str, Any]]:
        for start in tqdm(range(0, len(dataset), _BATCH), desc="frozen part", unit="batch"):
            rows = dataset[start : start + _BATCH]["image"]
            pixels = torch.stack([self.images.preprocessor(image) for image in rows])
            yield {"pixel_values": pixels.flip(-1) if mirrored else pixels, **self.images.extra}
