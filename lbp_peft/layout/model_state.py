"""Whether the attributes of a model have changed since a pass was traced."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from .descriptions import LIBRARIES, SIMPLE, Describer

# Attributes that PyTorch manages itself. Parameters, buffers and children are compared separately.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


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


class _Snapshot(Describer):
    """The attributes of all modules of a model at one moment.

    Args:
        module: The model.
        ignored: Modules whose own attributes do not matter.

    Attributes:
        key: The key of all attributes together.
        described: The key of each attribute, by name.
        unseen: Attributes whose state cannot be compared, each with its type.
    """

    def __init__(self, module: nn.Module, ignored: Callable[[nn.Module], bool]):
        super().__init__()
        self.unseen: list[str] = []
        self.described: dict[str, Hashable] = {}
        is_replica = getattr(module, "_is_replica", False)
        parts: list[Hashable] = []
        modules = list(module.named_modules())
        for name, part in modules:
            parts.append(id(type(part)) if is_replica else id(part))
            parts.append(len(part._forward_pre_hooks) + len(part._forward_hooks))
            if not ignored(part):
                for attribute, value in _attributes(part):
                    self.place = f"{name}.{attribute}" if name else attribute
                    self.described[self.place] = self.describe(value)
                self._watch_class(type(part))
        self.key = hash((tuple(parts), tuple(self.described.items())))
        self._children = [part._modules for _, part in modules if part._modules]
        self._buffers = [part._buffers for _, part in modules if part._buffers]
        watched = [part for _, part in modules if not ignored(part)]
        self._attributes: list[tuple[Callable[[dict], Any], dict]] = [
            (operator.itemgetter(*names, names[0]), part.__dict__)  # two names at least, so that it returns a tuple
            for part in watched
            if (names := [attribute for attribute, _ in _attributes(part)])
        ]
        hooks = [hooks for _, part in modules for hooks in (part._forward_pre_hooks, part._forward_hooks)]
        members = [values for _, part in modules for values in (part._modules, part._buffers)]
        self._dictionaries = [*hooks, *members, *(part.__dict__ for part in watched)]
        self._lengths = list(map(len, self._dictionaries))
        values = self._current_values()
        self._ids = list(map(id, values))
        # Tensors are not kept alive. The address of a simple value must not be used again.
        self._simple_values = [value for value in values if type(value) in SIMPLE]
        self._contents = [array.tobytes() for array in self.arrays]

    def is_current(self) -> bool:
        """Whether no attribute has been replaced since.

        Identities are compared, which takes a fraction of a millisecond.
        """
        if list(map(len, self._dictionaries)) != self._lengths:
            return False
        if list(map(id, self._current_values())) != self._ids:
            return False
        return all(array.tobytes() == before for array, before in zip(self.arrays, self._contents, strict=True))

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor was among the values."""
        return id(tensor) in self._ids

    def _current_values(self) -> list[object]:
        values: list[object] = []
        for get, attributes in self._attributes:
            values += get(attributes)
        for dictionary in (*self._children, *self._buffers):
            values += dictionary.values()
        for container in self.containers.values():
            values += container.values() if isinstance(container, dict) else container
        values += [get() for get in self.getters.values()]
        return values

    def note_unseen(self, value: object) -> Hashable:
        self.unseen.append(f"{type(value).__module__}.{type(value).__name__} in {self.place}")
        return str(type(value))

    def _watch_class(self, cls: type) -> None:
        """Describe simple attributes of a class, and the global variables that its methods use."""
        for base in cls.__mro__:
            key = f"class {base.__module__}.{base.__qualname__}"
            if base.__module__.partition(".")[0] in LIBRARIES or key in self.described:
                continue
            parts: list[Hashable] = []
            for name, value in vars(base).items():
                if type(value) in SIMPLE and not name.startswith("__"):
                    self.getters[key, name] = functools.partial(getattr, base, name, None)
                    parts.append((name, value))
                elif isinstance(value, types.FunctionType):
                    parts += self.describe_globals(value)
            self.described[key] = tuple(parts)


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    """The attributes of a module, without those that PyTorch manages."""
    return [(name, value) for name, value in vars(module).items() if name not in _INTERNAL]
