"""Images as datasets store them: files or bytes, in any of the modes that Pillow knows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .terminal import in_one_line


def open_image(stored: dict[str, Any], whole: bool = True) -> Image.Image:
    """The image from the bytes or the path in a row of a dataset, rotated as its EXIF data says.

    Args:
        whole: Whether to decode it at full size; otherwise a JPEG is decoded at a smaller size, which is faster.

    Raises:
        Exception: the image cannot be read.
    """
    if stored.get("bytes") is None and not stored.get("path"):
        raise ValueError("there is no image")
    data = stored.get("bytes")
    with Image.open(io.BytesIO(data) if data is not None else Path(stored["path"])) as image:
        size = image.size
        if not whole:
            image.draft(None, (64, 64))
        image.load()
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        upright = ImageOps.exif_transpose(image)
    rotated = (upright.size == image.size[::-1]) and image.getexif().get(0x0112, 1) >= 5
    upright.info["size"] = size[::-1] if rotated else size
    return upright


def why_unreadable(error: Exception) -> str:
    """The reason why [`open_image`] raised an error, in one line."""
    text = in_one_line(error)
    return "not an image that Pillow can read" if text.startswith("cannot identify image file") else text


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8 bits and three channels. 16-bit grey values are scaled, since Pillow would clip them at 255."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if image.mode != "I" or values.max() > 255:
            values /= 257
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
