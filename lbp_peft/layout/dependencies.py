"""What the layouts of a forward pass depend on besides its inputs.

Positions follow every operation of a pass, but not the Python code that chose these operations. That code may read
attributes of modules, random numbers and values of tensors, and choose other operations in the next pass. So each pass
is compared with the traced one in what its code can have read: all attributes of the model's modules
([`ModelState`]), and the tensors by which tokens were ordered ([`Dependencies`]). Where a traced pass itself drew
random numbers for Python code or read values of its tensors ([`random_state`] and `PositionTracer`), the next pass may
differ in any case, so each pass is traced.
"""

from __future__ import annotations

import functools
import io
import numbers
import operator
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import contents
from .contents import ConsultedTensor, Contents, version_of

# Attributes that PyTorch manages itself. Parameters, buffers and children are compared separately.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_OWN = __name__.partition(".")[0]
# The contents of larger containers are not compared. Arrays have the limit of tensors.
_MOST_ITEMS = 4096
_DEEPEST = 4


class Dependencies:
    """The tensors of a model on whose values a trace depends, such as a buffer that holds an order."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Contents]] = {}

    def update(self, consulted: dict[int, ConsultedTensor]) -> None:
        """Record tensors as they were when they were read, by id."""
        for key, read in consulted.items():
            if key not in self._known:
                self._known[key] = weakref.ref(read.tensor), read.version, read.contents

    def are_unchanged(self, module: nn.Module, state: ModelState) -> bool:
        """Whether the module still has all of these tensors, with the same values."""
        for ref, version, held in self._known.values():
            tensor = ref()
            if tensor is None or version_of(tensor) != version or not held.match(tensor):
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


class ModelState:
    """Detects changes in the attributes of a model's modules, at little cost if there are none.

    Attributes of attributes count as well: the entries of lists and dictionaries, the fields of a configuration, the
    variables of a function's closure, and attributes of classes and global variables that the methods of modules use.

    Args:
        ignored: Modules whose own attributes do not matter.
    """

    def __init__(self, ignored: Callable[[nn.Module], bool]):
        self._ignored = ignored
        self._known: weakref.WeakKeyDictionary[nn.Module, _Snapshot] = weakref.WeakKeyDictionary()

    def key(self, module: nn.Module) -> Hashable:
        """A key that changes when the attributes do. Replicas of a module that are made for one pass share a key."""
        snapshot = self._known.get(module)
        if snapshot is None or not snapshot.is_current():
            snapshot = _Snapshot(module, self._ignored)
            if not getattr(module, "_is_replica", False):
                self._known[module] = snapshot
        return snapshot.key

    def has(self, module: nn.Module, tensor: Tensor) -> bool:
        """Whether a tensor is a buffer or an attribute."""
        snapshot = self._known.get(module)
        return snapshot is not None and snapshot.has(tensor)

    def generators(self, module: nn.Module) -> list[object]:
        """The generators of random numbers among the attributes that the current key was made of."""
        snapshot = self._known.get(module)
        return [] if snapshot is None else snapshot.generators

    def unseen(self, module: nn.Module) -> list[str]:
        """Attributes whose state cannot be compared, such as an iterator's, each with its type."""
        snapshot = self._known.get(module)
        return [] if snapshot is None else snapshot.unseen

    def described(self, module: nn.Module) -> dict[str, Hashable]:
        """The attributes that the current key was made of, by name."""
        snapshot = self._known.get(module)
        return {} if snapshot is None else snapshot.described


