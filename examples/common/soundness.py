"""Reads all images and label maps once before training, so that a damaged file does not stop it later."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from datasets import Image as ImageFeature
from tqdm.auto import tqdm

from lbp_peft.loading.datasources import Source
from lbp_peft.loading.storedimages import open_image, why_unreadable

from .options import Options
from .processes import on_main
from .task import Task

ROWS = 256  # in memory at a time
NAMED = 3  # how many broken images a message names


@dataclass
class Fault:
    """A row of a dataset that cannot be used, and the reason."""

    row: int
    file: str
    reason: str


def sound(accelerator: Accelerator, task: Task, source: Source, options: Options) -> Source:
    """The data without the rows that cannot be used.

    Raises:
        SystemExit: some rows cannot be used and are not to be skipped (the message names the first), or none is left.
    """
    parts = {"train": source.train, "test": source.test}
    if source.validation is not None:
        parts["validate"] = source.validation
    faults = on_main(accelerator, lambda: [find_faults(part, task, source, options) for part in parts.values()])
    found = [fault for part in faults for fault in part]
    if not found:
        return source
    total = sum(map(len, parts.values()))
    count = f"{len(found)} of {total} images" if len(found) > 1 else f"1 of {total} images"
    named = "; ".join(f"{fault.file} ({fault.reason})" for fault in found[:NAMED])
    named += f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    if not options.skip_broken:
        raise SystemExit(
            f"{count} cannot be used: {named}. Repair or remove them, or give --skip_broken to leave them out."
        )
    accelerator.print(f"Left out {count} that cannot be used: {named}.")
    left = {use: _without(part, own) for (use, part), own in zip(parts.items(), faults, strict=True)}
    for use, part in left.items():
        if not len(part):
            raise SystemExit(f"no image to {use} on is left: add images that can be read")
    return Source(left["train"], left["test"], source.names, left.get("validate"))


def find_faults(dataset: Dataset, task: Task, source: Source, options: Options) -> list[Fault]:
    """The rows whose images cannot be read, or do not suit the task."""
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    for column in columns:
        dataset = dataset.cast_column(column, ImageFeature(decode=False))

    def examine(numbered: tuple[int, dict[str, Any]]) -> Fault | None:
        index, row = numbered
        images = {}
        for column in columns:
            stored = row[column] or {}
            name = stored.get("path") or f"{column} of row {index}"
            try:
                images[column] = open_image(stored, whole=column != "image")
                task.examine(column, images, source.names, options)
            except Exception as error:  # Pillow's decoders raise exceptions of many types
                return Fault(index, name, why_unreadable(error))
        return None

    with ThreadPoolExecutor() as pool, tqdm(total=len(dataset), desc="reading images", delay=3, leave=False) as bar:
        faults = []
        for rows in _by_parts(dataset):
            faults += [fault for fault in pool.map(examine, rows) if fault]
            bar.update(len(rows))
    return faults


def _by_parts(dataset: Dataset) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    for start in range(0, len(dataset), ROWS):
        part = dataset[start : start + ROWS]
        names = list(part)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*part.values(), strict=True)]
        yield list(enumerate(rows, start))


def _without(dataset: Dataset, faults: list[Fault]) -> Dataset:
    broken = {fault.row for fault in faults}
    return dataset.select([row for row in range(len(dataset)) if row not in broken]) if broken else dataset
