"""Loads checkpoints of transformers. Any failure ends in a one-line message."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from .options import as_size
from .places import local_folder
from .terminal import cause_of


def load_model(auto_model: Any, path: str, names: list[str], seed: int) -> PreTrainedModel:
    """Load the checkpoint with a head for these classes. A head that does not fit is made by the seed."""
    set_seed(seed)
    with explain_failures(path):
        return auto_model.from_pretrained(path, ignore_mismatched_sizes=True, dtype=torch.float32, **class_names(names))


@contextlib.contextmanager
def explain_failures(path: str) -> Iterator[None]:
    """A context for loading a checkpoint, in which any failure ends in a one-line message.

    Raises:
        SystemExit: the checkpoint does not exist, is damaged, or is not of a model for the task.
    """
    folder = local_folder(path, "--model")
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        if kind := re.search(r"Unrecognized configuration class .*?\.(\w+)Config'", cause):
            raise SystemExit(
                f"--model {path}: transformers has no {kind[1]} model for this task; choose a checkpoint of a vision "
                "model that was made for it"
            ) from None
        if folder is None:
            raise SystemExit(
                f"--model {path}: this is neither a local folder nor a model that could be loaded from the hub "
                f"({cause}). Check the name, or the connection (HF_HUB_OFFLINE)."
            ) from None
        raise SystemExit(f"--model {path}: this checkpoint cannot be loaded: {cause}") from None


def class_names(names: list[str]) -> dict[str, Any]:
    """The classes in the form of a configuration of transformers."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def forward_arguments(model: PreTrainedModel, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments with which the forward pass accepts this image size: ViT interpolates positions only on request."""
    accepts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if accepts and as_size(getattr(model.config, "image_size", size)) != size:
        return {"interpolate_pos_encoding": True}
    return {}
