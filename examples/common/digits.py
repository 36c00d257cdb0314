"""The embedded default: scikit-learn's handwritten digits and a small ViT that has only seen 0 to 4."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from lbp_peft.loading.datasources import Source

from .task import Embedded

SIZE = 32


def digits(wanted: Sequence[int]) -> Source:
    """Images of the wanted digits, as the user's own data would come: columns `image` and `label`.

    The rows are ordered by writer, so testing on the last third tests on handwriting not seen in training.
    """
    data = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in wanted])})
    images = (data.images * (255 / 16)).astype(np.uint8)
    first_test = len(images) * 2 // 3

    def part(rows: range) -> Dataset:
        rows = [row for row in rows if data.target[row] in wanted]
        columns = {
            "image": [
                PILImage.fromarray(images[row]).resize((SIZE, SIZE), PILImage.Resampling.BICUBIC) for row in rows
            ],
            "label": [wanted.index(data.target[row]) for row in rows],
        }
        return Dataset.from_dict(columns, features=features)

    return Source(part(range(first_test)), part(range(first_test, len(images))), features["label"].names)


def tiny_vit(seed: int = 0) -> ViTForImageClassification:
    """A ViT of 8 x 8 patches, small enough to be trained from scratch in seconds."""
    set_seed(seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=768,
        initializer_range=192**-0.5,  # 0.02 is for wide models; this narrow one learns faster from scratch with more
    )
    model = ViTForImageClassification(config)
    model.config.initializer_range = 0.02  # for new heads: large weights in a head would hide the features at first
    return model


EMBEDDED = Embedded(
    label="pre-training on digits 0-4",
    model=tiny_vit,
    processor=ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    known=lambda: digits(range(5)),
    new=lambda: digits(range(5, 10)),
    epochs=4,
    learning_rate=1e-3,
)
