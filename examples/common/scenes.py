"""The embedded default: scenes of scikit-learn's handwritten digits, and a small SegFormer that has only seen 0-4."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor, set_seed

from lbp_peft.loading.datasources import Source

from .task import Embedded

HEIGHT, WIDTH = 64, 128
DIGITS_PER_SCENE = 3


def scenes(wanted: Sequence[int], train: int, test: int) -> Source:
    """Scenes of digits of random size, place and colour on random textures, with label maps.

    Class 0 is the background. The writers of the digits in test scenes are not those of the training scenes.
    """
    data = load_digits()
    first_test = len(data.images) * 2 // 3  # rows are ordered by writer
    features = Features({"image": Image(), "label": Image()})

    def part(rows: range, count: int, seed: int) -> Dataset:
        random = np.random.default_rng((seed, wanted[0]))
        chosen = [row for row in rows if data.target[row] in wanted]
        glyphs = [(data.images[row] * (255 / 16), 1 + wanted.index(data.target[row])) for row in chosen]
        images, labels = zip(*(scene(glyphs, random) for _ in range(count)), strict=True)
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    names = ["background", *map(str, wanted)]
    return Source(part(range(first_test), train, 0), part(range(first_test, len(data.images)), test, 1), names)


def scene(glyphs: list[tuple[np.ndarray, int]], random: np.random.Generator) -> tuple[PILImage.Image, PILImage.Image]:
    """An image and its label map."""
    pixels, labels = texture(random), np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    sides = random.integers(28, 43, DIGITS_PER_SCENE)
    gaps = random.multinomial(WIDTH - sides.sum(), [1 / (DIGITS_PER_SCENE + 1)] * (DIGITS_PER_SCENE + 1))
    lefts = np.cumsum(gaps[:-1]) + np.cumsum(sides) - sides
    for index, side, left in zip(random.choice(len(glyphs), DIGITS_PER_SCENE), sides, lefts, strict=True):
        glyph, label = glyphs[index]
        top = random.integers(0, HEIGHT - side + 1)
        there = np.s_[top : top + side, left : left + side]
        ink = np.asarray(PILImage.fromarray(glyph.astype(np.uint8)).resize((side, side), PILImage.Resampling.BICUBIC))
        pixels[there] += (ink[..., None] / 255) * (random.uniform(140, 255, 3) - pixels[there])
        labels[there][ink > 100] = label
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)), PILImage.fromarray(labels)


def texture(random: np.random.Generator) -> np.ndarray:
    """A background of dark waves in a random direction with noise, shape (height, width, 3)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    angle, wavelength = random.uniform(0, np.pi), random.uniform(6, 40)
    waves = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + random.uniform(0, 2 * np.pi))
    grain = random.normal(0, 12, (HEIGHT, WIDTH, 1))
    return random.uniform(20, 90, 3) + 30 * waves[..., None] + grain


def tiny_segformer(seed: int = 0) -> SegformerForSemanticSegmentation:
    """A SegFormer small enough to be trained from scratch in seconds."""
    set_seed(seed)
    config = SegformerConfig(
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 2, 1],
        num_attention_heads=[1, 2, 4, 8],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        initializer_range=0.08,
    )
    model = SegformerForSemanticSegmentation(config)
    for module in model.modules():  # 0.02 is for wide models; this narrow one learns faster from scratch with more
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


EMBEDDED = Embedded(
    label="pre-training on digits 0-4",
    model=tiny_segformer,
    processor=SegformerImageProcessor(size={"height": HEIGHT, "width": WIDTH}),
    known=lambda: scenes(range(5), train=400, test=50),
    new=lambda: scenes(range(5, 10), train=100, test=50),
    epochs=4,
    learning_rate=3e-3,
)
