"""Branches: low-rank updates beside the weight of a linear layer, as LoRA's, and their tensors in a backward pass.

`torch.autograd.Function` takes and returns flat sequences of tensors. Named tuples say which tensor is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A low-rank update beside the weight, as LoRA's: y += scaling * ((x down^T) up^T + bias).

    Attributes:
        down: Shape (r, C_in).
        up: Shape (C_out, r).
        bias: Shape (C_out,), or None.
        scaling: A factor.
        x: The input of the branch, if it is not that of the layer itself: for instance the input after dropout.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    x: Tensor | None = None


class BranchTensors(NamedTuple):
    """The tensors of a [`Branch`] as arguments of the autograd function, or the gradients of these."""

    x: Tensor | None
    down: Tensor
    up: Tensor
    bias: Tensor | None


class BranchNeeds(NamedTuple):
    """Which of a branch's tensors need a gradient."""

    x: bool
    down: bool
    up: bool
    bias: bool


class SavedBranch(NamedTuple):
    """What is saved of a branch. Its factors are only read where a gradient needs them, and are None otherwise.

    Attributes:
        x_hat: The projection of the branch's own input; None if it is not needed, or if the branch has no such input.
        down: See [`Branch`].
        up: See [`Branch`].
    """

    x_hat: Tensor | None
    down: Tensor
    up: Tensor


_Group = TypeVar("_Group", BranchTensors, BranchNeeds, SavedBranch)


def group(items: Sequence[Any], tuple_type: type[_Group]) -> list[_Group]:
    """Split a flat sequence, which holds the fields of one tuple after another, into these tuples."""
    size = len(tuple_type._fields)
    return [tuple_type(*items[start : start + size]) for start in range(0, len(items), size)]


def factors(branches: Sequence[BranchTensors | SavedBranch]) -> list[Tensor]:
    """A_1, B_1, A_2, B_2, ..., the form in which [`lbp_peft.ops.summed_weight.summed_weight`] takes them."""
    return [factor for branch in branches for factor in (branch.down, branch.up)]
