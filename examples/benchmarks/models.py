"""The models whose training step is measured, with random weights and random batches.

To add one, write a function from (height, width) in pixels to the model, and name it in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Dinov2Config,
    PreTrainedConfig,
    SegformerConfig,
    Swinv2Config,
    ViTConfig,
)

CLASSES = 100
SEGMENT_CLASSES = 19  # as many as Cityscapes has

Size = tuple[int, int]
Batch = dict[str, Tensor]


def classification_batch(batch_size: int, size: Size) -> Batch:
    return {"pixel_values": torch.randn(batch_size, 3, *size), "labels": torch.randint(CLASSES, (batch_size,))}


def segmentation_batch(batch_size: int, size: Size) -> Batch:
    labels = torch.randint(SEGMENT_CLASSES, (batch_size, *size))
    return {"pixel_values": torch.randn(batch_size, 3, *size), "labels": labels}


def loss_of_transformers(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def loss_of_timm(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["pixel_values"])
    heads = logits if isinstance(logits, tuple) else (logits,)  # the second head imitates a teacher
    return sum((F.cross_entropy(each, batch["labels"]) for each in heads), torch.zeros((), device=heads[0].device))


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        build: A function from (height, width) in pixels to the model.
        size: The default (height, width).
        heads: The names of the modules that every method trains in full.
        batch: A function from the batch size and (height, width) to a batch.
        loss: A function from the model and a batch to the loss.
    """

    build: Callable[[Size], nn.Module]
    size: Size = (224, 224)
    heads: tuple[str, ...] = ("classifier",)
    batch: Callable[[int, Size], Batch] = classification_batch
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of_transformers


SMALL: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def vit(shape: dict[str, Any], size: Size) -> nn.Module:
    width = shape["hidden_size"]
    return _classifier(ViTConfig(**shape, intermediate_size=4 * width, image_size=size, patch_size=16))


def dinov2(shape: dict[str, Any], size: Size) -> nn.Module:
    return _classifier(Dinov2Config(**shape, image_size=size, patch_size=14))


def swinv2_small(size: Size) -> nn.Module:
    shape = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    return _classifier(Swinv2Config(**shape, window_size=8, image_size=size))


def segformer_b0(size: Size) -> nn.Module:  # takes images of any size
    config = SegformerConfig(num_labels=SEGMENT_CLASSES)  # the default is b0
    return AutoModelForSemanticSegmentation.from_config(config)


def efficientformer_l1(size: Size, classes: int = CLASSES) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise SystemExit('efficientformer-l1 needs timm: pip install ".[timm]"') from None
    if size != (224, 224):
        raise SystemExit("timm's EfficientFormer takes images of 224 x 224 pixels only.")
    return timm.create_model("efficientformer_l1", pretrained=False, num_classes=classes)


def _classifier(config: PreTrainedConfig) -> nn.Module:
    config.num_labels = CLASSES
    return AutoModelForImageClassification.from_config(config)


MODELS = {
    "vit-s": Model(lambda size: vit(SMALL, size)),
    "vit-b": Model(lambda size: vit(BASE, size)),
    "vit-l": Model(lambda size: vit(LARGE, size)),
    "dinov2-b": Model(lambda size: dinov2(BASE, size)),
    "dinov2-l": Model(lambda size: dinov2(LARGE, size)),
    "swinv2-s": Model(swinv2_small, size=(256, 256)),
    "segformer-b0": Model(segformer_b0, size=(512, 1024), heads=("decode_head",), batch=segmentation_batch),
    "efficientformer-l1": Model(efficientformer_l1, heads=("head", "head_dist"), loss=loss_of_timm),
}
