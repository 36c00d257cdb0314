"""A patch of one module's forward method that keeps the module's name, weights and type.

The `__class__` of the module is set to a subclass of its own class, whose forward method calls the patch. The patch is
an attribute of the module. For an `nn.Linear`, the subclass amounts to

    class Linear(nn.Linear):
        plain_class = nn.Linear

        def forward(self, *args, **kwargs):
            return self.low_rank_backward.run(self, *args, **kwargs)

PEFT offers no hook for this, and the two usual ways fail: a module that wraps the other one would change the names in
the state dict, and a function that is assigned to `module.forward` would go on calling the original module in shallow
copies of it, such as the replicas of `nn.DataParallel`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...layer_types import plain_class_of

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
    """Remove the patch of a module, which has its own class and forward method again."""
    host.__class__ = plain_class_of(host)
    if "_old_forward" in vars(host):
        host._old_forward = type(host).forward.__get__(host)
    delattr(host, PATCH_ATTR)


def plain_forward(host: nn.Module) -> Callable[..., Any]:
    """The forward method of a patched module's own class: a function of the module and its inputs."""
    forward: Callable[..., object] = plain_class_of(host).forward
    return forward


@functools.lru_cache(maxsize=256)
def _patched_class(plain_class: type) -> type[nn.Module]:
    """A subclass whose forward method runs the patch. Copies and pickles of its instances refer to the plain class."""

    def forward(self: nn.Module, *args: object, **kwargs: object) -> Tensor:
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
        return plain_forward(self.host)(self.host, x)
