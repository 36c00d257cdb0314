"""A patch of one module's forward method that keeps the module's name, weights and type.

The module's class is swapped for a subclass with another forward method, and the patch is kept in an attribute of the
module. PEFT offers no hook for that: a wrapper would change the names in the state dict, and an attribute `forward`
would be lost when the module is copied or pickled.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

PATCH_ATTR = "low_rank_backward"


class ForwardPatch:
    """Runs the forward pass of a module, its host, and thereby decides how the host's backward pass is run.

    The host keeps its place in the model, its name, its weights and its type, so whatever its own method does with it
    (saving, loading, merging, switching adapters) works as before. A patch has no weights.
    """

    def run(self, host: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward pass."""
        raise NotImplementedError


def attach(host: Any, patch: ForwardPatch) -> None:
    """Have a module's forward pass run by a patch."""
    setattr(host, PATCH_ATTR, patch)
    plain_class: type = type(host)
    host.__class__ = _patched_class(plain_class)
    if "_old_forward" in vars(host):  # accelerate's wrapper of the forward method calls this
        host._old_forward = type(host).forward.__get__(host)


def detach(host: Any) -> None:
    """Remove the patch of a module."""
    host.__class__ = type(host).plain_class
    if "_old_forward" in vars(host):
        host._old_forward = type(host).forward.__get__(host)
    delattr(host, PATCH_ATTR)


@functools.lru_cache(maxsize=256)
def _patched_class(plain_class: type) -> type[nn.Module]:
    """A subclass whose forward method runs the patch. Copies and pickles of its instances refer to the plain class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(self, PATCH_ATTR).run(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _new_patched, (plain_class,), self.__dict__

    attributes = {"plain_class": plain_class, "forward": forward, "__reduce_ex__": reduce}
    return type(plain_class.__name__, (plain_class,), attributes | {"__module__": plain_class.__module__})


def _new_patched(plain_class: type) -> nn.Module:
    cls = _patched_class(plain_class)
    return cls.__new__(cls)


class UnpatchedForward(nn.Module):
    """A patched module with the forward method of its own class."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        host: Any = self.host
        return type(host).plain_class.forward(host, x)
