"""Image classification: a label is the index of a class, scored by accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification

from lbp_peft.loading.classification import ClassificationData, load_classification
from lbp_peft.loading.datasources import Source, draw
from lbp_peft.loading.options import option
from lbp_peft.loading.views import View

from .augmentation import check_augmentation, mix, rand_augment
from .metrics import Accuracy, Confusion, confusion_matrix
from .options import Options
from .task import Embedded, Task


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
        return load_classification(options)

    def few(self, source: Source, options: ClassificationData) -> Dataset:
        """A number of images of each class, or of all classes in proportion."""
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
        """Do nothing: there is no picture of a class."""

    def picture(self, output: Path, source: Source, folders: dict[str, Path], options: Options) -> None:
        """Do nothing: there is no picture of a class."""
