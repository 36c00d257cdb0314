"""Tables for the terminal."""

from __future__ import annotations

from common.tables import aligned

__all__ = ["aligned", "number"]


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
