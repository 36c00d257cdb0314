"""Finds where the tokens of a layer's input lie, by following them from the model's input through every operation."""

from .finder import NOT_TRACED, GridMismatchError, LayoutFinder, LayoutRecord, given_layout

__all__ = ["NOT_TRACED", "GridMismatchError", "LayoutFinder", "LayoutRecord", "given_layout"]
