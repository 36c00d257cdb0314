"""From stored images to batches: the checkpoint's image processor, augmentation, and a reproducible order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from transformers import AutoImageProcessor, PretrainedConfig, ViTImageProcessor

from .options import Options, as_size
from .storedimages import as_rgb
from .task import Task
from .terminal import cause_of
from .views import View, random_view

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Preprocessor:
    """The image processor of a checkpoint, at a size of our choice.

    Args:
        options: Name the checkpoint, and the size if it is not the checkpoint's.
        config: Of the model; tells the size where there is no image processor.
        whole_image: Resize images as a whole, cropping nothing, so that pixels in and out correspond.
    """

    def __init__(self, options: Options, config: PretrainedConfig, whole_image: bool = False):
        self.overrides: dict[str, Any] = {}
        self.notice: str | None = None
        self.whole_image = whole_image
        size = as_size(options.image_size)
        try:
            self.processor = AutoImageProcessor.from_pretrained(options.model)
        except (OSError, ValueError) as error:
            file = Path(options.model).expanduser() / "preprocessor_config.json"
            if file.exists():
                raise SystemExit(f"{file} cannot be used: {cause_of(error)}") from None
            size = size or as_size(getattr(config, "image_size", None))
            if size is None:
                raise SystemExit(f"{options.model} says no image size: give --image_size.") from None
            sides = {"height": size[0], "width": size[1]}
            self.processor = ViTImageProcessor(size=sides, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
            shown = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
            self.notice = (
                f"{options.model} has no image processor: using ImageNet's mean and deviation, {shown} pixels."
            )
        if whole_image:
            size = size or self._size_of(Image.new("RGB", (64, 64)))
        if size and (options.image_size or whole_image):
            self.overrides = self._resized(size)
        self.size = self._size_of(Image.new("RGB", (64, 64)))

    def _size_of(self, image: Image.Image) -> tuple[int, int]:
        height, width = self(image).shape[-2:]
        return height, width

    def _resized(self, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments that make the processor give this size, keeping its margin around the centre crop if it may."""
        sides = {"height": size[0], "width": size[1]}
        if self.whole_image:
            other = ("do_center_crop", "do_pad", "keep_aspect_ratio")
            return {"size": sides} | {name: False for name in other if hasattr(self.processor, name)}
        crop = dict(getattr(self.processor, "crop_size", None) or {})
        edge = dict(self.processor.size).get("shortest_edge")
        if edge and crop.get("height") and getattr(self.processor, "do_center_crop", False):
            return {"size": {"shortest_edge": round(min(size) * edge / crop["height"])}, "crop_size": sides}
        return {"size": sides, "do_center_crop": False} if crop else {"size": sides}

    def __call__(
        self,
        image: Image.Image,
        view: View | None = None,
        augment: Callable[[Image.Image], Image.Image] | None = None,
    ) -> torch.Tensor:
        """The pixel values of an image, or of a part of it at the full size, augmented then."""
        image, arguments = as_rgb(image), self.overrides
        if view is not None:
            image = view.of(image, self.size, Image.Resampling.BICUBIC)
            image = augment(image) if augment else image
            crop = {"do_center_crop": False} if hasattr(self.processor, "do_center_crop") else {}
            arguments = arguments | {"do_resize": False} | crop
        return self.processor(images=image, return_tensors="pt", **arguments)["pixel_values"][0]


class Images(torch.utils.data.Dataset):
    """Images as pixel values. What augmentation draws depends on seed, epoch and index alone, never on history."""

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
    """The order of an epoch, from its seed and number alone: a resumed epoch goes on where it stopped."""

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

    The loader draws from a generator of its own: otherwise starting an epoch would move the global one, and a resumed
    run would see other dropout masks than an unbroken one.
    """
    return DataLoader(
        images,
        batch_size=options.batch_size if images.train else options.eval_batch_size,
        sampler=EpochOrder(images) if images.train else None,
        collate_fn=Collator(images, extra),
        num_workers=options.workers,
        generator=torch.Generator().manual_seed(images.seed),
    )
