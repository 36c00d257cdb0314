"""Dropout inside a layer that is run again: its modules return what they returned in the forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn


def active_dropouts(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that drop out values when it is called."""
    return [m for m in layer.modules() if type(m) is nn.Dropout and m.p > 0 and m.training]


@contextmanager
def replace_forwards(modules: list[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block, the modules call `forward(module, input)` in place of their own forward methods."""
    with ExitStack() as stack:
        for module in modules:
            before = vars(module).copy()
            vars(module)["forward"] = functools.partial(forward, module)
            stack.callback(_set_back, module, before)
        yield


def _set_back(module: nn.Module, before: dict[str, object]) -> None:
    if "forward" in before:
        vars(module)["forward"] = before["forward"]
    else:
        del vars(module)["forward"]


def random_state_restored(device: torch.device) -> AbstractContextManager:
    """Restore the state of the random generators after the block, so that training continues as if it had not run."""
    context: AbstractContextManager = torch.random.fork_rng(
        [device] if device.type == "cuda" else [], device_type="cuda"
    )
    return context
