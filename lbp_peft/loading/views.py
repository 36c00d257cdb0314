"""Which part of an image the model sees: a random one in training, drawn alike for the image and its label map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class View:
    """A box of an image, (left, top, right, bottom) after mirroring where `mirrored` is set."""

    box: tuple[float, float, float, float]
    mirrored: bool = False

    def of(self, image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
        """The part of an image in this box, resized to (height, width)."""
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.resize((size[1], size[0]), resampling, box=self.box)


def random_view(image: Image.Image, random: np.random.Generator, min_crop: float, flip: bool) -> View:
    """A random crop, mirrored half of the time where `flip` is set."""
    mirrored = flip and bool(random.random() < 0.5)
    return View(random_box(image.width, image.height, random, min_crop), mirrored)


def random_box(
    width: int, height: int, random: np.random.Generator, min_crop: float
) -> tuple[float, float, float, float]:
    """A box of `min_crop` to 1 of the area, its sides' ratio between 3/4 and 4/3 of the image's, anywhere within."""
    if min_crop >= 1:
        return 0, 0, width, height
    area, ratio = random.uniform(min_crop, 1), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    w, h = width * min(1, area**0.5 * ratio), height * min(1, area**0.5 / ratio)
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    return left, top, left + w, top + h
