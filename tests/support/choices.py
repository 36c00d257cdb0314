"""Heuristics that give fixed answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lbp_peft import heuristics


def deciding(**answers: Any) -> AbstractContextManager:
    """A context in which some choices are fixed, and the others are as outside it.

    Args:
        answers: By name of a method of `Heuristics`, its answer or a function of its arguments.
    """
    kind = type(heuristics.active())
    return heuristics.using(type("Deciding", (kind,), {name: _method(answer) for name, answer in answers.items()})())


def _method(answer: Any) -> Callable:
    if callable(answer):
        return lambda self, *args, **kwargs: answer(*args, **kwargs)
    return lambda self, *args, **kwargs: answer
