"""Loads labelled images from the hub, a folder or Parquet files into columns `image` and `label`."""

from __future__ import annotations

import glob
import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Image, load_dataset

from .options import DataOptions
from .places import local_folder, similar
from .terminal import cause_of, say

# The names that `datasets` gives to splits that it finds in a folder.
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
VALIDATION = "validation"  # the split that is validated on, if the options name none
IMAGE_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass
class Source:
    """Images with columns `image` and `label`, and the names of the classes.

    There are test images unless nothing is tested, and validation images only if an option needs them.
    """

    train: Dataset
    test: Dataset | None
    names: list[str]
    validation: Dataset | None = None


def load_splits(options: DataOptions) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """The splits that the options name for training, testing and validation, see [`choose_splits`].

    Raises:
        SystemExit: there is no such data, or no such split.
    """
    if options.train_files:
        files = {"train": _check_files("--train_files", options.train_files)}
        if options.test_files:
            files["test"] = _check_files("--test_files", options.test_files)
        return choose_splits(
            _load(_join([name for part in files.values() for name in part]), "parquet", data_files=files), options
        )
    assert options.dataset is not None
    folder = local_folder(options.dataset, "--dataset")
    if folder is None:
        near = similar(Path(options.dataset)) if "/" not in options.dataset else ""
        say(f"There is no folder {options.dataset} here.{near} Looking for a data set of that name on the hub.")
        splits = _load(options.dataset, options.dataset, options.dataset_config)
        _check_origin(options.dataset, splits)
        return choose_splits(splits, options)
    if not any(path.is_file() for path in folder.rglob("*")):
        raise SystemExit(f"--dataset {folder}: the folder is empty")
    datasets.disable_progress_bars()  # which local data do not need
    return choose_splits(_load(options.dataset, str(folder), options.dataset_config), options)


def choose_splits(splits: DatasetDict, options: DataOptions) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """The splits for training, testing and validation.

    Returns:
        The three splits; None for testing and for validation if there is no such split left, or if it is not needed.

    Raises:
        SystemExit: a split is missing or empty, or the validation split is also used for training or testing.
    """
    train, test = options.train_split, options.test_split
    validation: str | None = getattr(options, "validation_split", None) if options.needs_validation else None
    for flag, name in (("--train_split", train), ("--test_split", test), ("--validation_split", validation)):
        if name and name not in splits:
            raise SystemExit(f"{flag} {name}: there is no such split; there are: {_join(splits)}")
    if options.needs_test:
        test = test or next((name for name in ("test", VALIDATION) if name in splits and name != train), None)
    else:
        test = None
    if validation and validation in (train, test):
        raise SystemExit(
            f"--validation_split {validation}: this split is {'trained' if validation == train else 'tested'} on. Name "
            "another one, or leave the option out to hold out a part of the training images."
        )
    if options.needs_validation and VALIDATION in splits and VALIDATION not in (train, test):
        validation = validation or VALIDATION
    for name in filter(None, (train, test, validation)):
        if len(splits[name]) == 0:
            raise SystemExit(f"the split {name} is empty")
    return splits[train], splits[test] if test else None, splits[validation] if validation else None


def hold_out(
    dataset: Dataset, options: DataOptions, labels: Sequence[int] | None = None, purpose: str = "test"
) -> tuple[Dataset, Dataset]:
    """Divide a dataset into a training part and a part that is held out for another purpose.

    Args:
        labels: The labels of the rows; each class is divided alike, and at least one of its rows is trained on.
        purpose: `test` or `validate`.

    Raises:
        SystemExit: there are too few rows.
    """
    total = len(dataset)
    order = np.random.default_rng((options.data_seed, total)).permutation(total)
    classes = np.zeros(total, dtype=int) if labels is None else np.asarray(labels)
    trained = order[np.unique(classes[order], return_index=True)[1]]  # one of each class, in any case
    rest = np.setdiff1d(np.arange(total), trained)
    if not len(rest):
        split = {"test": "test_split", "validate": "validation_split"}[purpose]
        raise SystemExit(
            f"of {total} training images none can be held out to {purpose} on, since one of each class is trained on: "
            f"take more, or name another split of --dataset with --{split}"
        )
    count = min(max(1, round(options.held_out * total)), len(rest))
    held_out = rest[draw(len(rest), count, options.data_seed, None if labels is None else classes[rest])]
    return dataset.select(np.setdiff1d(np.arange(total), held_out)), dataset.select(held_out)


