"""The activations that a forward pass saves for the backward pass, counted on the pass itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class SavedActivations:
    """Bytes that the forward pass keeps for the backward pass, parameters and buffers of the model not counted."""

    bytes: int = 0

    @property
    def mib(self) -> float:
        return self.bytes / 2**20


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Count the tensors that autograd saves while the block runs; each storage is counted once.

    Args:
        model: Its parameters and buffers do not count: they are there whether or not a step is taken.

    Yields:
        [`SavedActivations`], complete when the block ends.

    Example:
        >>> with saved_activations(model) as saved:
        ...     loss = model(**batch).loss
        >>> print(f"{saved.mib:.0f} MiB")
    """
    result = SavedActivations()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # Holding the storages keeps their addresses from being given out twice while we count.
    seen: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield result
    result.bytes = sum(storage.nbytes() for storage in seen.values())