class _Snapshot:
    """The attributes of all modules of a model at one moment."""

    def __init__(self, module: nn.Module, ignored: Callable[[nn.Module], bool]):
        # Containers other than modules, and functions that return values, which are compared each time.
        self._containers: dict[int, Any] = {}
        self._getters: dict[Hashable, Callable[[], object]] = {}
        self._ignored = ignored
        self._arrays: list[np.ndarray] = []
        self._functions: set[int] = set()
        self._at = ""
        self.generators: list[object] = []
        self.unseen: list[str] = []
        self.described: dict[str, Hashable] = {}
        is_replica = getattr(module, "_is_replica", False)
        parts: list[Hashable] = []
        modules = list(module.named_modules())
        for name, one in modules:
            parts.append(id(type(one)) if is_replica else id(one))
            parts.append(len(one._forward_pre_hooks) + len(one._forward_hooks))
            if not ignored(one):
                for attribute, value in _attributes(one):
                    self._at = f"{name}.{attribute}" if name else attribute
                    self.described[self._at] = self._describe(value, 0)
                self._watch_class(type(one))
        self.key = hash((tuple(parts), tuple(self.described.items())))
        self._children = [one._modules for _, one in modules if one._modules]
        self._buffers = [one._buffers for _, one in modules if one._buffers]
        watched = [one for _, one in modules if not ignored(one)]
        self._attributes: list[tuple[Callable[[dict], Any], dict]] = [
            (operator.itemgetter(*names, names[0]), one.__dict__)  # two names at least, so that it returns a tuple
            for one in watched
            if (names := [attribute for attribute, _ in _attributes(one)])
        ]
        hooks = [hooks for _, one in modules for hooks in (one._forward_pre_hooks, one._forward_hooks)]
        others = [values for _, one in modules for values in (one._modules, one._buffers)]
        self._dictionaries = [*hooks, *others, *(one.__dict__ for one in watched)]
        self._lengths = list(map(len, self._dictionaries))
        values = self._current_values()
        self._ids = list(map(id, values))
        # Tensors are not kept alive. The address of a simple value must not be used again.
        self._kept = [value for value in values if type(value) in _SIMPLE]
        self._contents = [array.tobytes() for array in self._arrays]

    def is_current(self) -> bool:
        """Whether no attribute has been replaced since. Comparing identities takes a fraction of a millisecond."""
        if list(map(len, self._dictionaries)) != self._lengths:
            return False
        if list(map(id, self._current_values())) != self._ids:
            return False
        return all(array.tobytes() == before for array, before in zip(self._arrays, self._contents, strict=True))

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor was among the values."""
        return id(tensor) in self._ids

    def _current_values(self) -> list[object]:
        values: list[object] = []
        for get, attributes in self._attributes:
            values += get(attributes)
        for dictionary in (*self._children, *self._buffers):
            values += dictionary.values()
        for container in self._containers.values():
            values += container.values() if isinstance(container, dict) else container
        values += [get() for get in self._getters.values()]
        return values

    def _describe(self, value: object, depth: int) -> Hashable:
        kind = type(value)
        if kind in _SIMPLE:
            return value if value == value else "nan"
        if isinstance(value, (np.generic, numbers.Number, range, slice)):
            return kind, repr(value)
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__  # such as the list of its method `pop`
            is_fixed = isinstance(owner, (type, types.ModuleType))
            return value.__name__, id(owner) if is_fixed else self._describe(owner, depth + 1)
        if isinstance(value, (Enum, type, nn.Module, types.ModuleType)):
            return id(value)
        if isinstance(value, np.ndarray):
            if value.size > contents.MOST_VALUES or value.dtype.hasobject:
                return value.shape, id(value)
            self._arrays.append(value)
            return value.shape, value.tobytes()
        if isinstance(value, Tensor):
            return kind, value.shape, value.dtype
        if kind.__module__.partition(".")[0] == _OWN:
            return str(kind)
        if isinstance(value, _GENERATORS):
            self.generators.append(value)
            return str(kind)
        if _is_unseen(value):
            return self._note_unseen(value)
        if depth >= _DEEPEST or id(value) in self._containers:
            return str(kind)
        if isinstance(value, (tuple, frozenset)):
            return kind, tuple(self._describe(item, depth + 1) for item in list(value)[:_MOST_ITEMS])
        if isinstance(value, (list, set, deque)):
            if len(value) > _MOST_ITEMS:
                return kind, len(value)
            self._watch(value, value)
            return kind, tuple(self._describe(item, depth + 1) for item in value)
        if isinstance(value, dict):
            return kind, self._describe_dictionary(value, depth)
        if isinstance(value, functools.partial):
            return kind, self._describe((value.func, value.args, value.keywords), depth)
        if isinstance(value, types.MethodType):
            return id(value.__func__), id(value.__self__)
        if isinstance(value, types.FunctionType):
            return id(value.__code__), self._describe_function(value, depth)
        attributes = getattr(value, "__dict__", None)
        parts: list[Any] = [kind]
        if isinstance(attributes, dict):
            parts.append(self._describe_dictionary(attributes, depth))
        for name in _slots(kind):
            get = functools.partial(getattr, value, name, None)
            self._getters[id(value), name] = get
            parts.append(self._describe(get(), depth + 1))
        return tuple(parts)

    def _note_unseen(self, value: object) -> Hashable:
        """Have each pass traced, since the state of a value cannot be compared."""
        self.unseen.append(f"{type(value).__module__}.{type(value).__name__} in {self._at}")
        return str(type(value))

    def _describe_dictionary(self, values: dict, depth: int) -> Hashable:
        if len(values) > _MOST_ITEMS:
            return len(values)
        self._watch(values, values.values())
        return tuple((str(key), self._describe(item, depth + 1)) for key, item in list(values.items()))

    def _watch(self, container: object, items: Iterable[object]) -> None:
        if not any(isinstance(item, Tensor) for item in items):  # tensors are not kept alive
            self._containers[id(container)] = container

    def _describe_function(self, function: types.FunctionType, depth: int) -> Hashable:
        parts = []
        for index, cell in enumerate(function.__closure__ or ()):
            get = functools.partial(_contents, cell)
            self._getters[id(function), index] = get
            parts.append(self._describe(get(), depth + 1))
        for values in (function.__defaults__, function.__kwdefaults__):
            if values:
                parts.append(self._describe(values, depth))
        parts += self._describe_globals(function)
        return tuple(parts)

    def _describe_globals(self, function: types.FunctionType) -> list[Hashable]:
        """The global variables that a function uses, and those that functions of the same kind use that it calls."""
        parts: list[Hashable] = []
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType):
                if id(value) in self._functions or not _is_users(value):
                    continue
                self._functions.add(id(value))
            if (
                type(value) in _WATCHED_GLOBALS
                or _is_users(value)
                or isinstance(value, (*_GENERATORS, np.generic))
                or _is_unseen(value)
            ):
                self._at = name
                self._getters[id(function.__globals__), name] = functools.partial(function.__globals__.get, name)
                parts.append((name, self._describe(value, 2 if _is_users(value) else 1)))
        return parts

    def _watch_class(self, cls: type) -> None:
        """Describe simple attributes of a class, and the global variables that its methods use."""
        for base in cls.__mro__:
            key = f"class {base.__module__}.{base.__qualname__}"
            if base.__module__.partition(".")[0] in _LIBRARIES or key in self.described:
                continue
            parts: list[Hashable] = []
            for name, value in vars(base).items():
                if type(value) in _SIMPLE and not name.startswith("__"):
                    self._getters[key, name] = functools.partial(getattr, base, name, None)
                    parts.append((name, value))
                elif isinstance(value, types.FunctionType):
                    parts += self._describe_globals(value)
            self.described[key] = tuple(parts)


# The global variables of these packages are not changed by users.
_LIBRARIES = (
    "builtins", "torch", "torchvision", "transformers", "timm", "peft", "accelerate", "numpy", "einops", _OWN,
)  # fmt: skip


_WATCHED_GLOBALS = (bool, int, float, str, list, dict, tuple, set, deque, np.ndarray)


def _is_users(value: object) -> bool:
    """Whether a value is a function, or an object of a class, of the user's own code and not of a library."""
    module = value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__
    package = (module or "").partition(".")[0]
    return package not in _LIBRARIES and package not in sys.stdlib_module_names


def _is_unseen(value: object) -> bool:
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


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def describe(value: object) -> Hashable:
    """A key of an argument that is not a tensor, so that equal arguments have equal keys."""
    return _Describer()._describe(value, 0)


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    """The attributes of a module, without those that PyTorch manages."""
    return [(name, value) for name, value in vars(module).items() if name not in _INTERNAL]


class _Describer(_Snapshot):
    """Describes single values."""

    def __init__(self) -> None:
        self._containers, self._getters, self._arrays, self._functions = {}, {}, [], set()
        self.generators = []

    def _note_unseen(self, value: object) -> Hashable:
        return object()  # equal to no other, so that each pass is traced


def changed(before: dict[str, Hashable], after: dict[str, Hashable]) -> list[str]:
    """The names whose values differ."""
    names = dict.fromkeys((*before, *after))
    return [name for name in names if before.get(name) != after.get(name)]
