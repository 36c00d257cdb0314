"""Augmentation for image classification by kornia: RandAugment on an image, mixup and CutMix on a batch.

The augmentations depend on a seed only, and leave the random number generator of dropout unchanged, so a resumed run
sees the same images as an uninterrupted one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

OPERATIONS = 2  # of RandAugment on an image, as in the paper (arXiv 1909.13719)


def check_augmentation(rand_augment: int | None, mixup: float, cutmix: float) -> None:
    """Stop with a one-line message, before anything is written, if kornia is needed but missing."""
    if rand_augment is None and not mixup and not cutmix:
        return
    try:
        import kornia.augmentation  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f'--rand_augment, --mixup and --cutmix need kornia ({error}): pip install "lbp-peft[augmentation]", or '
            "pip install kornia."
        ) from None


def rand_augment(image: Image.Image, magnitude: int, seed: tuple[int, ...]) -> Image.Image:
    """An RGB image after random operations of this magnitude, 1 to 29."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    with _seeded(seed):
        pixels = _rand_augment(magnitude)(pixels)
    values = pixels[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.numpy())


def mix(batch: dict[str, Any], mixup: float, cutmix: float, seed: tuple[int, ...]) -> dict[str, Any]:
    """The batch, perhaps with its images mixed in pairs.

    Args:
        batch: `pixel_values` (N, C, H, W) and `labels` (N,), the indices of classes.
        mixup, cutmix: The probabilities that the batch is mixed by mixup or by CutMix.

    Returns:
        The batch. If its images were mixed, `labels` has shape (N, 3), float: the indices of both classes and the share
        of the second. [`loss_of`] supports both forms.
    """
    drawn = np.random.default_rng(seed).random()
    if drawn >= mixup + cutmix:
        return batch
    kind = "mixup" if drawn < mixup else "cutmix"
    with _seeded(seed):
        images, labels = _mixing(kind)(batch["pixel_values"], batch["labels"])
    first, second, share = labels.view(-1, 3).unbind(1)
    share = share if kind == "mixup" else 1 - share  # kornia gives the first class's share, as the paper does
    return batch | {"pixel_values": images, "labels": torch.stack([first, second, share], 1)}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss, or for mixed images the cross-entropies of both classes, weighted by their shares."""
    if not batch["labels"].is_floating_point():
        return model(**batch).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    first, second, share = batch["labels"].unbind(1)
    losses = [F.cross_entropy(logits, label.long(), reduction="none") for label in (first, second)]
    return torch.lerp(*losses, share.to(losses[0].dtype)).mean()


@functools.cache
def _rand_augment(magnitude: int) -> nn.Module:
    from kornia.augmentation.auto import RandAugment

    return RandAugment(n=OPERATIONS, m=magnitude)


@functools.cache
def _mixing(kind: str) -> nn.Module:
    from kornia.augmentation import RandomCutMixV2, RandomMixUpV2

    keys = ["input", "class"]
    return RandomMixUpV2(data_keys=keys) if kind == "mixup" else RandomCutMixV2(data_keys=keys, use_correct_lambda=True)


@contextmanager
def _seeded(seed: tuple[int, ...]) -> Iterator[None]:
    """Seed the CPU's random numbers, which kornia uses, within the block, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.default_rng(seed).integers(2**63)))
        yield
