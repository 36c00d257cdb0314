"""What the layouts of a forward pass depend on besides its inputs.

Positions follow every operation of a pass, but not the Python code that chose these operations. That code may read
attributes of modules, random numbers and values of tensors, and choose other operations in the next pass. So each pass
is compared with the traced one in what its code can have read: all attributes of the model's modules
([`lbp_peft.layout.model_state.ModelState`]), and the tensors by which tokens were ordered ([`Dependencies`]). Where a
traced pass itself drew random numbers for Python code or read values of its tensors ([`random_state`] and
`PositionTracer`), the next pass may differ in any case, so each pass is traced.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from .contents import ConsultedTensor, Contents, version_of
from .model_state import ModelState


class Dependencies:
    """The tensors of a model on whose values a trace depends, such as a buffer that holds an order."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Contents]] = {}

    def update(self, consulted: dict[int, ConsultedTensor]) -> None:
        """Record tensors as they were when they were read, by id."""
        for key, tensor in consulted.items():
            if key not in self._known:
                self._known[key] = weakref.ref(tensor.tensor), tensor.version, tensor.contents

    def are_unchanged(self, module: nn.Module, state: ModelState) -> bool:
        """Whether the module still has all of these tensors, with the same values."""
        for ref, version, contents in self._known.values():
            tensor = ref()
            if tensor is None or version_of(tensor) != version or not contents.match(tensor):
                return False
            if not isinstance(tensor, nn.Parameter) and not state.has(module, tensor):
                return False
        return True


def random_state(generators: Iterable[object] = ()) -> Hashable:
    """The state of the generators of random numbers that Python code draws from.

    Args:
        generators: Generators besides the global ones of `random` and NumPy.
    """
    states: list[Hashable] = [random.getstate(), _state_of_numpy(np.random)]
    for generator in generators:
        if isinstance(generator, random.Random):
            states.append(generator.getstate())
        elif isinstance(generator, np.random.Generator):
            states.append(str(generator.bit_generator.state))
        else:
            states.append(_state_of_numpy(generator))
    return tuple(states)


def _state_of_numpy(generator: Any) -> Hashable:
    return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in generator.get_state(legacy=True))


def why_undecided(read_by: str, state: Hashable, generators: Iterable[object], unseen: list[str]) -> str:
    """What Python code has done since tracing began that may make the next pass differ; "" if nothing.

    Args:
        read_by: Where it read a value of a tensor; "" if nowhere.
        state: [`random_state`] of these generators when tracing began.
        generators: Generators besides the global ones.
        unseen: Attributes whose state cannot be compared, see [`ModelState`].
    """
    if unseen:
        return f"can read from an iterator or a file ({unseen[0]})"
    if read_by:
        return f"reads a value of a tensor ({read_by})"
    return "draws random numbers" if random_state(generators) != state else ""
