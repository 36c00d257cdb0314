"""The pretrained model that every method starts from."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from .options import Options, as_size
from .places import local_folder
from .terminal import cause_of


def load_model(auto_model: Any, path: str, names: list[str], seed: int) -> PreTrainedModel:
    """Load the checkpoint with a head for these classes, new where it does not fit: the same head for equal seeds."""
    set_seed(seed)
    with readable(path):
        return auto_model.from_pretrained(path, ignore_mismatched_sizes=True, dtype=torch.float32, **class_names(names))


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Load a checkpoint; whatever fails about it ends in one line.

    Raises:
        SystemExit: it is not there, is broken, or is none of a model for the task.
    """
    folder = local_folder(path, "--model")
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        if kind := re.search(r"Unrecognized configuration class .*?\.(\w+)Config'", cause):
            raise SystemExit(
                f"--model {path}: transformers has no model for this task of the kind {kind[1]}; choose a checkpoint "
                "of a vision model"
            ) from None
        if folder is None:
            raise SystemExit(
                f"--model {path}: this is neither a local folder nor a model that could be loaded from the hub "
                f"({cause}). Check the name, or the connection (HF_HUB_OFFLINE)."
            ) from None
        raise SystemExit(f"--model {path}: this checkpoint cannot be loaded: {cause}") from None


def class_names(names: list[str]) -> dict[str, Any]:
    """Classes, as a configuration of transformers has them."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def head_modules(model: PreTrainedModel, options: Options) -> list[str]:
    """The names of the modules that hold the head: those outside the base model, or outside the backbone."""
    if options.head_modules:
        names = [name for name, _ in model.named_modules()]
        for head in options.head_modules:
            if not any(name == head or name.endswith(f".{head}") for name in names):
                near = difflib.get_close_matches(head, [name.rpartition(".")[2] for name in names] + names, n=1)
                outermost = ", ".join(name for name, _ in model.named_children())
                advice = f"Did you mean {near[0]}?" if near else f"Its outermost modules are {outermost}."
                raise SystemExit(f"--head_modules {head}: the model has no such module. {advice}")
        return options.head_modules
    heads = [
        name
        for name, child in model.named_children()
        if name not in (model.base_model_prefix, "backbone") and any(True for _ in child.parameters())
    ]
    if not heads:
        raise SystemExit(f"cannot tell the head of {type(model).__name__}: name its modules with --head_modules")
    return _without_nesting(model, heads)


def _without_nesting(model: nn.Module, heads: list[str]) -> list[str]:
    """The same modules, by the names of their parts where need be.

    PEFT takes a name in `modules_to_save` for all modules whose names end so. Of a match inside a match (`head.head` of
    DPT) it trains a copy that no forward pass reaches.
    """
    names = []
    for head in heads:
        module = model.get_submodule(head)
        inside = [f"{head}.{part}" for part, _ in module.named_modules() if part]
        if any(name.endswith(tuple(heads)) for name in inside):
            names += [f"{head}.{part}" for part, child in module.named_children() if list(child.parameters())]
        else:
            names.append(head)
    return names if names == heads else _without_nesting(model, names)


def forward_arguments(model: PreTrainedModel, size: tuple[int, int]) -> dict[str, Any]:
    """What the forward pass must be told to accept this image size (ViT interpolates positions only when asked)."""
    accepts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if accepts and as_size(getattr(model.config, "image_size", size)) != size:
        return {"interpolate_pos_encoding": True}
    return {}


def train_mode(model: nn.Module) -> None:
    """Training mode, but for batch norms that are frozen: no adapter saves the statistics that they would gather."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
