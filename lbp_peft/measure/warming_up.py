"""Runs steps until they take as long as later ones: the first steps trace the model and compile graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Result = TypeVar("Result")
_MOST_STEPS = 4


def run_until_warm(model: nn.Module, step: Callable[[], Result]) -> Result:
    """Run steps of a model until one neither traces nor compiles anything, and return its result.

    A model whose Python code may take another path in each pass is traced each time; the fourth step is then the last.
    """
    result = None
    for _ in range(_MOST_STEPS):
        before = count_preparations(model)
        result = step()
        if count_preparations(model) == before:
            break
    assert result is not None
    return result


def count_preparations(model: nn.Module) -> tuple[int, int]:
    """The number of the model's forward passes that were traced, and of frames that this process has compiled."""
    from ..tuner.layers.base import LBPWHTLayer  # here, since it is not needed without LBP-WHT layers

    finders = {module.finder for module in model.modules() if isinstance(module, LBPWHTLayer)}
    compiler = sys.modules.get("torch._dynamo.utils")  # which is not loaded as long as nothing is compiled
    compiled = 0 if compiler is None else compiler.counters["frames"]["total"]
    return sum(finder.num_traced for finder in finders), compiled
