"""Finds the parts of a model that add what their layers compute to their own input, as the blocks of an encoder do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .operation_names import name_of

_ADDING = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_NORMALISING = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "dropout"})


class ResidualParts(TorchFunctionMode):
    """Context in which the parts of a model that have a residual connection around their layers are noted.

    Such a part returns its input plus other tensors of the same shape, perhaps normalised (pre-norm and post-norm).

    Args:
        model: The model.
        parts: The names of the modules to watch.

    Attributes:
        found: The names of those that returned such a sum in all their calls so far.
    """

    def __init__(self, model: nn.Module, parts: Iterable[str]):
        super().__init__()
        self._model = model
        self._parts = list(parts)
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._count = 0
        # The numbers of the tensors that a tensor is the sum of.
        self._terms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._sums: dict[str, bool] = {}
        self._hooks = ExitStack()

    @property
    def found(self) -> set[str]:
        return {name for name, is_sum in self._sums.items() if is_sum}

    def __enter__(self) -> ResidualParts:
        for name in self._parts:
            part = self._model.get_submodule(name)
            given: list[int | None] = []  # in calls that have not returned yet
            before, after = partial(self._note_input, given), partial(self._note_output, name, given)
            self._hooks.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._hooks.callback(part.register_forward_hook(after).remove)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.close()
        super().__exit__(*args)

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = name_of(function)
        if not isinstance(result, Tensor):
            return result
        if name in _ADDING:
            terms: frozenset[int] = frozenset()
            for term in args[:2]:
                if isinstance(term, Tensor) and term.shape == result.shape:
                    terms |= self._terms.get(term, frozenset()) | {self._number(term)}
            self._terms[result] = terms
        elif name in _NORMALISING and args and args[0] in self._terms:
            self._terms[result] = self._terms[args[0]]
        return result

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = self._count
            self._count += 1
        return self._numbers[tensor]

    def _note_input(self, given: list[int | None], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        given.append(None if first is None else self._number(first))

    def _note_output(self, name: str, given: list[int | None], module: nn.Module, args: tuple, output: Any) -> None:
        number = given.pop() if given else None
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        is_sum = isinstance(output, Tensor) and number in self._terms.get(output, ())
        self._sums[name] = is_sum and self._sums.get(name, True)
