"""Image classification: a label is the index of a class, scored by accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Image, Value
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification

from .augmentation import check_augmentation, mix, rand_augment
from .datasources import Source, columns_of, load_splits, with_columns
from .metrics import Accuracy, Confusion, confusion_matrix
from .options import Options, option
from .task import Embedded, Task
from .views import View


@dataclass
class ClassificationOptions(Options):
    output: str = option("runs/image_classification", "Folder for adapters, checkpoints, results and the plot.")
    label_column: str | None = option(None, "Column of labels (default: the first of classes, else `label`).")
    train_images_per_class: int | None = option(None, "Small-data protocol: train on so many images of each class.")
    rand_augment: int | None = option(
        None, "Augmentation: two random operations of this magnitude, 1 to 29, on each training image (RandAugment)."
    )
    mixup: float = option(0.0, "Augmentation: share of the training batches whose images are mixed in pairs (mixup).")
    cutmix: float = option(0.0, "Augmentation: share of those whose images get a part of another one (CutMix).")


class Classification(Task):
    options = ClassificationOptions
    defaults = Path(__file__).parent.parent / "digits.yaml"
    auto_model = AutoModelForImageClassification
    metric = Accuracy
    metric_name = "accuracy"
    pipeline = "image-classification"
    class_score = "recall"
    counted = "images"

    def embedded(self) -> Embedded:
        from .digits import EMBEDDED

        return EMBEDDED

    def load(self, options: ClassificationOptions) -> Source:
        train, test = load_splits(options)
        image = options.image_column or next(iter(columns_of(train, Image)), "image")
        label = options.label_column or next(iter(columns_of(train, ClassLabel)), "label")
        train, test = (with_columns(part, image, label) for part in (train, test))
        if not isinstance(train.features["label"], ClassLabel):
            names = sorted({str(value) for value in train.unique("label")})
            train, test = (
                part.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))
                for part in (train, test)
            )
        return Source(train, test, train.features["label"].names)

    def few(self, source: Source, options: ClassificationOptions) -> Dataset:
        """So many images of each class."""
        if not options.train_images_per_class:
            return source.train
        order = np.random.default_rng(options.data_seed).permutation(len(source.train))
        labels = np.asarray(source.train["label"])[order]
        chosen = [order[labels == k][: options.train_images_per_class] for k in range(len(source.names))]
        return source.train.select(np.concatenate(chosen))

    def label(self, value: int, view: View | None, size: tuple[int, int], options: Options) -> int:
        return value

    def collate(self, labels: list[int], train: bool) -> torch.Tensor:
        return torch.tensor(labels)

    def add_batch(
        self, metric: evaluate.Metric, accelerator: Accelerator, logits: torch.Tensor, labels: Any, options: Options
    ) -> torch.Tensor | None:
        predictions, references = accelerator.gather_for_metrics((logits.argmax(-1), labels))
        metric.add_batch(predictions=predictions, references=references)
        classes = logits.shape[1]
        return confusion_matrix(predictions, references, classes).cpu() if classes <= Confusion.MOST_CLASSES else None

    def augment(self, image: PILImage.Image, seed: tuple[int, ...], options: ClassificationOptions) -> PILImage.Image:
        return image if options.rand_augment is None else rand_augment(image, options.rand_augment, seed)

    def mix(self, batch: dict[str, Any], seed: tuple[int, ...], options: ClassificationOptions) -> dict[str, Any]:
        return mix(batch, options.mixup, options.cutmix, seed) if options.mixup or options.cutmix else batch

    def check(self, options: ClassificationOptions) -> None:
        check_augmentation(options.rand_augment, options.mixup, options.cutmix)

    def keep_examples(self, folder: Path, logits: torch.Tensor, labels: Any) -> None:
        """Nothing: a class is nothing to look at."""

    def picture(self, output: Path, source: Source, folders: dict[str, Path], options: Options) -> None:
        """Nothing, likewise."""
