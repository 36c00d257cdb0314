"""Loads images with label maps, and models that predict such maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

from .datasources import (
    Source,
    as_images,
    choose_splits,
    columns_of,
    hold_out,
    load_splits,
    paired_folders,
    with_columns,
)
from .models import class_names, explain_failures, load_model
from .options import DataOptions, option
from .places import local_folder
from .storedimages import open_image


@dataclass
class SegmentationData(DataOptions):
    mask_column: str | None = option(None, "Column of label maps, images too. (default: the second column of images)")
    class_names: list[str] | None = option(
        None, "Names of the classes, in the order of their numbers in the maps. (default: numbers, as many as occur)"
    )
    ignore_index: int = option(255, "What marks pixels of no class, not trained on and not tested on.")
    reduce_labels: bool = option(False, "Maps that count classes from 1, 0 being no class, as ADE20k's do.")
    head: Literal["upernet"] | None = option(
        None,
        "Put this head on --model, a backbone such as DINOv2 or BEiT. (default: the checkpoint's own kind)",
    )
    head_channels: int | None = option(
        None, "Channels of that head; with fewer, a step takes less time. (default: 512)"
    )

    def check_together(self) -> None:
        super().check_together()
        if self.head_channels is not None and self.head is None:
            raise ValueError("--head_channels is the width of a new head, so it needs --head")
        if self.head_channels is not None and self.head_channels < 2:
            raise ValueError(f"--head_channels must be at least 2, not {self.head_channels}")


def load_segmentation(options: SegmentationData) -> Source:
    """Load images and their label maps.

    Raises:
        SystemExit: there is no such data, or it has no images or no label maps.
    """
    folder = local_folder(options.dataset, "--dataset") if options.dataset else None
    pairs = paired_folders(folder, options.skip_broken) if folder else None
    train, test, validation = load_splits(options) if pairs is None else choose_splits(pairs, options)
    images = columns_of(train, Image)
    image = options.image_column or next((name for name in images if name != options.mask_column), "image")
    mask = options.mask_column or next((name for name in images if name != image), None)
    if mask is None:
        raise SystemExit(
            f"cannot tell the label maps among the columns {', '.join(train.column_names)}: name their column with "
            "--mask_column, or put images and label maps of the same names into the folders DATA/train/images and "
            "DATA/train/masks"
        )
    train, test, validation = (
        part and as_images(with_columns(part, image, mask), "label", mask) for part in (train, test, validation)
    )
    if test is None and options.needs_test:
        train, test = hold_out(train, options)
    names = options.class_names or _numbers([part for part in (train, test, validation) if part], options)
    if len(names) < 2:
        raise SystemExit(
            f"the label maps hold the class {names[0]} and nothing else: training needs two or more classes. "
            f"{options.ignore_index} marks pixels of no class (--ignore_index)"
        )
    return Source(train, test, names, validation)


def load_segmentation_model(
    auto_model: Any, path: str, names: list[str], seed: int, options: SegmentationData
) -> PreTrainedModel:
    """The checkpoint with a head for these classes, or a new head on a backbone."""
    if options.head == "upernet":
        model: PreTrainedModel = upernet(path, names, seed, options.head_channels or 512)
    else:
        model = load_model(auto_model, path, names, seed)
    leave_out_of_loss(options.ignore_index, model.config)
    return model


def leave_out_of_loss(ignore_index: int, config: PretrainedConfig) -> None:
    """Make the loss of a model with this configuration ignore the pixels that the index marks."""
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        if hasattr(config, name):
            setattr(config, name, ignore_index)


def label_map(mask: PILImage.Image, options: SegmentationData) -> PILImage.Image:
    """A label map as an image of integers, in which the ignore index marks pixels of no class."""
    values = np.array(mask)
    if values.ndim != 2:
        raise ValueError(f"a label map must have one channel, the numbers of the classes, but this is {mask.mode}")
    values = values.astype(np.int32)
    if options.reduce_labels:
        values = np.where((values == 0) | (values == options.ignore_index), options.ignore_index, values - 1)
    return PILImage.fromarray(values.astype(np.int32))


def upernet(path: str, names: list[str], seed: int, channels: int = 512) -> UperNetForSemanticSegmentation:
    """A backbone with a new UperNet head (arXiv 1807.10221) on features of four evenly spaced depths.

    Args:
        path: The folder of the backbone's checkpoint, or its name on the hub.
        names: The names of the classes.
        seed: The seed of the head's weights.
        channels: The channels of the head. The auxiliary head, which only serves training, has half as many.

    Raises:
        SystemExit: there is no such checkpoint, or it is no backbone.
    """
    set_seed(seed)
    with explain_failures(path):
        config = AutoConfig.from_pretrained(path)
    if not hasattr(config, "stage_names"):
        raise SystemExit(
            f"transformers has no backbone of the type {config.model_type}, which {path} is, to put an UperNet head "
            "on: take another --model, such as facebook/dinov2-small, or leave out --head"
        )
    depths = len(config.stage_names) - 1  # without the stem
    config.out_indices = [round(depths * quarter / 4) for quarter in (1, 2, 3, 4)]
    with explain_failures(path):
        whole = UperNetConfig(
            backbone_config=config, hidden_size=channels, auxiliary_channels=channels // 2, **class_names(names)
        )
        model = UperNetForSemanticSegmentation(whole)
        # AutoBackbone would search for the checkpoint on the hub only.
        model.backbone = type(model.backbone).from_pretrained(path, out_indices=config.out_indices, dtype=torch.float32)
    return model


def _numbers(parts: list[Dataset], options: SegmentationData) -> list[str]:
    """The classes that occur in the maps, named by their numbers. Maps that cannot be read are left to the check."""
    highest = 0
    for part in parts:
        for row in part.select_columns(["label"]).cast_column("label", Image(decode=False)):
            try:
                values = np.array(label_map(open_image(row["label"] or {}), options))
            except Exception:  # Pillow's decoders raise exceptions of many types
                continue
            highest = max(highest, int(values[values != options.ignore_index].max(initial=0)))
    return [str(number) for number in range(highest + 1)]
