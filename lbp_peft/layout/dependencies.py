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
import random
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from typing import Any

from torch import Tensor, nn

# Attributes that PyTorch manages itself. Parameters, buffers and children are looked at by themselves.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_MOST_ITEMS = 256
_DEEPEST = 4


class Dependencies:
    """Tensors of a model, such as a buffer that holds an order, as they were when the model was traced."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def update(self, consulted: dict[int, tuple[Tensor, int]]) -> None:
        """Note some tensors, each with its version when it was read, by id."""
        for key, (tensor, version) in consulted.items():
            if key not in self._versions:
                self._versions[key] = weakref.ref(tensor), version

    def hold(self) -> bool:
        """Whether all of them still have the values that they had then."""
        return all((t := ref()) is not None and version_of(t) == version for ref, version in self._versions.values())


def version_of(tensor: Tensor) -> int:
    """Changes whenever the tensor is changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def random_state() -> Hashable:
    """The state of the generators of random numbers that Python code draws from: those of `random` and NumPy."""
    numpy = sys.modules.get("numpy.random")
    of_numpy = () if numpy is None else numpy.get_state(legacy=True)
    return random.getstate(), tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in of_numpy)


def why_undecided(read_by: str, state: Hashable) -> str:
    """What Python code did since tracing began that may make the next pass differ; "" if nothing.

    Args:
        read_by: Where it read a value of a tensor; "" if nowhere.
        state: [`random_state`] when tracing began.
    """
    if read_by:
        return f"reads a value of a tensor ({read_by})"
    return "draws random numbers" if random_state() != state else ""


class ModelState:
    """Tells whether attributes of a model's modules have changed, at little cost if they have not.

    Attributes of attributes count as well: the entries of lists and dictionaries, the fields of a configuration, the
    variables of a function's closure, and global variables that the methods of modules use.

    Args:
        ignored: Modules whose own attributes do not matter.
    """

    def __init__(self, ignored: Callable[[nn.Module], bool]):
        self._ignored = ignored
        self._known: weakref.WeakKeyDictionary[nn.Module, _Snapshot] = weakref.WeakKeyDictionary()

    def key(self, module: nn.Module) -> Hashable:
        """The same as long as the attributes are the same. Replicas of a module, made for one pass, have one key."""
        snapshot = self._known.get(module)
        if snapshot is None or not snapshot.holds(module):
            snapshot = _Snapshot(module, self._ignored)
            if not getattr(module, "_is_replica", False):
                self._known[module] = snapshot
        return snapshot.key

    def described(self, module: nn.Module) -> dict[str, Hashable]:
        """The attributes that the current key was made of, by name."""
        snapshot = self._known.get(module)
        return {} if snapshot is None else snapshot.described


