"""Labelled images from the hub, an image folder or Parquet files, brought to columns `image` and `label`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset

from .options import Options


@dataclass
class Source:
    """Images to train on and images to test on; `label` is a `ClassLabel` in both."""

    train: Dataset
    test: Dataset

    @property
    def names(self) -> list[str]:
        return self.train.features["label"].names


def load_source(options: Options) -> Source:
    """Load what the options name, with the small-data protocol applied."""
    if options.train_files:
        files = {"train": options.train_files} | ({"test": options.test_files} if options.test_files else {})
        splits = load_dataset("parquet", data_files=files)
    else:
        splits = load_dataset(options.dataset, options.dataset_config)
    train, test = _choose_splits(splits, options)

    image = options.image_column or _first_column(train, Image) or "image"
    label = options.label_column or _first_column(train, ClassLabel) or "label"
    train, test = (
        part.select_columns([image, label])
        .rename_columns({image: "image", label: "label"})
        .cast_column("image", Image())
        for part in (train, test)
    )
    if not isinstance(train.features["label"], ClassLabel):
        names = sorted({str(value) for value in train.unique("label")})
        train, test = (
            part.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))
            for part in (train, test)
        )
    return Source(train, test)


def shrink(source: Source, options: Options) -> Source:
    """The small-data protocol: so many training images of each class, the first so many test images."""
    train, test = source.train, source.test
    if options.train_images_per_class:
        order = np.random.default_rng(options.data_seed).permutation(len(train))
        labels = np.asarray(train["label"])[order]
        train = train.select(
            np.concatenate([order[labels == k][: options.train_images_per_class] for k in range(len(source.names))])
        )
    if options.test_images:
        test = test.select(range(min(options.test_images, len(test))))
    return Source(train, test)


def _choose_splits(splits: DatasetDict, options: Options) -> tuple[Dataset, Dataset]:
    train = splits[options.train_split]
    for name in [options.test_split] if options.test_split else ["test", "validation"]:
        if options.test_split or name in splits:
            return train, splits[name]
    parts = train.train_test_split(options.held_out, seed=options.data_seed)
    return parts["train"], parts["test"]


def _first_column(dataset: Dataset, kind: type) -> str | None:
    return next((name for name, feature in dataset.features.items() if isinstance(feature, kind)), None)
