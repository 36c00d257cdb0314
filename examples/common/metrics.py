"""Metrics through `evaluate`. Accuracy and mean IoU are built in, so that nothing has to be downloaded."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import torch
import yaml
from sklearn.metrics import jaccard_score, precision_recall_fscore_support

from .options import Options


class Accuracy(evaluate.Metric):
    """The share of predictions that are right."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class MeanIoU(evaluate.Metric):
    """Intersection over union of the pixels of a class, over all images together; the mean over classes.

    A class that is neither in the labels nor predicted has no such ratio and does not count.
    """

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation="", features=datasets.Features({"confusion": counts})
        )

    def _compute(self, confusion: list[list[list[int]]]) -> dict[str, float]:
        total = np.sum(confusion, axis=0)
        intersection, union = np.diag(total), total.sum(0) + total.sum(1) - np.diag(total)
        return {"mean_iou": float(np.mean(intersection[union > 0] / union[union > 0]))}


class Confusion:
    """Counts how often each class (rows) was predicted as each class (columns), over many batches.

    Attributes:
        counts: Shape (classes, classes), int64; None if nothing was counted, as with more than `MOST_CLASSES`.
    """

    MOST_CLASSES = 1000  # for which the matrix takes 8 MB

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None

    def add(self, counts: torch.Tensor | None) -> None:
        if counts is not None:
            self.counts = counts if self.counts is None else self.counts + counts

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self.counts is None else {"counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts = state.get("counts")


def confusion_matrix(predictions: torch.Tensor, labels: torch.Tensor, classes: int, ignore: int = -100) -> torch.Tensor:
    """Count how many images or pixels of each class (rows) are predicted as each class (columns).

    Args:
        ignore: The label of images or pixels that are not counted.

    Returns:
        Shape (classes, classes), int64.

    Raises:
        ValueError: a label is neither a class nor the one to ignore.
    """
    counted = labels != ignore
    labels, predictions = labels[counted], predictions[counted]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}, but there are {classes} classes")
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)


def load_metric(built_in: type[evaluate.Metric], options: Options) -> evaluate.Metric:
    """The metric the options name. It lives in memory: in a distributed run every process holds all predictions."""
    if options.metric is None:
        return built_in(keep_in_memory=True)
    return evaluate.load(options.metric, keep_in_memory=True)


def score(metric: evaluate.Metric, options: Options) -> float:
    """The value of the metric over all that was added to it."""
    arguments = {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in options.metric_options)}
    return float(next(iter(metric.compute(**arguments).values())))


def per_class_scores(counts: torch.Tensor) -> dict[str, list[float]]:
    """Precision, recall, F1 and intersection over union of each class, and how many images or pixels it has.

    Args:
        counts: Shape (classes, classes), see [`confusion_matrix`].
    """
    labels, predictions = (index.flatten() for index in np.indices(counts.shape))
    weights = {"sample_weight": counts.flatten().numpy()}
    every = {"labels": np.arange(len(counts)), "average": None, "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predictions, **every, **weights)
    iou = jaccard_score(labels, predictions, **every, **weights)
    scores = {"precision": precision, "recall": recall, "f1": f1, "iou": iou}
    return {name: values.tolist() for name, values in scores.items()} | {"count": counts.sum(1).tolist()}
