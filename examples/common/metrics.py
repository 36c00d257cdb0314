"""Metrics through `evaluate`; accuracy is built in, so that nothing need be downloaded."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

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


def load_metric(options: Options) -> evaluate.Metric:
    """The metric the options name. It lives in memory: in a distributed run every process holds all predictions."""
    if options.metric is None:
        return Accuracy(keep_in_memory=True)
    return evaluate.load(options.metric, keep_in_memory=True)


def score(metric: evaluate.Metric, options: Options) -> float:
    """The value of the metric over all that was added to it."""
    arguments = dict(text.split("=", 1) for text in options.metric_options)
    return float(next(iter(metric.compute(**arguments).values())))
