"""Image classification: a label is the index of a class, scored by accuracy."""

from __future__ import annotations

import re
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
from .datasources import Source, columns_of, draw, hold_out, load_splits, with_columns
from .metrics import Accuracy, Confusion, confusion_matrix
from .options import DataOptions, Options, option
from .task import Embedded, Task
from .views import View


@dataclass
class ClassificationData(DataOptions):
    """What classification asks of its data."""

    label_column: str | None = option(None, "Column of labels. (default: the first of classes, else `label`)")
    train_images_per_class: int | None = option(
        None, "Small-data protocol: train on so many images of each class. (default: all)"
    )

    def check_together(self) -> None:
        super().check_together()
        if self.train_images and self.train_images_per_class:
            raise ValueError("give --train_images or --train_images_per_class, not both")


@dataclass
class ClassificationOptions(ClassificationData, Options):
    rand_augment: int | None = option(
        None,
        "Augmentation: two random operations of this magnitude, 1 to 29, on each training image (RandAugment). "
        "(default: none)",
    )
    mixup: float = option(0.0, "Augmentation: share of the training batches whose images are mixed in pairs (mixup).")
    cutmix: float = option(
        0.0, "Augmentation: share of the training batches whose images get a part of another one (CutMix)."
    )

    def check_together(self) -> None:
        super().check_together()
        if self.mixup + self.cutmix > 1:
            raise ValueError(
                f"--mixup and --cutmix are shares of the same batches, together at most 1, not {self.mixup} and "
                f"{self.cutmix}"
            )


class Classification(Task):
    options = ClassificationOptions
    defaults = Path(__file__).parent.parent / "digits.yaml"
    folder = "image_classification"
    auto_model = AutoModelForImageClassification
    metric = Accuracy
    metric_name = "accuracy"
    pipeline = "image-classification"
    class_score = "recall"
    counted = "images"

    def embedded(self) -> Embedded:
        from .digits import EMBEDDED

        return EMBEDDED

    def load(self, options: ClassificationData) -> Source:
        train, test, validation = load_splits(options)
        image = options.image_column or next(iter(columns_of(train, Image)), "image")
        if not options.image_column and image not in train.column_names:
            raise SystemExit(
                f"there are no images, only the columns {', '.join(train.column_names)}: see --image_column"
            )
        label = options.label_column or next(iter(columns_of(train, ClassLabel)), "label")
        if not options.label_column and label not in train.column_names:
            raise SystemExit(
                f"there are no labels, only the columns {', '.join(train.column_names)}: put the images of each of two "
                "or more classes into a folder of its own (DATA/train/CLASS/1.png), or name the column with "
                "--label_column"
            )
        names = classes_in(train, label)
        train, test, validation = (
            part and with_labels(with_columns(part, image, label), names) for part in (train, test, validation)
        )
        if test is None:
            train, test = hold_out(train, options, self.classes(train))
        present = sorted(set(self.classes(train)))
        if len(present) < 2:
            raise SystemExit(
                f"all {len(train)} images to train on are of the class {names[present[0]]!r}: training needs two or "
                "more (in folders, DATA/train/CLASS/1.png)"
            )
        return Source(train, test, names, validation)

    def few(self, source: Source, options: ClassificationData) -> Dataset:
        """So many images of each class, or so many of all classes in proportion."""
        labels = np.asarray(self.classes(source.train))
        if options.train_images:
            return source.train.select(draw(len(labels), options.train_images, options.data_seed, labels))
        if not options.train_images_per_class:
            return source.train
        order = np.random.default_rng(options.data_seed).permutation(len(source.train))
        labels = labels[order]
        chosen = [order[labels == k][: options.train_images_per_class] for k in range(len(source.names))]
        return source.train.select(np.concatenate(chosen))

    def classes(self, dataset: Dataset) -> list[int]:
        return list(dataset["label"])

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


def classes_in(dataset: Dataset, column: str) -> list[str]:
    """The classes in a column of labels, in the order of their numbers.

    Raises:
        SystemExit: there is no such column, or it holds no classes.
    """
    if column not in dataset.column_names:
        raise SystemExit(f"--label_column: there is no column {column!r}; there are: {', '.join(dataset.column_names)}")
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if not isinstance(feature, Value) or not re.match("u?int|bool|string|large_string", feature.dtype):
        raise SystemExit(
            f"the column {column!r} holds {getattr(feature, 'dtype', None) or feature}, not one class for each image "
            "(text or whole numbers): name another with --label_column"
        )
    values = dataset.unique(column)
    if len(values) > len(dataset) / 2 and len(values) > 1000:
        raise SystemExit(f"the column {column!r} has {len(values)} different values: name another with --label_column")
    return [str(value) for value in sorted(value for value in values if value is not None)]


def with_labels(dataset: Dataset, names: list[str]) -> Dataset:
    """The dataset with its column `label` as numbers of these classes.

    Raises:
        SystemExit: an image has no label, or one that is none of them.
    """
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and feature.names == names:
        found = set(dataset.unique("label"))
        unknown = [value for value in found if value is None or not 0 <= value < len(names)]
    else:
        texts = [
            value if value is None else feature.int2str(value) if isinstance(feature, ClassLabel) else str(value)
            for value in dataset.unique("label")
        ]
        unknown = sorted(set(texts) - set(names), key=str)
    if unknown and unknown[0] in (None, -1):
        raise SystemExit(
            "there are images without a label: in folders, each must lie in one that is named after its class; "
            "elsewhere, choose another split or --label_column"
        )
    if unknown:
        raise SystemExit(f"there are images of the class {unknown[0]!r}, which is not trained on: see --test_split")
    if isinstance(feature, ClassLabel) and feature.names == names:
        return dataset
    if isinstance(feature, ClassLabel):
        numbers = [names.index(feature.int2str(value)) for value in dataset["label"]]
    else:
        place = {name: number for number, name in enumerate(names)}
        numbers = [place[str(value)] for value in dataset["label"]]
    return dataset.remove_columns("label").add_column("label", numbers).cast_column("label", ClassLabel(names=names))
