"""Remembers the values of tensors, to notice changes that PyTorch does not record."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensor

# The values of larger tensors are not compared.
MOST_VALUES = 2**16
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Contents:
    """The values of a tensor, which NumPy or another library may change in shared memory, without a new version.

    Only small tensors on the CPU are copied and compared. Tensors elsewhere and larger ones are trusted, and so are
    parameters whose memory sharded training (FSDP) has freed, since reading them would crash the process.

    Attributes:
        is_copied: Whether the values were copied, to be compared.
        is_reliable: Whether they are compared or trusted; not if the tensor is large and shares its memory with a NumPy
            array, or has no values.
    """

    def __init__(self, tensor: Tensor) -> None:
        is_on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided and type(tensor) in _PLAIN
        self.is_copied = is_on_cpu and tensor.numel() <= MOST_VALUES and _has_memory(tensor)
        self._copy = tensor.detach().clone() if self.is_copied else None
        self.is_reliable = self.is_copied or not is_on_cpu or not _is_of_numpy(tensor)
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            self.is_reliable = False

    def match(self, tensor: Tensor) -> bool:
        """Whether the tensor still has these values; True if they were not copied or cannot be read."""
        if self._copy is None:
            return True
        if tensor.device != self._copy.device or tensor.shape != self._copy.shape:
            return False
        return not _has_memory(tensor) or torch.equal(tensor.detach(), self._copy)


def _has_memory(tensor: Tensor) -> bool:
    storage = storage_of(tensor)
    return tensor.numel() == 0 or storage is None or storage.nbytes() > 0


def _is_of_numpy(tensor: Tensor) -> bool:
    """Whether NumPy or another library may hold the memory of a tensor: PyTorch can then not resize it."""
    storage = storage_of(tensor)
    return storage is not None and not storage.resizable()


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """The storage of a tensor; None for a wrapper of torch.func, which has none of its own, but can be read."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


@dataclass(frozen=True)
class ConsultedTensor:
    """A tensor of a model by whose values tokens were ordered.

    Attributes:
        tensor: The tensor.
        version: Its version at the time.
        contents: Its values.
    """

    tensor: Tensor
    version: int
    contents: Contents


def version_of(tensor: Tensor) -> int:
    """A value that changes whenever the tensor is changed in place."""
    return 0 if tensor.is_inference() else tensor._version
