"""The registry of the types of layers that LBP-WHT adapts. Each of them multiplies every token by one matrix.

The class that adapts layers of a type registers it. All code that finds, checks or adapts layers, or stacks on them,
reads this registry. To add a type, write a file with such a class, and import it in
`lbp_peft/tuner/layers/__init__.py`, or in your own code before a model is adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
_AdaptingClass = TypeVar("_AdaptingClass", bound=type)


@dataclass(frozen=True)
class LayerType:
    """A type of layers.

    Attributes:
        description: The layers' classes, and the settings that they need, for messages.
        matches: Whether a module is such a layer. At most one type may match a module.
        adapting_class: The class of the layers that replace these when they are adapted.
        channels_axis: The axis of the features in the layers' input: -1 for (N, ..., C), 1 for (N, C, ...).
    """

    description: str
    matches: Callable[[nn.Module], bool]
    adapting_class: type[nn.Module]
    channels_axis: int = -1


_LAYER_TYPES: list[LayerType] = []


def register_layer_type(
    description: str, matches: Callable[[nn.Module], bool], channels_axis: int = -1
) -> Callable[[_AdaptingClass], _AdaptingClass]:
    """Register a type of layers, as a decorator of the class whose layers replace these when they are adapted.

    That class derives from [`lbp_peft.LBPWHTLinear`] and overrides what differs from `nn.Linear`: `_num_features`
    (C_in, C_out of a layer), `_multiply` (the forward pass with a given weight and bias), `_multiply_low_rank` (the
    same with a low-rank backward pass) and, where the features are not the last axis, `_shape_of_tokens` and
    `_check_layout`. The type becomes its attribute `layer_type`.

    Args:
        description: See [`LayerType`].
        matches: See [`LayerType`].
        channels_axis: See [`LayerType`].
    """

    def register(cls: _AdaptingClass) -> _AdaptingClass:
        cls.layer_type = LayerType(description, matches, cls, channels_axis)  # type: ignore[attr-defined]
        _LAYER_TYPES.append(cls.layer_type)  # type: ignore[attr-defined]
        return cls

    return register


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The type of a layer; None if LBP-WHT does not adapt it."""
    for layer_type in _LAYER_TYPES:  # a loop, which torch.compile can trace
        if layer_type.matches(module):
            return layer_type
    return None


def described_layer_types() -> str:
    """All types in words, as in "torch.nn.Linear, and transformers' Conv1D"."""
    *others, last = (layer_type.description for layer_type in _LAYER_TYPES)
    return ", ".join([*others, f"and {last}"]) if others else last


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module. If LBP-WHT has patched its forward method, this is the class that it had before."""
    cls: type[nn.Module] = getattr(type(module), "plain_class", type(module))
    return cls


def runs_forward_of(module: nn.Module, *classes: type[_Module]) -> TypeGuard[_Module]:
    """Whether a module is of one of these classes, or of a subclass of it that does not override its forward method."""
    return isinstance(module, classes) and plain_class_of(module).forward in [plain.forward for plain in classes]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b the way `nn.Linear` does."""
    # This is `plain_class_of`, written out, since every call of a layer needs it.
    cls = getattr(type(module), "plain_class", type(module))
    return isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward
