"""One call of an operation of PyTorch, as the tracer sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .contents import version_of
from .operation_names import name_of


class OperationCall:
    """One call of an operation, and the tensors among its arguments as they were before it.

    Attributes:
        name: The operation's name, see [`lbp_peft.layout.operation_names.name_of`].
        args, kwargs: Its arguments.
        tensors: The tensors among them.
    """

    def __init__(self, function: Callable[..., object], args: tuple, kwargs: dict[str, object]):
        self._function, self.args, self.kwargs = function, args, kwargs
        self.name = name_of(function)
        self.tensors = list(tensors_in((args, kwargs)))
        self._versions = [version_of(tensor) for tensor in self.tensors]

    def run(self) -> Any:
        """Run the operation, and return what it returns."""
        return self._function(*self.args, **self.kwargs)

    def changed_tensors(self) -> list[Tensor]:
        """The tensors among the arguments that have been written to since."""
        return [t for t, version in zip(self.tensors, self._versions, strict=True) if version_of(t) != version]


def tensors_in(values: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
