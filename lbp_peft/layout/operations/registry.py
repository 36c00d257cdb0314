"""The registry of rules, and the functions that rules in several modules use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..positions import LOST, NOWHERE
from ..trails import Trail

# The positions of an operation's result, or of each of its results; None if they are lost.
Result: TypeAlias = Tensor | Sequence[Tensor | None] | None
Rule: TypeAlias = Callable[..., Result]

RULES: dict[str, Rule] = {}
# Rules that also get the operation's result, whose shape they need.
RULES_BY_RESULT: dict[str, Rule] = {}


class Tracer(Protocol):
    """What a rule may ask the [`lbp_peft.layout.tracer.PositionTracer`] that applies it.

    Attributes:
        current_name: The name of the operation whose rule is being applied.
    """

    current_name: str

    def trail(self, tensor: Tensor) -> Trail | None:
        """The trail of a tensor; None if it is not known to depend on the input."""

    def positions(self, tensor: object) -> Tensor | None:
        """The positions of a tensor's elements, in its shape; None if there are none."""

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is certain to be the same in each forward pass, as long as the model's tensors are."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations: (tracer, the operation's arguments) -> positions of its result."""
    return _decorator(RULES, names)


def rule_by_result(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations: (tracer, the result, the operation's arguments) -> positions of the result."""
    return _decorator(RULES_BY_RESULT, names)


def _decorator(rules: dict[str, Rule], names: Sequence[str]) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        rules.update(dict.fromkeys(names, function))
        return function

    return register


def are_constant(tracer: Tracer, values: object) -> bool:
    """Whether all tensors in nested arguments are the same in each pass."""
    if isinstance(values, Tensor):
        return tracer.is_constant(values)
    if isinstance(values, slice):
        return are_constant(tracer, (values.start, values.stop, values.step))
    if isinstance(values, dict):
        return are_constant(tracer, tuple(values.values()))
    if isinstance(values, (tuple, list)):
        return all(are_constant(tracer, value) for value in values)
    return True


def positions_or_nowhere(tracer: Tracer, x: Tensor) -> Tensor:
    """The positions of any tensor: NOWHERE if it does not depend on the input, LOST if they are not known."""
    trail = tracer.trail(x)
    if trail is None:
        return torch.full((), NOWHERE, device=x.device).expand(x.shape)
    return torch.full((), LOST, device=x.device).expand(x.shape) if trail.positions is None else trail.positions
