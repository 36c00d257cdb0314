"""The images of an experiment: those for training, for the search (from the training split) and for the test."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from common.images import Images, loader
from common.task import Task
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ViTImageProcessor

from lbp_peft.loading.classification import with_labels
from lbp_peft.loading.datasources import Source, draw
from lbp_peft.loading.models import forward_arguments
from lbp_peft.loading.options import as_size
from lbp_peft.loading.preprocessing import Preprocessor


class TimmPreprocessor(Preprocessor):
    """The image processor of a model of timm.

    Args:
        settings: The model's `pretrained_cfg`.
        size: (height, width) in pixels; None: the model's own.
    """

    def __init__(self, settings: dict[str, Any], size: tuple[int, int] | None):
        self.size = size or tuple(settings["input_size"][1:])
        self.overrides, self.notice, self.whole_image = {}, None, False
        self.processor = ViTImageProcessor(
            size={"height": self.size[0], "width": self.size[1]},
            image_mean=list(settings["mean"]),
            image_std=list(settings["std"]),
            resample=3,  # bicubic
        )


def preprocessor(model: PreTrainedModel, task: Task, options: Any) -> Preprocessor:
    inner = getattr(model, "timm_model", None)
    if inner is not None:
        return TimmPreprocessor(inner.pretrained_cfg, as_size(options.image_size))
    return Preprocessor(options, model.config, task.whole_image)


def load_source(task: Task, options: Any) -> Source:
    """The images. Those of `validation` come from the training split and are not in `train`."""
    source = task.load(options)
    if getattr(options, "classes", None):
        source = keep_classes(source, *options.classes)
    labels = task.classes(source.train)
    apart = draw(len(source.train), options.validation_images, options.data_seed, labels)
    rest = source.train.select(np.setdiff1d(np.arange(len(source.train)), apart))
    if not len(rest):
        raise SystemExit(f"--validation_images {options.validation_images} leaves no image to train on")
    validation = source.train.select(apart)
    train = task.few(dataclasses.replace(source, train=rest), options)
    test = source.test
    if options.test_images:
        test = test.select(draw(len(test), options.test_images, options.data_seed, task.classes(test)))
    return Source(train, test, source.names, validation)


def keep_classes(source: Source, first: int, last: int) -> Source:
    """The images of the classes `first` to `last`, which are then numbered from 0.

    Raises:
        SystemExit: the data has fewer classes, or no image of these.
    """
    if not 0 <= first < last < len(source.names):
        raise SystemExit(
            f"--classes {first} {last}: there are {len(source.names)} classes, 0 to {len(source.names) - 1}"
        )
    names = source.names[first : last + 1]

    def kept(dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        labels = np.asarray(dataset["label"])
        chosen = np.flatnonzero((labels >= first) & (labels <= last))
        if not len(chosen):
            raise SystemExit(f"--classes {first} {last}: there is no image of these")
        return with_labels(dataset.select(chosen), names)

    return Source(kept(source.train), kept(source.test), names, kept(source.validation))


class ImageData:
    """Batches of images, which are preprocessed and augmented again in every epoch.

    Args:
        model: The model, which determines the image processor.
        task: The task.
        source: The images.
        options: The options of the recipe.
    """

    def __init__(self, model: PreTrainedModel, task: Task, source: Source, options: Any):
        self.task, self.source, self.options = task, source, options
        self.preprocessor = preprocessor(model, task, options)
        timm = hasattr(model, "timm_model")
        self.extra = {} if timm else forward_arguments(model, self.preprocessor.size)

    def loaders(self, seed: int, scored: str) -> list[DataLoader]:
        """The loaders of the training images and of those that are scored, `validation` or `test`."""
        how = self.task, self.preprocessor, self.options
        images = [
            Images(self.source.train, *how, train=True, seed=seed),
            Images(getattr(self.source, scored), *how, train=False),
        ]
        return [loader(one, self.options, self.extra) for one in images]
