"""Buffers for intermediate results on CPUs, which are kept from one call to the next.

A buffer that every call allocates and frees leaves a gap in the heap among the tensors that are saved for the backward
pass. The gaps of all layers together raise the peak memory of a process by several percent.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_MOST_BYTES = 2**22  # larger buffers are not kept


class _Kept(threading.local):
    """The buffers of each thread."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(like: Tensor, size: int, dtype: torch.dtype, name: str = "") -> Tensor:
    """A buffer with arbitrary contents, valid until the next call on this thread with the same name and dtype.

    Args:
        like: A tensor on the CPU, of the kind with which the buffer is used.
        size: The number of elements.
        dtype: The dtype of the elements.
        name: Tells buffers of the same dtype apart that are in use at the same time.

    Returns:
        Shape (size,).
    """
    if type(like) is not Tensor or size * dtype.itemsize > _MOST_BYTES:  # such as a tracer's fake tensor
        return like.new_empty(size, dtype=dtype)
    buffer = _kept.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False), torch.no_grad():
            buffer = _kept.buffers[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return buffer[:size]
