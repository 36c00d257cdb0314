"""From stored images to batches: the checkpoint's image processor, augmentation, and a reproducible order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from lbp_peft.loading.preprocessing import Preprocessor
from lbp_peft.loading.views import random_view

from .options import Options
from .task import Task


class Images(torch.utils.data.Dataset):
    """Images as pixel values. Augmentation depends only on seed, epoch and index, not on history."""

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        preprocessor: Preprocessor,
        options: Options,
        *,
        train: bool,
        seed: int = 0,
    ):
        self.dataset, self.task, self.preprocessor, self.options = dataset, task, preprocessor, options
        self.train, self.seed, self.epoch = train, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, view = self.dataset[int(index)], None
        seed = self.seed, self.epoch, int(index)
        if self.train:
            random = np.random.default_rng(seed)
            view = random_view(row["image"], random, self.options.min_crop, self.options.horizontal_flip)
        label = self.task.label(row["label"], view, self.preprocessor.size, self.options)
        augment = partial(self.task.augment, seed=seed, options=self.options) if self.train else None
        return {"pixel_values": self.preprocessor(row["image"], view, augment), "labels": label}


class EpochOrder(Sampler[int]):
    """The order of an epoch, which depends only on its seed and number, so that it can be resumed."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.images.seed, self.images.epoch)).permutation(len(self.images))
        return iter(order.tolist())


class Collator:
    """Stack examples; `extra` are further arguments of the model's forward pass."""

    def __init__(self, images: Images, extra: dict[str, Any]):
        self.task, self.train, self.extra = images.task, images.train, extra

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": self.task.collate([example["labels"] for example in examples], self.train),
            **self.extra,
        }


def loader(images: Images, options: Options, extra: dict[str, Any]) -> DataLoader:
    """Batches of images, shuffled by epoch for training.

    The loader has a random generator of its own. Otherwise the start of an epoch would change the state of the global
    generator, and a resumed run would have other dropout masks than an uninterrupted one.
    """
    return DataLoader(
        images,
        batch_size=options.batch_size if images.train else options.eval_batch_size,
        sampler=EpochOrder(images) if images.train else None,
        collate_fn=Collator(images, extra),
        num_workers=options.workers,
        generator=torch.Generator().manual_seed(images.seed),
    )
