"""What a training step costs: saved activations and multiply-adds, measured on the step itself.

Both are read off the running computation, so full fine-tuning, LoRA and LBP-WHT are counted by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class SavedActivations:
    """Bytes that the forward pass keeps for the backward pass, parameters and buffers of the model not counted."""

    bytes: int = 0

    @property
    def mib(self) -> float:
        return self.bytes / 2**20


@dataclass
class MultiplyAdds:
    """Multiply-adds of the matrix products, convolutions and fused attention in a region (FLOPs over two)."""

    total: int = 0


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


@contextmanager
def multiply_adds() -> Iterator[MultiplyAdds]:
    """Count the multiply-adds of the block with PyTorch's own FLOP counter, but grouped convolutions by their groups.

    Yields:
        [`MultiplyAdds`], complete when the block ends.

    Example:
        >>> with multiply_adds() as backward:
        ...     loss.backward()
        >>> print(f"{backward.total / 1e9:.1f} G")
    """
    result = MultiplyAdds()
    formulas = {torch.ops.aten.convolution_backward: _flops_of_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        yield result
    result.total = counter.get_total_flops() // 2


def _flops_of_convolution_backward(
    grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Each gradient takes the multiply-adds of the forward pass.

    PyTorch's own formula ignores groups in the gradient of the weight: for a depthwise convolution of C channels it
    counts C times too much, which would make training one look dearer than it is.
    """
    *_, transposed, _, _, output_mask = args
    pixels = math.prod((x_shape if transposed else grad_shape)[2:])
    return 2 * x_shape[0] * pixels * math.prod(weight_shape) * sum(output_mask[:2])
