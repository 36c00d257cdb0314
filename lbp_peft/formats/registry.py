"""The number formats by name. To add a format, write a subclass of [`NumberFormat`] and register it here."""

from __future__ import annotations

from typing import Literal

from .base import NumberFormat
from .bf16 import BFloat16
from .fp8 import Float8
from .full import FullPrecision
from .int8 import Int8

FormatName = Literal["full", "bf16", "int8", "fp8"]
FORMATS: dict[str, NumberFormat] = {one.name: one for one in (FullPrecision(), BFloat16(), Int8(), Float8())}


def number_format(name: str) -> NumberFormat:
    """A registered format.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FORMATS:
        raise ValueError(f"Unknown number format {name!r}, choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def register_format(new_format: NumberFormat) -> None:
    """Register a format, so that `grad_input_dtype` can be its name.

    Raises:
        ValueError: another format has its name.
    """
    if FORMATS.setdefault(new_format.name, new_format) is not new_format:
        raise ValueError(f"There is a number format {new_format.name!r} already.")
