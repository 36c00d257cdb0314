"""Semantic segmentation: a label is a map that gives each pixel a class, scored by mean IoU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
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
from .metrics import MeanIoU, confusion_matrix
from .models import class_names, readable
from .options import Options, option
from .places import local_folder
from .report import show_maps
from .storedimages import opened
from .task import Embedded, Task
from .views import View

EXAMPLES = 4


@dataclass
class SegmentationOptions(Options):
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


class Segmentation(Task):
    options = SegmentationOptions
    defaults = Path(__file__).parent.parent / "scenes.yaml"
    folder = "semantic_segmentation"
    auto_model = AutoModelForSemanticSegmentation
    metric = MeanIoU
    metric_name = "mean IoU"
    whole_image = True
    pipeline = "image-segmentation"
    class_score = "iou"
    counted = "pixels"

    def embedded(self) -> Embedded:
        from .scenes import EMBEDDED

        return EMBEDDED

    def load(self, options: SegmentationOptions) -> Source:
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
        if test is None:
            train, test = hold_out(train, options)
        names = options.class_names or _numbers([part for part in (train, test, validation) if part], options)
        if len(names) < 2:
            raise SystemExit(
                f"the label maps hold the class {names[0]} and nothing else: training needs two or more classes. "
                f"{options.ignore_index} marks pixels of no class (--ignore_index)"
            )
        return Source(train, test, names, validation)

    def few(self, source: Source, options: SegmentationOptions) -> Dataset:
        """So many images, whatever is on them."""
        if not options.train_images:
            return source.train
        order = np.random.default_rng(options.data_seed).permutation(len(source.train))
        return source.train.select(order[: options.train_images])

    def examine(
        self, column: str, images: dict[str, PILImage.Image], names: list[str], options: SegmentationOptions
    ) -> None:
        if column != "label":
            return
        size, own = images["image"].info["size"], images["label"].size
        if size != own:
            raise ValueError(f"the label map has {own[0]} x {own[1]} pixels, its image {size[0]} x {size[1]}")
        values = np.array(label_map(images["label"], options))
        values = values[values != options.ignore_index]
        if values.size and not 0 <= values.min() <= values.max() < len(names):
            raise ValueError(
                f"the label map has values from {values.min()} to {values.max()}, but there are {len(names)} classes"
            )

    def model(self, path: str, names: list[str], seed: int, options: SegmentationOptions) -> PreTrainedModel:
        if options.head == "upernet":
            model = upernet(path, names, seed)
        else:
            model = super().model(path, names, seed, options)
        for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
            if hasattr(model.config, name):
                setattr(model.config, name, options.ignore_index)
        return model

    def label(
        self, value: PILImage.Image, view: View | None, size: tuple[int, int], options: SegmentationOptions
    ) -> torch.Tensor:
        """(height, width) of the view, or in testing of the map as it was stored; int64."""
        classes = label_map(value, options)
        if view is not None:
            classes = view.of(classes, size, PILImage.Resampling.NEAREST)
        return torch.from_numpy(np.array(classes, dtype=np.int64))

    def collate(self, labels: list[torch.Tensor], train: bool) -> torch.Tensor | list[torch.Tensor]:
        return torch.stack(labels) if train else labels

    def keep_examples(self, folder: Path, logits: torch.Tensor, labels: list[torch.Tensor]) -> None:
        for index, found in enumerate(predicted_maps(logits.cpu()[:EXAMPLES], labels[:EXAMPLES])):
            (folder / "predictions").mkdir(exist_ok=True)
            PILImage.fromarray(found.numpy().astype(np.int32)).save(folder / "predictions" / f"{index}.tiff")

    def picture(self, output: Path, source: Source, folders: dict[str, Path], options: SegmentationOptions) -> None:
        shown = range(min(EXAMPLES, options.eval_batch_size, len(source.test)))
        rows = {"image": [source.test[index]["image"] for index in shown]}
        rows["label map"] = [label_map(source.test[index]["label"], options) for index in shown]
        for method, folder in folders.items():
            rows[method] = [PILImage.open(folder / "predictions" / f"{index}.tiff") for index in shown]
        show_maps(output / "predictions.png", rows, source.names)

    def add_batch(
        self,
        metric: evaluate.Metric,
        accelerator: Accelerator,
        logits: torch.Tensor,
        labels: list[torch.Tensor],
        options: SegmentationOptions,
    ) -> torch.Tensor | None:
        maps, classes = predicted_maps(logits, labels), logits.shape[1]
        counts = [confusion_matrix(*pair, classes, options.ignore_index) for pair in zip(maps, labels, strict=True)]
        total = accelerator.gather_for_metrics(torch.stack(counts)).sum(0).cpu()
        if isinstance(metric, MeanIoU):  # counts are much smaller than maps, which may differ in size besides
            metric.add(confusion=total.numpy())
            return total
        pairs = [(found.cpu().numpy(), label.cpu().numpy()) for found, label in zip(maps, labels, strict=True)]
        predictions, references = zip(*accelerator.gather_for_metrics(pairs, use_gather_object=True), strict=True)
        metric.add_batch(predictions=predictions, references=references)
        return total


def label_map(mask: PILImage.Image, options: SegmentationOptions) -> PILImage.Image:
    """Classes as an image of integers, pixels of no class marked by the ignore index."""
    values = np.array(mask)
    if values.ndim != 2:
        raise ValueError(f"a label map must have one channel, the numbers of the classes, but this is {mask.mode}")
    values = values.astype(np.int32)
    if options.reduce_labels:
        values = np.where((values == 0) | (values == options.ignore_index), options.ignore_index, values - 1)
    return PILImage.fromarray(values.astype(np.int32))


def predicted_maps(logits: torch.Tensor, labels: list[torch.Tensor]) -> list[torch.Tensor]:
    """The likeliest class of every pixel of each label map: logits are resized to its height and width.

    Args:
        logits: Shape (images, classes, height, width).
    """
    sizes = [label.shape for label in labels]
    resized = (
        F.interpolate(own[None].float(), size=size, mode="bilinear", align_corners=False)
        for own, size in zip(logits, sizes, strict=True)
    )
    return [own[0].argmax(0) for own in resized]


def upernet(path: str, names: list[str], seed: int) -> UperNetForSemanticSegmentation:
    """A backbone under a new UperNet head (arXiv 1807.10221), which sees it at four depths, evenly apart."""
    set_seed(seed)
    with readable(path):
        config = AutoConfig.from_pretrained(path)
    if not hasattr(config, "stage_names"):
        raise SystemExit(
            f"transformers has no backbone of the type {config.model_type}, which {path} is, to put an UperNet head "
            "on: take another --model, such as facebook/dinov2-small, or leave out --head"
        )
    depths = len(config.stage_names) - 1  # without the stem
    config.out_indices = [round(depths * quarter / 4) for quarter in (1, 2, 3, 4)]
    with readable(path):
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **class_names(names)))
        # AutoBackbone would look for the checkpoint on the hub alone.
        model.backbone = type(model.backbone).from_pretrained(path, out_indices=config.out_indices, dtype=torch.float32)
    return model


def _numbers(parts: list[Dataset], options: SegmentationOptions) -> list[str]:
    """The classes that occur in the maps, named by their numbers. Maps that cannot be read are left to the check."""
    highest = 0
    for part in parts:
        for row in part.select_columns(["label"]).cast_column("label", Image(decode=False)):
            try:
                values = np.array(label_map(opened(row["label"] or {}), options))
            except Exception:  # Pillow's decoders raise what they like
                continue
            highest = max(highest, int(values[values != options.ignore_index].max(initial=0)))
    return [str(number) for number in range(highest + 1)]
