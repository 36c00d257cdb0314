"""Types of the values in a configuration, which may come from a file."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any, TypeGuard


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int, but neither True nor False."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_int(value: object) -> Any:
    """An int if the value is an integer of any type, such as NumPy's; otherwise the value unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def is_one_of(value: object, allowed: Iterable[str]) -> bool:
    """Whether a value is one of some strings."""
    return isinstance(value, str) and value in allowed


def are_names(value: object) -> bool:
    """Whether a value is a list, a tuple or a set of strings that are not empty."""
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) and name for name in value)
