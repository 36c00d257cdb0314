"""The pretrained model that every method starts from: its head, and its training mode."""

from __future__ import annotations

import difflib

from torch import nn
from transformers import PreTrainedModel

import lbp_peft.head

from .options import Options


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
    heads = lbp_peft.head.head_modules(model)
    if not heads:
        raise SystemExit(f"cannot tell the head of {type(model).__name__}: name its modules with --head_modules")
    return heads


def train_mode(model: nn.Module) -> None:
    """Set training mode except for frozen batch norms, whose statistics no adapter would save."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
