"""Semantic segmentation: a label is a map that gives each pixel a class, scored by mean IoU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from lbp_peft.loading.datasources import Source
from lbp_peft.loading.segmentation import SegmentationData, label_map, load_segmentation, load_segmentation_model
from lbp_peft.loading.views import View

from .metrics import MeanIoU, confusion_matrix
from .options import Options
from .report import show_maps
from .task import Embedded, Task

EXAMPLES = 4


@dataclass
class SegmentationOptions(SegmentationData, Options):
    pass


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
        return load_segmentation(options)

    def few(self, source: Source, options: SegmentationOptions) -> Dataset:
        """A number of images, regardless of their classes."""
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
        return load_segmentation_model(self.auto_model, path, names, seed, options)

    def label(
        self, value: PILImage.Image, view: View | None, size: tuple[int, int], options: SegmentationOptions
    ) -> torch.Tensor:
        """The label map, int64, of the size of the view, or in testing of the stored map."""
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
        if isinstance(metric, MeanIoU):  # counts are much smaller than maps, whose sizes may also differ
            metric.add(confusion=total.numpy())
            return total
        pairs = [(found.cpu().numpy(), label.cpu().numpy()) for found, label in zip(maps, labels, strict=True)]
        predictions, references = zip(*accelerator.gather_for_metrics(pairs, use_gather_object=True), strict=True)
        metric.add_batch(predictions=predictions, references=references)
        return total


def predicted_maps(logits: torch.Tensor, labels: list[torch.Tensor]) -> list[torch.Tensor]:
    """The most likely class of each pixel, for logits resized to the height and width of each label map.

    Args:
        logits: Shape (images, classes, height, width).
    """
    sizes = [label.shape for label in labels]
    resized = (
        F.interpolate(own[None].float(), size=size, mode="bilinear", align_corners=False)
        for own, size in zip(logits, sizes, strict=True)
    )
    return [own[0].argmax(0) for own in resized]
