"""Keys of values that Python code may read: equal values have equal keys."""

from __future__ import annotations

import functools
import io
import numbers
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from enum import Enum

import numpy as np
from torch import Tensor, nn

from . import contents

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_OWN_PACKAGE = __name__.partition(".")[0]
# The contents of larger containers are not compared. Arrays have the limit of tensors.
_MOST_ITEMS = 4096
_DEEPEST = 4


class Describer:
    """Describes values by keys, and collects what can change within them.

    Attributes:
        containers: Lists, dictionaries and sets, by id.
        getters: Functions that return a value, such as that of a global variable.
        arrays: NumPy arrays.
        generators: Generators of random numbers.
        place: The attribute that is being described, for messages.
    """

    def __init__(self) -> None:
        self.containers: dict[int, Collection[object]] = {}
        self.getters: dict[Hashable, Callable[[], object]] = {}
        self.arrays: list[np.ndarray] = []
        self.generators: list[object] = []
        self.place = ""
        self._functions: set[int] = set()

    def describe(self, value: object, depth: int = 0) -> Hashable:
        """The key of a value: equal values have equal keys.

        Args:
            value: Any object.
            depth: The number of values that it is nested in.
        """
        kind = type(value)
        if kind in SIMPLE:
            return value if value == value else "nan"
        if isinstance(value, (np.generic, numbers.Number, range, slice)):
            return kind, repr(value)
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__  # such as the list of its method `pop`
            is_fixed = isinstance(owner, (type, types.ModuleType))
            return value.__name__, id(owner) if is_fixed else self.describe(owner, depth + 1)
        if isinstance(value, (Enum, type, nn.Module, types.ModuleType)):
            return id(value)
        if isinstance(value, np.ndarray):
            if value.size > contents.MOST_VALUES or value.dtype.hasobject:
                return value.shape, id(value)
            self.arrays.append(value)
            return value.shape, value.tobytes()
        if isinstance(value, Tensor):
            return kind, value.shape, value.dtype
        if kind.__module__.partition(".")[0] == _OWN_PACKAGE:
            return str(kind)
        if isinstance(value, _GENERATORS):
            self.generators.append(value)
            return str(kind)
        if _is_read_once(value):
            return self.note_unseen(value)
        if depth >= _DEEPEST or id(value) in self.containers:
            return str(kind)
        if isinstance(value, (tuple, frozenset)):
            return kind, tuple(self.describe(item, depth + 1) for item in list(value)[:_MOST_ITEMS])
        if isinstance(value, (list, set, deque)):
            if len(value) > _MOST_ITEMS:
                return kind, len(value)
            self._watch(value, value)
            return kind, tuple(self.describe(item, depth + 1) for item in value)
        if isinstance(value, dict):
            return kind, self._describe_dictionary(value, depth)
        if isinstance(value, functools.partial):
            return kind, self.describe((value.func, value.args, value.keywords), depth)
        if isinstance(value, types.MethodType):
            return id(value.__func__), id(value.__self__)
        if isinstance(value, types.FunctionType):
            return id(value.__code__), self._describe_function(value, depth)
        attributes = getattr(value, "__dict__", None)
        parts: list[object] = [kind]
        if isinstance(attributes, dict):
            parts.append(self._describe_dictionary(attributes, depth))
        for name in _slots(kind):
            get = functools.partial(getattr, value, name, None)
            self.getters[id(value), name] = get
            parts.append(self.describe(get(), depth + 1))
        return tuple(parts)

    def note_unseen(self, value: object) -> Hashable:
        """The key of a value whose state cannot be compared: equal to no other, so that each pass is traced."""
        return object()

    def _describe_dictionary(self, values: dict, depth: int) -> Hashable:
        if len(values) > _MOST_ITEMS:
            return len(values)
        self._watch(values, values.values())
        return tuple((str(key), self.describe(item, depth + 1)) for key, item in list(values.items()))

    def _watch(self, container: Collection[object], items: Iterable[object]) -> None:
        if not any(isinstance(item, Tensor) for item in items):  # tensors are not kept alive
            self.containers[id(container)] = container

    def _describe_function(self, function: types.FunctionType, depth: int) -> Hashable:
        parts = []
        for index, cell in enumerate(function.__closure__ or ()):
            get = functools.partial(_contents_of, cell)
            self.getters[id(function), index] = get
            parts.append(self.describe(get(), depth + 1))
        for values in (function.__defaults__, function.__kwdefaults__):
            if values:
                parts.append(self.describe(values, depth))
        parts += self.describe_globals(function)
        return tuple(parts)

    def describe_globals(self, function: types.FunctionType) -> list[Hashable]:
        """The global variables that a function uses, and those that functions of the same kind use that it calls."""
        parts: list[Hashable] = []
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType):
                if id(value) in self._functions or not _is_user_code(value):
                    continue
                self._functions.add(id(value))
            if (
                type(value) in _WATCHED_GLOBALS
                or _is_user_code(value)
                or isinstance(value, (*_GENERATORS, np.generic))
                or _is_read_once(value)
            ):
                self.place = name
                self.getters[id(function.__globals__), name] = functools.partial(function.__globals__.get, name)
                parts.append((name, self.describe(value, 2 if _is_user_code(value) else 1)))
        return parts


# The global variables of these packages are not changed by users.
LIBRARIES = (
    "builtins", "torch", "torchvision", "transformers", "timm", "peft", "accelerate", "numpy", "einops", _OWN_PACKAGE,
)  # fmt: skip


_WATCHED_GLOBALS = (bool, int, float, str, list, dict, tuple, set, deque, np.ndarray)


def _is_user_code(value: object) -> bool:
    """Whether a value is a function, or an object of a class, of the user's own code and not of a library."""
    module = value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__
    package = (module or "").partition(".")[0]
    return package not in LIBRARIES and package not in sys.stdlib_module_names


def _is_read_once(value: object) -> bool:
    """Whether reading from a value changes it, in a way that cannot be compared: iterators, and files to read from."""
    if isinstance(value, io.IOBase):
        return not value.closed and value.readable()
    return isinstance(value, Iterator) and not isinstance(value, nn.Module) and not hasattr(value, "__dict__")


def _slots(kind: type) -> list[str]:
    """The attributes that objects of a class of Python code have besides their dictionary."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if not name.startswith("__")]


def _contents_of(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def describe(value: object) -> Hashable:
    """A key of an argument that is not a tensor, so that equal arguments have equal keys."""
    return Describer().describe(value)


def changed(before: dict[str, Hashable], after: dict[str, Hashable]) -> list[str]:
    """The names whose values differ."""
    names = dict.fromkeys((*before, *after))
    return [name for name in names if before.get(name) != after.get(name)]
