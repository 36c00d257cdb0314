"""What a task has of its own: its labels, its models and its metric. All else in an experiment is the same for all."""

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
    """A task's embedded example: a small model learns some classes from scratch, and is to be adapted to others.

    Args:
        label: What the progress bar calls the pre-training.
        model: Builds the small model, untrained.
        processor: Its image processor.
        known: The data it is trained on first.
        new: What it is to be adapted to.
        epochs: Of pre-training.
        learning_rate: Of pre-training.
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
        folder: ForwardPatch `runs`, where the results go unless the options say so.
        auto_model: The Auto class of transformers that loads its models.
        metric: The metric that is built in.
        metric_name: What the report calls it.
        whole_image: Whether the model must see the whole of a test image, or may see the centre that the checkpoint's
            image processor crops.
        pipeline: What transformers' pipeline for it is called.
        class_score: Which of [`common.metrics.per_class_scores`] the model card lists.
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
        """The class of each image, by which images are drawn; None where an image has no single one."""
        return None

    def examine(self, column: str, images: dict[str, Image.Image], names: list[str], options: Options) -> None:
        """Look at an image that has been read, `images[column]`, beside those before it.

        Raises:
            ValueError: it does not suit the task.
        """
        return

    @abstractmethod
    def label(self, value: Any, view: View | None, size: tuple[int, int], options: Options) -> Any:
        """The label of an example from what the dataset has.

        Args:
            value: Of the column `label`.
            view: The part of the image that the model sees, None in testing.
            size: (height, width) of that part.
        """

    @abstractmethod
    def collate(self, labels: list[Any], train: bool) -> torch.Tensor | list[torch.Tensor]:
        """The labels of a batch; in training they go to the model."""

    @abstractmethod
    def add_batch(
        self, metric: evaluate.Metric, accelerator: Accelerator, logits: torch.Tensor, labels: Any, options: Options
    ) -> torch.Tensor | None:
        """Gather what the metric needs of a batch from all processes, and add it.

        Returns:
            How many images or pixels of each class (rows) were taken for each class (columns), int64 on the CPU; None
            where there are too many classes for that.
        """

    @abstractmethod
    def keep_examples(self, folder: Path, logits: torch.Tensor, labels: Any) -> None:
        """Write to the folder what the model answers to the first test batch, if there is something to look at."""

    @abstractmethod
    def picture(self, output: Path, source: Source, folders: dict[str, Path], options: Options) -> None:
        """Draw what [`keep_examples`] wrote into the output folder, from a folder for each method's label."""

    def model(self, path: str, names: list[str], seed: int, options: Options) -> PreTrainedModel:
        """The checkpoint with a head for these classes, new where it does not fit: the same head for equal seeds."""
        return load_model(self.auto_model, path, names, seed)

    def augment(self, image: Image.Image, seed: tuple[int, ...], options: Options) -> Image.Image:
        """What training sees of an RGB image that was cropped and resized; drawn from the seed."""
        return image

    def mix(self, batch: dict[str, Any], seed: tuple[int, ...], options: Options) -> dict[str, Any]:
        """What training sees of a batch; drawn from the seed."""
        return batch

    def check(self, options: Options) -> None:
        """Stop with one line where options of this task cannot be followed; called before anything is written."""
        return None
