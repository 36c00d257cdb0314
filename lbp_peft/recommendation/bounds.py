"""The bounds that a user sets on memory, time and the quality of gradients."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

DEFAULT_MIN_COSINE = 0.85  # accuracy was clearly lower with lower cosines, see docs/choosing-settings.md
_BYTES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class BudgetError(ValueError):
    """No measured setting keeps within the bounds. The message gives the lowest possible value and its setting.

    Attributes:
        table: The measurements as text.
    """

    def __init__(self, message: str, table: str = ""):
        super().__init__(message)
        self.table = table


@dataclass(frozen=True)
class Bounds:
    """The bounds of a recommended setting; None: no bound.

    Attributes:
        memory: The peak in bytes; or, with `memory_is_relative`, a multiple of full fine-tuning's.
        step_time: The time of a step in seconds; or, with `step_time_is_relative`, a multiple of full fine-tuning's.
        min_cosine: The least cosine of the gradients with the exact ones; None: `DEFAULT_MIN_COSINE`.
    """

    memory: float | None = None
    memory_is_relative: bool = False
    step_time: float | None = None
    step_time_is_relative: bool = False
    min_cosine: float | None = None

    @classmethod
    def parse(
        cls, memory: str | float | None = None, step_time: str | float | None = None, min_cosine: float | None = None
    ) -> Bounds:
        """Read bounds as a user writes them.

        Args:
            memory: "6GiB", "800 MB", "0.6x" (of full fine-tuning), or a number of bytes. Text needs a unit.
            step_time: "0.8x" (of full fine-tuning), "900ms", "1.2s", or seconds.
            min_cosine: From 0 to 1.

        Raises:
            ValueError: one of them cannot be read.
        """
        if min_cosine is not None and not 0 <= min_cosine <= 1:
            raise ValueError(f"min_cosine must be from 0 to 1, got {min_cosine}.")
        size, is_share = (None, False) if memory is None else _memory(memory)
        time, is_ratio = (None, False) if step_time is None else _time(step_time)
        return cls(size, is_share, time, is_ratio, min_cosine)

    @property
    def least_cosine(self) -> float:
        """The bound of the cosine, or its default."""
        return DEFAULT_MIN_COSINE if self.min_cosine is None else self.min_cosine

    def max_bytes(self, full: float | None) -> float:
        """The bound of memory in bytes, given full fine-tuning's; infinite if there is none."""
        return _absolute(self.memory, self.memory_is_relative, full, "memory")

    def max_seconds(self, full: float | None) -> float:
        """The bound of the step time in seconds, given full fine-tuning's; infinite if there is none."""
        return _absolute(self.step_time, self.step_time_is_relative, full, "step_time")


def _absolute(bound: float | None, is_relative: bool, full: float | None, name: str) -> float:
    if bound is None:
        return math.inf
    if not is_relative:
        return bound
    if full is None:
        raise ValueError(
            f"{name} is relative to full fine-tuning, which could not be measured here. Give an absolute bound."
        )
    return bound * full


def _ratio(text: str) -> float | None:
    match = re.fullmatch(r"(\d*\.?\d+)\s*[xX]", text.strip())
    return float(match[1]) if match else None


def _memory(given: str | float) -> tuple[float, bool]:
    if not isinstance(given, str):
        return _positive(float(given), given, "memory"), False
    if (ratio := _ratio(given)) is not None:
        return _positive(ratio, given, "memory"), True
    match = re.fullmatch(r"(\d*\.?\d+)\s*([KMGT]I?B?|B)", given.strip().upper())
    if not match:
        raise ValueError(
            f"memory must be a size such as 6GiB or 800MB, or a share of full fine-tuning's, such as 0.6x, got "
            f"{given!r}."
        )
    return _positive(float(match[1]) * _BYTES[match[2].rstrip("B")], given, "memory"), False


def _time(given: str | float) -> tuple[float, bool]:
    if not isinstance(given, str):
        return _positive(float(given), given, "step_time"), False
    if (ratio := _ratio(given)) is not None:
        return _positive(ratio, given, "step_time"), True
    match = re.fullmatch(r"(\d*\.?\d+)\s*(ms|s)", given.strip())
    if not match:
        raise ValueError(
            f"step_time must be a share of full fine-tuning's such as 0.8x, or a time such as 900ms or 1.2s, got "
            f"{given!r}."
        )
    return _positive(float(match[1]) / (1000 if match[2] == "ms" else 1), given, "step_time"), False


def _positive(value: float, given: object, name: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {given!r}.")
    return value
