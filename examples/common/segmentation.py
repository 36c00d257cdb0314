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

from .datasources import Source, columns_of, load_splits, with_columns
from .metrics import MeanIoU, confusion_matrix
from .models import class_names
from .options import Options, option
from .report import show_maps
from .task import Embedded, Task
from .views import View

EXAMPLES = 4


@dataclass
class SegmentationOptions(Options):
    output: str = option("runs/semantic_segmentation", "Folder for adapters, checkpoints, results and the plot.")
    mask_column: str | None = option(None, "Column of label maps, images too (default: the second column of images).")
    class_names: list[str] | None = option(
        None, "Names of the classes, in the order of their numbers in the maps (default: numbers, as many as occur)."
    )
    ignore_index: int = option(255, "What marks pixels of no class, not trained on and not tested on.")
    reduce_labels: bool = option(False, "Maps that count classes from 1, 0 being no class, as ADE20k's do.")
    train_images: int | None = option(None, "Small-data protocol: train on so many images.")
    head: Literal["upernet"] | None = option(
        None,
        "Put this head on --model, a backbone such as DINOv2 or BEiT (default: the checkpoint's own kind).",
    )


class Segmentation(Task):
    options = SegmentationOptions
    defaults = Path(__file__).parent.parent / "scenes.yaml"
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
        train, test = load_splits(options)
        images = columns_of(train, Image)
        image = options.image_column or next((name for name in images if name != options.mask_column), "image")
        mask = options.mask_column or next((name for name in images if name != image), None)
        if mask is None:
            raise SystemExit(f"cannot tell the label maps: name one of {train.column_names} with --mask_column")
        train, test = (with_columns(part, image, mask).cast_column("label", Image()) for part in (train, test))
        return Source(train, test, options.class_names or _numbers([train, test], options))

    def few(self, source: Source, options: SegmentationOptions) -> Dataset:
        """So many images, whatever is on them."""
        order = np.random.default_rng(options.data_seed).permutation(len(source.train))
        return source.train.select(order[: options.train_images]) if options.train_images else source.train

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
    config = AutoConfig.from_pretrained(path)
    if not hasattr(config, "stage_names"):
        raise SystemExit(f"transformers has no backbone of the kind of {path} ({config.model_type})")
    depths = len(config.stage_names) - 1  # without the stem
    config.out_indices = [round(depths * quarter / 4) for quarter in (1, 2, 3, 4)]
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **class_names(names)))
    # AutoBackbone would look for the checkpoint on the hub alone.
    model.backbone = type(model.backbone).from_pretrained(path, out_indices=config.out_indices, dtype=torch.float32)
    return model


def _numbers(parts: list[Dataset], options: SegmentationOptions) -> list[str]:
    """The classes that occur in the maps, named by their numbers."""
    highest = 0
    for part in parts:
        for mask in part["label"]:
            values = np.array(label_map(mask, options))
            highest = max(highest, int(values[values != options.ignore_index].max(initial=0)))
    return [str(number) for number in range(highest + 1)]
