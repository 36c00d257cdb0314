"""Runs a copy of a model on tensors that have shapes but no values, which takes little memory and time."""

from __future__ import annotations

import copy
import gc
import logging
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FunctionType, MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from ..measure.running import restore_random_state
from .contents import MOST_VALUES
from .operation_names import FINITENESS, name_of

# Packages whose forward hooks may run in a copy: they do nothing but collect outputs for the model itself.
_HOOKS_OF = ("torch", "transformers", "timm", "peft")
_INTERNAL = frozenset(vars(nn.Module()))

# Errors of operations whose results depend on values that are not there.
NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)


class CannotBeCopiedError(Exception):
    """A pass of a copy of the model might have an effect on the model itself."""


class WithoutValues(FakeTensorMode):
    """A mode in which operations compute only the shapes of their results, if any of their inputs has no values.

    Other operations run as ever. So the results of operations on sizes, indices and masks, by which code decides what
    comes next, have values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._allow_unsafe_data_ptr_access = False  # what writes to a null pointer ends the process
        self._made: list[weakref.ref[Tensor]] = []

    @property
    def has_leaked(self) -> bool:
        """Whether tensors of a pass are still alive after the copy is gone, as those in a cache outside the model."""
        if any(made() is not None for made in self._made):
            gc.collect()
        return any(made() is not None for made in self._made)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context for a pass of a copy, in which tensors without values count as finite.

        Random numbers are the same in all passes, so that all processes see the same. There are no warnings. Enter it
        after other modes, which then need not see what this one does.
        """
        # Outside the pass, operations on its tensors together with others raise an error.
        self.allow_non_fake_inputs = True
        logger = logging.getLogger(fake_tensor.__name__)  # where errors are logged before they are raised
        was_disabled, logger.disabled = logger.disabled, True
        try:
            with restore_random_state(torch.device("cpu")), warnings.catch_warnings(), self, _AllFinite():
                warnings.simplefilter("ignore")
                random.seed(0)
                np.random.seed(0)
                torch.default_generator.manual_seed(0)
                yield
        finally:
            logger.disabled = was_disabled
            self.allow_non_fake_inputs = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[object] = (), kwargs: Mapping[str, object] = MappingProxyType({})
    ) -> Any:
        if FakeTensor not in types:
            return func(*args, **kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, FakeTensor):
                self._made.append(weakref.ref(made))
        return result

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without values, as if on the CPU."""
        made = FakeTensor(self, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))
        self._made.append(weakref.ref(made))
        return made

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor as if on the CPU, without values if it is on the meta device."""
        return self.tensor(tuple(tensor.shape), tensor.dtype) if tensor.is_meta else tensor

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A copy of a model whose parameters and large buffers have no values.

        Raises:
            CannotBeCopiedError: a pass of the copy might have an effect on the model itself.
        """
        if modules._global_forward_hooks or modules._global_forward_pre_hooks:
            raise CannotBeCopiedError("there are hooks on all modules")
        for module in model.modules():
            if "forward" in vars(module):  # it may refer to the module itself, not to its copy
                raise CannotBeCopiedError(f"the forward method of a {type(module).__name__} was replaced")
            if any(not _is_of_library(hook) for hook in _hooks_of(module)):
                raise CannotBeCopiedError(f"there are hooks on a {type(module).__name__}")
            for name, value in vars(module).items():
                if name not in _INTERNAL and (why := _why_not_copied(value)):
                    raise CannotBeCopiedError(f"the attribute {name} of a {type(module).__name__} holds {why}")
        memo: dict[int, Any] = {}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    memo[id(tensor)] = self._copy_of_tensor(tensor)
        with _CopiesWithoutValues(self._copy_of_tensor):
            return copy.deepcopy(model, memo)

    def _copy_of_tensor(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(self.tensor(tuple(tensor.shape), tensor.dtype), requires_grad=tensor.requires_grad)
        has_values = type(tensor) in (Tensor, nn.Buffer) and not tensor.is_meta and tensor.layout == torch.strided
        if has_values and tensor.numel() <= MOST_VALUES:
            return tensor.detach().cpu().clone()
        return self.tensor(tuple(tensor.shape), tensor.dtype)


class _CopiesWithoutValues(TorchFunctionMode):
    """Context in which `copy.deepcopy` of a tensor, such as one in a list, is what the given function returns."""

    def __init__(self, copy_of: Callable[[Tensor], Tensor]):
        super().__init__()
        self._copy_of = copy_of

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._copy_of(tensor)
        return memo[id(tensor)]


class _AllFinite(TorchFunctionMode):
    """Context in which tensors without values count as finite, as the tests for overflows in models expect them."""

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = name_of(function)
        if name in FINITENESS and args and isinstance(args[0], FakeTensor):
            return torch.tensor(name == "isfinite").expand(args[0].shape)
        return function(*args, **(kwargs or {}))


def _why_not_copied(value: object) -> str:
    """What an attribute holds that a copy would share with the model, or that takes much memory; "" if nothing."""
    if isinstance(value, weakref.ReferenceType):
        return "a weak reference"
    if isinstance(value, np.ndarray):
        return "a large array" if value.size > MOST_VALUES else ""
    if isinstance(value, FunctionType):
        return "a function that reads a module" if any(map(_holds_module, _closure_of(value))) else ""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return next((why for part in value if (why := _why_not_copied(part))), "")
    return ""


def _closure_of(function: FunctionType) -> Iterator[object]:
    """The values of the variables in a function's closure."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a variable without a value
            yield cell.cell_contents


def _holds_module(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, nn.Module) or (isinstance(value, (list, tuple)) and any(map(_holds_module, value)))


def _hooks_of(module: nn.Module) -> Iterator[object]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _is_of_library(hook: object) -> bool:
    package = (getattr(hook, "__module__", None) or "").partition(".")[0]
    return package in _HOOKS_OF
