"""Old names of settings of `LBPWHTConfig`, which still work in version 0.1 and will not in 0.2.

`grad_input` was a rank, a number format or a pair of both; these are two settings now, `grad_input_rank` and
`grad_input_dtype`. `rotation` is `hadamard_size`. To remove the old names, delete this module and its decorator.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from numbers import Integral
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .validation.patterns import show

if TYPE_CHECKING:
    from .config import LBPWHTConfig

_Class = TypeVar("_Class", bound=type)
# Packages through which a user's call or file reaches the configuration: a warning points at their caller.
_INTERMEDIATE = ("lbp_peft", "peft", "transformers", "dataclasses")


class _OldName(NamedTuple):
    """How a setting is read and written under its old name.

    Attributes:
        convert: From the old value to the new settings.
        restore: From a configuration to the old value.
    """

    convert: Callable[[object], dict[str, object]]
    restore: Callable[[LBPWHTConfig], object]


def _split(grad_input: object) -> dict[str, object]:
    if isinstance(grad_input, str):
        return {"grad_input_rank": None, "grad_input_dtype": grad_input}
    if isinstance(grad_input, Integral) and not isinstance(grad_input, bool):
        return {"grad_input_rank": grad_input, "grad_input_dtype": "auto"}
    if isinstance(grad_input, (list, tuple)) and len(grad_input) == 2:
        return {"grad_input_rank": grad_input[0], "grad_input_dtype": grad_input[1]}
    raise ValueError(
        f"grad_input is an old name of grad_input_rank and grad_input_dtype. It must be a rank, a number format or a "
        f"pair of both, got {show(grad_input)}."
    )


def _join(config: LBPWHTConfig) -> object:
    rank, dtype = config.grad_input_rank, config.grad_input_dtype
    if rank is None:
        return dtype
    return rank if dtype in ("auto", "full") else (rank, dtype)


_OLD_NAMES = {
    "grad_input": _OldName(_split, _join),
    "rotation": _OldName(lambda size: {"hadamard_size": size}, lambda config: config.hadamard_size),
}


def accept_old_names(cls: _Class) -> _Class:
    """Decorate a configuration class such that the old names work as arguments and as attributes.

    Each use gives one DeprecationWarning, which names the new spelling. `to_dict` and saved files have only the new
    names.
    """
    generated: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(generated)
    def initialize(self: Any, *args: Any, **settings: Any) -> None:
        old = {name: settings.pop(name) for name in _OLD_NAMES if name in settings}
        new: dict[str, object] = {}
        for name, value in old.items():
            converted = _OLD_NAMES[name].convert(value)
            if doubled := sorted(converted.keys() & _given(settings, sys._getframe(1))):
                raise ValueError(
                    f"{name} is an old name of {' and '.join(converted)}, and {' and '.join(doubled)} is given too. "
                    "Give only the new."
                )
            new |= converted
        generated(self, *args, **(settings | new))
        if old:
            warn_of_deprecation(_in_words(list(old), new))

    # PEFT reads the names of arguments that it may pass from the signature.
    parameters = list(inspect.signature(generated).parameters.values())
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _OLD_NAMES]
    initialize.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    cls.__init__ = initialize  # type: ignore[misc]
    for name, old_name in _OLD_NAMES.items():
        setattr(cls, name, _attribute(name, old_name))
    return cls


def _given(settings: dict[str, object], caller: FrameType) -> set[str]:
    """The settings that the user gave. `dataclasses.replace` passes the values of the original for all others."""
    if caller.f_globals.get("__name__") != "dataclasses":
        return set(settings)
    original = caller.f_locals.get("obj", caller.f_locals.get("self"))
    if not is_dataclass(original):
        return set()
    return {name for name, value in settings.items() if value is not getattr(original, name, None)}


def _attribute(name: str, old_name: _OldName) -> property:
    def read(config: LBPWHTConfig) -> object:
        value = old_name.restore(config)
        warn_of_deprecation(_in_words([name], old_name.convert(value)))
        return value

    def write(config: LBPWHTConfig, value: object) -> None:
        new = old_name.convert(value)
        for setting, converted in new.items():
            setattr(config, setting, converted)
        warn_of_deprecation(_in_words([name], new))

    return property(read, write)


def _in_words(old: list[str], new: dict[str, object]) -> str:
    # A default need not be written.
    needed = {name: value for name, value in new.items() if value is not None and (value != "auto" or len(new) == 1)}
    spelled = ", ".join(f"{name}={show(value)}" for name, value in (needed or new).items())
    return f"LBPWHTConfig: {' and '.join(old)} will not work in lbp-peft 0.2. Write {spelled} instead."


def warn_of_deprecation(message: str) -> None:
    """Give a DeprecationWarning at the line of the first caller outside of lbp_peft, PEFT and transformers."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERMEDIATE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)
