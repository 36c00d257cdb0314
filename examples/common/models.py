"""The pretrained model that every method starts from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed

from .options import Options


def base_model(path: str, names: list[str], seed: int) -> PreTrainedModel:
    """Load the checkpoint with a head for these classes, new where it does not fit: the same head for equal seeds."""
    set_seed(seed)
    return AutoModelForImageClassification.from_pretrained(
        path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def head_modules(model: PreTrainedModel, options: Options) -> list[str]:
    """The names of the modules that hold the head: those outside the base model."""
    if options.head_modules:
        return options.head_modules
    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    if not heads:
        raise ValueError(f"cannot tell the head of {type(model).__name__}: name its modules with --head-modules")
    return heads


def forward_arguments(model: PreTrainedModel, image_size: int) -> dict[str, Any]:
    """What the forward pass must be told to accept this image size (ViT interpolates positions only when asked)."""
    accepts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if accepts and getattr(model.config, "image_size", image_size) not in (image_size, [image_size, image_size]):
        return {"interpolate_pos_encoding": True}
    return {}


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
