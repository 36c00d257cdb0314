"""Finds where the tokens of a layer's input lie, by following them from the model's input through every operation."""

from .finder import LayoutFinder
from .given import GridMismatchError, given_layout
from .records import NOT_TRACED, LayoutRecord

__all__ = ["NOT_TRACED", "GridMismatchError", "LayoutFinder", "LayoutRecord", "given_layout"]
