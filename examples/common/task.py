"""The interface of tasks. A task defines labels, models and a metric; the rest of an experiment is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from lbp_peft.loading.datasources import Source
from lbp_peft.loading.models import load_model
from lbp_peft.loading.views import View

from .options import Options


@dataclass(frozen=True)
class Embedded:
    """A task's embedded example: a small model learns some classes from scratch, and is then adapted to others.

    Args:
        label: The name of the pre-training in the progress bar.
        model: A function that builds the small model, untrained.
        processor: A function that builds its image processor.
        known: A function that returns the data for pre-training.
        new: A function that returns the data to adapt to.
        epochs: The number of epochs of pre-training.
        learning_rate: The learning rate of pre-training.
    """

    label: str
    model: Callable[[], PreTrainedModel]
    processor: ImageProcessingMixin
    known: Callable[[], Source]
    new: Callable[[], Source]
    epochs: int
    learning_rate: float

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the model without its head, and its image processor, as a checkpoint that others can start from."""
        model.base_model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class Task(ABC):
    """A kind of labels for images.

    Attributes:
        options: The dataclass of the program's options.
        defaults: YAML file of the options of the embedded example.
        folder: The folder for results inside `runs`, unless the options name one.
        auto_model: The Auto class of transformers that loads its models.
        metric: The built-in metric.
        metric_name: The metric's name in the report.
        whole_image: Whether the model must see the whole of a test image, or may see the centre that the checkpoint's
            image processor crops.
        pipeline: The name of transformers' pipeline for the task.
        class_score: The one of [`common.metrics.per_class_scores`] that the model card lists.
        counted: What a confusion matrix counts, images or pixels.
    """

    options: ClassVar[type[Options]]
    defaults: ClassVar[Path]
    folder: ClassVar[str]
    auto_model: ClassVar[Any]
    metric: ClassVar[type[evaluate.Metric]]
    metric_name: ClassVar[str]
    whole_image: ClassVar[bool] = False
    pipeline: ClassVar[str]
    class_score: ClassVar[str]
    counted: ClassVar[str]

    @abstractmethod
    def embedded(self) -> Embedded: ...

    @abstractmethod
    def load(self, options: Options) -> Source:
        """The data that the options name."""

    @abstractmethod
    def few(self, source: Source, options: Options) -> Dataset:
        """The training images that the small-data protocol keeps."""

    def classes(self, dataset: Dataset) -> list[int] | None:
        """The class of each image, for stratified sampling; None if images have more than one class."""
        return None

    def examine(self, column: str, images: dict[str, Image.Image], names: list[str], options: Options) -> None:
        """Check an image that has been read, `images[column]`, together with the columns before it.

        Raises:
            ValueError: it does not suit the task.
        """
        return

    @abstractmethod
    def label(self, value: Any, view: View | None, size: tuple[int, int], options: Options) -> Any:
        """The label of an example, from the value in the dataset.

        Args:
            value: The value of the column `label`.
            view: The part of the image that the model sees; None in testing.
            size: (height, width) of that part.
            options: The options of the program.
        """

    @abstractmethod
    def collate(self, labels: list[Any], train: bool) -> torch.Tensor | list[torch.Tensor]:
        """The labels of a batch, which the model gets in training."""

    @abstractmethod
    def add_batch(
        self, metric: evaluate.Metric, accelerator: Accelerator, logits: torch.Tensor, labels: Any, options: Options
    ) -> torch.Tensor | None:
        """Gather the predictions and labels of a batch from all processes, and add them to the metric.

        Returns:
            The confusion matrix of the batch, int64 on the CPU; None if there are too many classes for one.
        """

    @abstractmethod
    def keep_examples(self, folder: Path, logits: torch.Tensor, labels: Any) -> None:
        """Write the predictions for the first test batch to the folder, if there is a picture of them."""

    @abstractmethod
    def picture(self, output: Path, source: Source, folders: dict[str, Path], options: Options) -> None:
        """Draw the predictions of [`keep_examples`] into the output folder, from a folder for each method's label."""

    def model(self, path: str, names: list[str], seed: int, options: Options) -> PreTrainedModel:
        """The checkpoint with a head for these classes. A new head depends only on the seed."""
        return load_model(self.auto_model, path, names, seed)

    def augment(self, image: Image.Image, seed: tuple[int, ...], options: Options) -> Image.Image:
        """Augment an RGB image that was cropped and resized, depending on the seed."""
        return image

    def mix(self, batch: dict[str, Any], seed: tuple[int, ...], options: Options) -> dict[str, Any]:
        """Augment a training batch, depending on the seed."""
        return batch

    def check(self, options: Options) -> None:
        """Stop with one line if options of this task are not possible. It is called before anything is written."""
        return None