def draw(total: int, count: int, seed: int, labels: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """A random choice of rows, in ascending order; equal arguments give the same rows.

    Args:
        total: The number of rows.
        count: The number of rows to choose. If there are fewer, all of them are chosen.
        labels: The labels of the rows. Each class is drawn in proportion to its size, but at least once if `count`
            allows it.
    """
    random = np.random.default_rng((seed, total, count))
    order = random.permutation(total)
    if count >= total:
        return np.arange(total)
    if labels is None:
        return np.sort(order[:count])
    classes = np.asarray(labels)[order]
    rows = {label: order[classes == label] for label in random.permutation(np.unique(classes))}
    num_taken = dict.fromkeys(rows, 0)
    # The Sainte-Lague method: after the first row of each class, largest classes first, each row goes to the class that
    # has the fewest rows relative to its size.
    queue = [(-np.inf, -len(rows_of_class), place, label) for place, (label, rows_of_class) in enumerate(rows.items())]
    heapq.heapify(queue)
    for _ in range(count):
        _, size, place, label = heapq.heappop(queue)
        num_taken[label] += 1
        if num_taken[label] < -size:
            heapq.heappush(queue, (size / (2 * num_taken[label] + 1), size, place, label))
    return np.sort(np.concatenate([rows_of_class[: num_taken[label]] for label, rows_of_class in rows.items()]))


def with_columns(dataset: Dataset, image: str, label: str) -> Dataset:
    """The dataset with these two columns only, renamed to `image` and `label`.

    Raises:
        SystemExit: there is no such column, or no images in the first.
    """
    for flag, name in (("--image_column", image), ("the column of labels or label maps", label)):
        if name not in dataset.column_names:
            raise SystemExit(f"{flag}: there is no column {name!r}; there are: {_join(dataset.column_names)}")
    if image == label:
        raise SystemExit(f"images and labels cannot both come from the column {image!r}")
    chosen = dataset.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    return as_images(chosen, "image", image)


def as_images(dataset: Dataset, column: str, known_as: str) -> Dataset:
    """The dataset with a column decoded as images, which may be stored as bytes or as paths.

    Raises:
        SystemExit: the column has other contents.
    """
    try:
        return dataset.cast_column(column, Image())
    except Exception as error:
        kind = dataset.features[column]
        raise SystemExit(f"the column {known_as!r} holds no images, but {kind}: {cause_of(error)}") from None


def columns_of(dataset: Dataset, kind: type) -> list[str]:
    """The names of the columns with a type of feature."""
    return [name for name, feature in dataset.features.items() if isinstance(feature, kind)]


def paired_folders(folder: Path, skip: bool) -> DatasetDict | None:
    """Images and label maps with the same names: FOLDER/[SPLIT/]images and FOLDER/[SPLIT/]masks.

    Splits may also be folders inside `images` and `masks`. Names are compared without their endings.

    Args:
        folder: The folder.
        skip: Whether to leave out files that have no partner, and print how many.

    Returns:
        Datasets with the columns `image` and `mask`; None if the folder has no such parts, or has a metadata file that
        pairs images and label maps.

    Raises:
        SystemExit: an image has no label map, or the reverse; or two files have the same name.
    """
    if any(folder.rglob("metadata.*")):
        return None
    named = {SPLITS[inner.name.lower()]: inner for inner in folder.iterdir() if inner.name.lower() in SPLITS}
    places = {name: (inner / "images", inner / "masks") for name, inner in named.items() if (inner / "images").is_dir()}
    if (folder / "images").is_dir():
        images, masks = folder / "images", folder / "masks"
        inside = [inner.name for inner in images.iterdir() if inner.is_dir() and inner.name.lower() in SPLITS]
        places |= {SPLITS[name.lower()]: (images / name, masks / name) for name in inside} or {"train": (images, masks)}
    if not places or not any(masks.is_dir() for _, masks in places.values()):
        return None
    return DatasetDict({name: _pair_files(*pair, skip) for name, pair in places.items()})


def _pair_files(images: Path, masks: Path, skip: bool) -> Dataset:
    if not masks.is_dir():
        raise SystemExit(f"{masks} is missing: label maps for the images in {images} belong there")
    left, right = _by_name(images), _by_name(masks)
    alone = [left[name] for name in left.keys() - right.keys()] + [right[name] for name in right.keys() - left.keys()]
    if alone and not skip:
        first = min(alone)
        other = masks if first.is_relative_to(images) else images
        more = f" ({len(alone)} files have no partner)" if len(alone) > 1 else ""
        raise SystemExit(
            f"{first} has no partner of the same name in {other}{more}: add it, or give --skip_broken to leave it out"
        )
    if alone:
        say(f"Left out {len(alone)} files of {images.parent} that have no partner.")
    both = sorted(left.keys() & right.keys())
    if not both:
        raise SystemExit(f"no image in {images} has a label map of the same name in {masks}")
    columns = {"image": [str(left[name]) for name in both], "mask": [str(right[name]) for name in both]}
    return Dataset.from_dict(columns, features=datasets.Features({"image": Image(), "mask": Image()}))


def _by_name(folder: Path) -> dict[str, Path]:
    """The images in a folder and its subfolders, by their relative paths without endings."""
    files: dict[str, Path] = {}
    for path in images_in(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise SystemExit(f"{files[name]} and {path} have the same name: keep one of them")
        files[name] = path
    return files


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, recognised by their endings and sorted by name."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")
    )