class _Snapshot:
    """The attributes of all modules of a model at one moment."""

    def __init__(self, module: nn.Module, ignored: Callable[[nn.Module], bool]):
        # Containers other than modules, and functions that return values, to look at each time.
        self._containers: dict[int, Any] = {}
        self._getters: dict[Hashable, Callable[[], Any]] = {}
        self._ignored = ignored
        self.described: dict[str, Hashable] = {}
        is_replica = getattr(module, "_is_replica", False)
        parts: list[Hashable] = []
        for name, one in module.named_modules(remove_duplicate=True):
            parts.append(id(type(one)) if is_replica else id(one))
            parts.append(len(one._forward_pre_hooks) + len(one._forward_hooks))
            if not ignored(one):
                for attribute, value in vars(one).items():
                    if attribute not in _INTERNAL:
                        self.described[f"{name}.{attribute}" if name else attribute] = self._describe(value, 0)
                self._watch_globals(type(one))
        self.key = hash((tuple(parts), tuple(self.described.items())))
        values = self._current_values(module)
        self._ids = list(map(id, values))
        # Tensors are not kept alive. The address of a simple value must not be used again.
        self._kept = [value for value in values if type(value) in _SIMPLE]

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing was replaced since: compared by identity, which takes a fraction of a millisecond."""
        return list(map(id, self._current_values(module))) == self._ids

    def _current_values(self, module: nn.Module) -> list[Any]:
        values: list[Any] = []
        left: list[nn.Module | None] = [module]
        while left:  # module.modules() takes five times as long
            one = left.pop()
            if one is None:
                continue
            attributes = one.__dict__
            values.append(one)
            values.append(len(attributes["_forward_pre_hooks"]) + len(attributes["_forward_hooks"]))
            if not self._ignored(one):
                values.extend(attributes.values())
                values.extend(attributes["_buffers"].values())
            left.extend(attributes["_modules"].values())
        for container in self._containers.values():
            values.extend(container.values() if isinstance(container, dict) else container)
        values.extend([get() for get in self._getters.values()])
        return values

    def _describe(self, value: Any, depth: int) -> Hashable:
        kind = type(value)
        if kind in _SIMPLE:
            return value if value == value else "nan"
        if isinstance(value, (Enum, type, nn.Module, types.ModuleType, types.BuiltinFunctionType)):
            return id(value)
        if isinstance(value, Tensor):
            return kind, value.shape, value.dtype
        if depth >= _DEEPEST or id(value) in self._containers:
            return kind
        if isinstance(value, (tuple, frozenset)):
            return kind, tuple(self._describe(item, depth + 1) for item in list(value)[:_MOST_ITEMS])
        if isinstance(value, (list, set)):
            if len(value) > _MOST_ITEMS:
                return kind, len(value)
            self._watch(value, value)
            return kind, tuple(self._describe(item, depth + 1) for item in value)
        if isinstance(value, dict):
            return kind, self._of_dictionary(value, depth)
        if isinstance(value, functools.partial):
            return kind, self._describe((value.func, value.args, value.keywords), depth)
        if isinstance(value, types.MethodType):
            return id(value.__func__), id(value.__self__)
        if isinstance(value, types.FunctionType):
            return id(value.__code__), self._of_function(value, depth)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            return kind, self._of_dictionary(attributes, depth)
        return kind

    def _of_dictionary(self, values: dict, depth: int) -> Hashable:
        if len(values) > _MOST_ITEMS:
            return len(values)
        self._watch(values, values.values())
        return tuple((str(key), self._describe(item, depth + 1)) for key, item in list(values.items()))

    def _watch(self, container: Any, items: Iterable[Any]) -> None:
        if not any(isinstance(item, Tensor) for item in items):  # tensors are not kept alive
            self._containers[id(container)] = container

    def _of_function(self, function: types.FunctionType, depth: int) -> Hashable:
        found = []
        for index, cell in enumerate(function.__closure__ or ()):
            get = functools.partial(_contents, cell)
            self._getters[id(function), index] = get
            found.append(self._describe(get(), depth + 1))
        found += self._of_globals(function)
        return tuple(found)

    def _of_globals(self, function: types.FunctionType) -> list[Hashable]:
        """The simple global variables that a function uses."""
        found: list[Hashable] = []
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if type(value) in (bool, int, float, str, list, dict):
                self._getters[id(function.__globals__), name] = functools.partial(function.__globals__.get, name)
                found.append((name, self._describe(value, 1)))
        return found

    def _watch_globals(self, cls: type) -> None:
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] in _LIBRARIES:
                continue
            key = f"globals of {base.__module__}.{base.__qualname__}"
            if key not in self.described:
                functions = [f for f in vars(base).values() if isinstance(f, types.FunctionType)]
                self.described[key] = tuple(part for function in functions for part in self._of_globals(function))


# Code that has no global variables that users change.
_LIBRARIES = (
    "builtins", "torch", "torchvision", "transformers", "timm", "peft", "accelerate", __name__.partition(".")[0],
)  # fmt: skip


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def described(value: Any) -> Hashable:
    """A key of an argument that is no tensor, so that equal arguments have equal keys."""
    return _Describer()._describe(value, 0)


class _Describer(_Snapshot):
    """Describes single values."""

    def __init__(self) -> None:
        self._containers, self._getters = {}, {}


def changed(before: dict[str, Hashable], after: dict[str, Hashable]) -> list[str]:
    """The names whose values differ."""
    names = dict.fromkeys((*before, *after))
    return [name for name in names if before.get(name) != after.get(name)]
