"""Allocates a budget to the ranks of many gradients, so that the worst of them is as good as possible."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True)
class Option:
    """One rank that a gradient may have.

    Attributes:
        rank: The rank; None: the gradient is exact.
        cosine: The cosine of the gradient with the exact one.
        memory: The bytes that are saved for it.
        multiply_adds: The multiply-adds that computing it takes.
    """

    rank: int | None
    cosine: float
    memory: float = 0.0
    multiply_adds: float = 0.0


def allocate(
    options: Mapping[Key, Sequence[Option]], memory: float = math.inf, multiply_adds: float = math.inf
) -> dict[Key, Option]:
    """Choose one option for each gradient, so that the lowest cosine is as high as the budget allows.

    Every gradient starts with its cheapest option. Repeatedly, the gradient with the lowest cosine is given its next
    better option. Where that would exceed the budget, the gradient keeps the option that it has, and the gradient with
    the next lowest cosine is tried. The lowest cosine is the best possible. A choice that exceeds it must give the
    first gradient that can no longer be raised a more expensive option, and every other gradient one at least as
    expensive as it has at that point, which is more than the budget allows.

    Args:
        options: The options of each gradient, from the cheapest to the most expensive in both costs. Options that are
            no better than a cheaper one are left out.
        memory: The most bytes of all gradients together.
        multiply_adds: The most multiply-adds of all gradients together.

    Raises:
        ValueError: there are no options, or even the cheapest ones exceed the budget.
    """
    ladders = {key: _without_useless(of_key) for key, of_key in options.items()}
    chosen = {key: ladder[0] for key, ladder in ladders.items()}
    spent = [sum(one.memory for one in chosen.values()), sum(one.multiply_adds for one in chosen.values())]
    for what, least, most in (("bytes", spent[0], memory), ("multiply-adds", spent[1], multiply_adds)):
        if least > most:
            raise ValueError(f"The budget of {most:.4g} {what} is below {least:.4g}, which the lowest ranks take.")
    queue = [(ladder[0].cosine, number, key, 0) for number, (key, ladder) in enumerate(ladders.items())]
    heapq.heapify(queue)
    while queue:
        _, number, key, at = heapq.heappop(queue)
        if at + 1 == len(ladders[key]):
            continue
        present, better = ladders[key][at : at + 2]
        more = spent[0] + better.memory - present.memory, spent[1] + better.multiply_adds - present.multiply_adds
        if more[0] <= memory and more[1] <= multiply_adds:
            chosen[key], spent = better, list(more)
            heapq.heappush(queue, (better.cosine, number, key, at + 1))
    return chosen


def _without_useless(options: Sequence[Option]) -> list[Option]:
    """The options without those that are no better than a cheaper one."""
    if not options:
        raise ValueError("Each gradient needs at least one option.")
    useful = [options[0]]
    for option in options[1:]:
        if option.cosine > useful[-1].cosine:
            useful.append(option)
    return useful
