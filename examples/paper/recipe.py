"""Recipes: a YAML file of options for each data set, which flags override."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.classification import Classification, ClassificationOptions
from common.segmentation import Segmentation, SegmentationOptions
from common.task import Task

from lbp_peft.loading.options import Parser, option
from lbp_peft.loading.terminal import in_one_line

RECIPES = Path(__file__).parent / "recipes"
TABLES: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation}


@dataclass
class PaperOptions:
    """The options that only these experiments have."""

    validation_images: int = option(1000, "Training images that are kept apart for the search.")


@dataclass
class ClassificationRecipe(ClassificationOptions, PaperOptions):
    """The options of a classification table."""

    classes: list[int] | None = option(
        None, "The first and the last class to keep, by number; images of others are left out. (default: all)"
    )

    def check_together(self) -> None:
        super().check_together()
        if self.classes is not None and (len(self.classes) != 2 or self.classes[0] >= self.classes[1]):
            raise ValueError(f"--classes takes the first and the last of several classes, such as 0 49: {self.classes}")


@dataclass
class SegmentationRecipe(SegmentationOptions, PaperOptions):
    """The options of a segmentation table."""


KINDS: dict[str, Any] = {"classification": ClassificationRecipe, "segmentation": SegmentationRecipe}
# Options of a data set on the hub, which do not apply to files of the user.
_OF_DATASET = ("dataset", "dataset_config", "train_split", "test_split", "image_column", "label_column", "mask_column")


def recipe(table: str, dataset: str, flags: list[str], data: str | None = None) -> Any:
    """The options of an experiment.

    Args:
        table: The kind of task, a key of `TABLES`.
        dataset: The name of a recipe, or the path of one.
        flags: Flags with the names of the YAML file, which override the recipe.
        data: A folder or a name on the hub, in place of the recipe's data set.

    Raises:
        SystemExit: there is no such recipe or option.
    """
    file = Path(dataset) if dataset.endswith((".yaml", ".yml")) else RECIPES / f"{dataset}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise SystemExit(f"--dataset {dataset}: choose from {known}, or give a YAML file")
    parser = Parser(KINDS[table])
    try:
        own = parser.flags_of(file)
        if data or any(flag.split("=")[0] == "--train_files" for flag in flags):
            own = [flag for flag in own if flag.split("=")[0].lstrip("-") not in _OF_DATASET]
        own += [f"--dataset={data}"] if data else []
        options = parser.options([*own, *flags])
        options.check_together()
    except (ValueError, argparse.ArgumentError) as error:
        raise SystemExit(in_one_line(error)) from None
    return options
