"""Labelled images from the hub, a folder or Parquet files, brought to columns `image` and `label`."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset, DatasetDict, Image, load_dataset

from .options import Options


@dataclass
class Source:
    """Images to train on and images to test on, with columns `image` and `label`, and the names of the classes.

    Validation images are there only where an option needs them, see selection.py.
    """

    train: Dataset
    test: Dataset
    names: list[str]
    validation: Dataset | None = None


def load_splits(options: Options) -> tuple[Dataset, Dataset]:
    """What the options name to train on and to test on."""
    if options.train_files:
        files = {"train": options.train_files} | ({"test": options.test_files} if options.test_files else {})
        splits = load_dataset("parquet", data_files=files)
    else:
        splits = load_dataset(options.dataset, options.dataset_config)
    return _choose_splits(splits, options)


def with_columns(dataset: Dataset, image: str, label: str) -> Dataset:
    """These two columns, renamed to `image` and `label`."""
    chosen = dataset.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    return chosen.cast_column("image", Image())


def columns_of(dataset: Dataset, kind: type) -> list[str]:
    """The names of the columns of a kind of feature."""
    return [name for name, feature in dataset.features.items() if isinstance(feature, kind)]


def _choose_splits(splits: DatasetDict, options: Options) -> tuple[Dataset, Dataset]:
    train = splits[options.train_split]
    for name in [options.test_split] if options.test_split else ["test", "validation"]:
        if options.test_split or name in splits:
            return train, splits[name]
    parts = train.train_test_split(options.held_out, seed=options.data_seed)
    return parts["train"], parts["test"]
