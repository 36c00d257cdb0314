"""Preprocessing by the image processor of a checkpoint, at a given size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor, PretrainedConfig, ViTImageProcessor

from .options import DataOptions, as_size
from .storedimages import as_rgb
from .terminal import cause_of
from .views import View

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Preprocessor:
    """The image processor of a checkpoint, at a given size.

    Args:
        options: The options, which name the checkpoint, and the size if it is not the checkpoint's.
        config: The configuration of the model, which has the size if there is no image processor.
        whole_image: Whether to resize images as a whole, without cropping, so that input and output pixels correspond.
    """

    def __init__(self, options: DataOptions, config: PretrainedConfig, whole_image: bool = False):
        self.overrides: dict[str, Any] = {}
        self.notice: str | None = None
        self.whole_image = whole_image
        assert options.model is not None
        size = as_size(options.image_size)
        try:
            self.processor = _adjustable(AutoImageProcessor.from_pretrained(options.model))
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
        """The arguments with which the processor returns this size, with its margin around the crop if possible."""
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
        """The pixel values of an image, or of an augmented part of it at the full size."""
        image, arguments = as_rgb(image), self.overrides
        if view is not None:
            image = view.of(image, self.size, Image.Resampling.BICUBIC)
            image = augment(image) if augment else image
            crop = {"do_center_crop": False} if hasattr(self.processor, "do_center_crop") else {}
            arguments = arguments | {"do_resize": False} | crop
        return self.processor(images=image, return_tensors="pt", **arguments)["pixel_values"][0]


def _adjustable(processor: Any) -> Any:
    """The processor, or for one of timm's, which takes no size and no other arguments, one that does the same."""
    data: dict[str, Any] | None = getattr(processor, "data_config", None)
    if hasattr(processor, "size") or data is None:
        return processor
    _, height, width = data["input_size"]
    return CLIPImageProcessor(
        size={"shortest_edge": int(min(height, width) / data["crop_pct"])},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
