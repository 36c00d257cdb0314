"""Runs a model for a measurement without an effect on its later training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]


def loss_of_output(model: nn.Module, batch: object) -> Tensor:
    """The loss that a model of transformers returns when its batch has labels.

    Raises:
        ValueError: the batch is not a dict of arguments, or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch has to be a dict of the model's arguments, with labels, but it is a {type(batch).__name__}. "
            "For other batches give loss_fn(model, batch)."
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for the arguments {', '.join(batch)}. Add the labels to the "
            "batch, or give loss_fn(model, batch)."
        )
    return loss


def to_device(batch: object, device: torch.device) -> Any:
    """The batch with its tensors on the device; dicts, lists and tuples are searched."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def tensors_in(batch: object) -> Iterator[Tensor]:
    """The tensors of a batch, searched as by [`to_device`]."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore, at the end of the block, everything but the weights that forward and backward passes change.

    These are gradients, buffers (for instance the statistics of batch norms), training modes, the state of the random
    number generators of Python, NumPy and PyTorch, and the reports of LBP-WHT layers about their last pass. Within the
    block the parameters have no gradients.
    """
    from ..tuner.layers.base import LBPWHTLayer  # here, since it is not needed without LBP-WHT layers

    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    passes = [(module, module.last_backward) for module in model.modules() if isinstance(module, LBPWHTLayer)]
    for parameter, _ in gradients:
        parameter.grad = None
    with ExitStack() as stack:
        stack.enter_context(restore_random_state(device_of(model)))
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in modes:
                module.training = training
            for layer, last in passes:
                layer.last_backward = last
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def restore_random_state(device: torch.device) -> Iterator[None]:
    """Restore the state of the random number generators at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    kinds = () if device.type in ("cpu", "meta") else (device,)
    try:
        with torch.random.fork_rng(kinds, device_type=device.type if kinds else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
