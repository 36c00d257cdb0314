"""Loads images with classes from the sources that the options name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, Image, Value

from .datasources import Source, columns_of, hold_out, load_splits, with_columns
from .options import DataOptions, option


@dataclass
class ClassificationData(DataOptions):
    """The options of data for classification."""

    label_column: str | None = option(None, "Column of labels. (default: the first of classes, else `label`)")
    train_images_per_class: int | None = option(
        None, "Small-data protocol: train on this many images of each class. (default: all)"
    )

    def check_together(self) -> None:
        super().check_together()
        if self.train_images and self.train_images_per_class:
            raise ValueError("give --train_images or --train_images_per_class, not both")


def load_classification(options: ClassificationData) -> Source:
    """Load images and their classes.

    Raises:
        SystemExit: there is no such data, or it has no images or no classes.
    """
    train, test, validation = load_splits(options)
    image = options.image_column or next(iter(columns_of(train, Image)), "image")
    if not options.image_column and image not in train.column_names:
        raise SystemExit(f"there are no images, only the columns {', '.join(train.column_names)}: see --image_column")
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
    assert train is not None
    if test is None and options.needs_test:
        train, test = hold_out(train, options, list(train["label"]))
    present = sorted(set(train["label"]))
    if len(present) < 2:
        raise SystemExit(
            f"all {len(train)} images to train on are of the class {names[present[0]]!r}: training needs two or "
            "more (in folders, DATA/train/CLASS/1.png)"
        )
    return Source(train, test, names, validation)


def classes_in(dataset: Dataset, column: str) -> list[str]:
    """The classes in a column of labels, in the order of their numbers.

    Raises:
        SystemExit: there is no such column, or it has no classes.
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
        SystemExit: an image has no label, or one that is not among them.
    """
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and feature.names == names:
        values = set(dataset.unique("label"))
        unknown = [value for value in values if value is None or not 0 <= value < len(names)]
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
