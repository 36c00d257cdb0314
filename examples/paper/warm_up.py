"""Exact backpropagation in the first training passes of a model that is adapted by LBP-WHT."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from lbp_peft import exact_backward


def exact_at_first(model: nn.Module, passes: int) -> None:
    """Let the first forward passes in training mode prepare for exact backpropagation, and all later ones for LBP-WHT.

    Args:
        model: The adapted model. Two hooks are added to it and removed again after the last exact pass.
        passes: The number of exact passes. One is a training step, unless gradients are accumulated.
    """
    left, within = passes, ExitStack()

    def begin(module: nn.Module, inputs: Any) -> None:
        if module.training and left:
            within.enter_context(exact_backward(module))

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal left
        within.close()
        if module.training:
            left -= 1
        if left <= 0:
            for hook in hooks:
                hook.remove()

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
