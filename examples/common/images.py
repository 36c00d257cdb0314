"""From stored images to batches: the checkpoint's image processor, augmentation, and a reproducible order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from transformers import AutoImageProcessor, PretrainedConfig, ViTImageProcessor

from .options import Options

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Preprocessor:
    """The image processor of a checkpoint, at a size of our choice."""

    def __init__(self, options: Options, config: PretrainedConfig):
        self.overrides: dict[str, Any] = {}
        self.notice: str | None = None
        try:
            self.processor = AutoImageProcessor.from_pretrained(options.model)
        except OSError:
            side = options.image_size or config.image_size
            size = {"height": side, "width": side}
            self.processor = ViTImageProcessor(size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
            self.notice = f"{options.model} has no image processor: using ImageNet's mean and deviation, {side} pixels."
        if options.image_size:
            self.overrides = self._resized(options.image_size)
        self.size: int = self(Image.new("RGB", (64, 64))).shape[-1]

    def _resized(self, side: int) -> dict[str, Any]:
        """Arguments that make the processor give side x side pixels, keeping its margin around the centre crop."""
        square = {"height": side, "width": side}
        crop = dict(getattr(self.processor, "crop_size", None) or {})
        edge = dict(self.processor.size).get("shortest_edge")
        if edge and crop.get("height") and getattr(self.processor, "do_center_crop", False):
            return {"size": {"shortest_edge": round(side * edge / crop["height"])}, "crop_size": square}
        return {"size": square, "do_center_crop": False} if crop else {"size": square}

    def __call__(self, image: Image.Image, **overrides: Any) -> torch.Tensor:
        arguments = self.overrides | overrides
        return self.processor(images=image.convert("RGB"), return_tensors="pt", **arguments)["pixel_values"][0]

    def augmented(self, image: Image.Image, random: np.random.Generator, min_crop: float, flip: bool) -> torch.Tensor:
        """A random crop, resized to the full input, mirrored half of the time where `flip` is set."""
        image = image.convert("RGB")
        if flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = random_box(image.width, image.height, random, min_crop)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        crop = {"do_center_crop": False} if hasattr(self.processor, "do_center_crop") else {}
        return self(image, do_resize=False, **crop)


def random_box(width: int, height: int, random: np.random.Generator, min_crop: float) -> tuple[float, ...]:
    """A box of `min_crop` to 1 of the area, its sides' ratio between 3/4 and 4/3 of the image's, anywhere within."""
    if min_crop >= 1:
        return 0, 0, width, height
    area, ratio = random.uniform(min_crop, 1), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    w, h = width * min(1, area**0.5 * ratio), height * min(1, area**0.5 / ratio)
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    return left, top, left + w, top + h


class Images(torch.utils.data.Dataset):
    """Images as pixel values. What augmentation draws depends on seed, epoch and index alone, never on history."""

    def __init__(self, dataset: Dataset, preprocessor: Preprocessor, options: Options, *, train: bool, seed: int = 0):
        self.dataset, self.preprocessor, self.options = dataset, preprocessor, options
        self.train, self.seed, self.epoch = train, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[int(index)]
        if not self.train:
            return {"pixel_values": self.preprocessor(row["image"]), "labels": row["label"]}
        random = np.random.default_rng((self.seed, self.epoch, index))
        pixels = self.preprocessor.augmented(row["image"], random, self.options.min_crop, self.options.horizontal_flip)
        return {"pixel_values": pixels, "labels": row["label"]}


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

    def __init__(self, extra: dict[str, Any]):
        self.extra = extra

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
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
        collate_fn=Collator(extra),
        num_workers=options.workers,
        generator=torch.Generator().manual_seed(images.seed),
    )
