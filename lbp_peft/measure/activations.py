"""Counts the activations that a forward pass saves for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class SavedActivations:
    """The bytes that the forward pass saves for the backward pass, without parameters and buffers of the model."""

    bytes: int = 0

    @property
    def mib(self) -> float:
        return self.bytes / 2**20


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Count the tensors that autograd saves while the block runs; each storage is counted once.

    Args:
        model: The model, whose parameters and buffers do not count, since they are in memory in any case.

    Yields:
        [`SavedActivations`], complete when the block ends.

    Example:
        >>> with saved_activations(model) as saved:
        ...     loss = model(**batch).loss
        >>> print(f"{saved.mib:.0f} MiB")
    """
    result = SavedActivations()
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # References to the storages prevent their addresses from being used again while they are counted.
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            storages.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield result
    result.bytes = sum(storage.nbytes() for storage in storages.values())
    storages.clear()  # the hooks live as long as the graph, and would keep what the backward pass releases