def _load(name: str, *arguments: str | None, **settings: dict[str, list[str]]) -> DatasetDict:
    """Load a dataset. Errors of any type end in a one-line message."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error has the same text as the log
    try:
        return load_dataset(*arguments, **settings)
    except Exception as error:
        cause = cause_of(error.__cause__ or error)
        if arguments[0] == name and not Path(name).expanduser().exists():
            raise SystemExit(
                f"--dataset {name}: this is neither a local folder nor a data set that could be loaded from the hub "
                f"({cause}). Check the name, or the connection (HF_HUB_OFFLINE)."
            ) from None
        raise SystemExit(f"cannot load {name}: {cause}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _check_origin(name: str, splits: DatasetDict) -> None:
    """Refuse data that `datasets` has loaded by a name, but not from the hub.

    If the hub has no data set of this name, or cannot be reached, `datasets` takes one from its cache, even one that
    was made from a local folder of this name elsewhere. Names of its own loaders, such as "imagefolder", search the
    working directory. In the cache, the folder of a data set of the hub is named after its commit, which distinguishes
    these.

    Raises:
        SystemExit: the data set is not from the hub.
    """
    files = [file["filename"] for split in splits.values() for file in split.cache_files]
    if not all(re.fullmatch("[0-9a-f]{40}", Path(file).parent.name) for file in files):
        raise SystemExit(
            f"--dataset {name}: no data set of this name was found on the hub. For a local folder, give its whole path."
        )


def _check_files(flag: str, names: list[str]) -> list[str]:
    """The files, after checking that each one exists or is on the web."""
    for name in names:
        if "://" in name:
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            raise SystemExit(f"{flag} {name}: this is a folder, give it to --dataset or name the Parquet files in it")
        if not (path.is_file() or glob.glob(str(path))):
            raise SystemExit(f"{flag} {name}: there is no such file.{similar(path)}")
    return [name if "://" in name else str(Path(name).expanduser()) for name in names]


def _join(names: Sequence[str]) -> str:
    return ", ".join(map(str, names))
