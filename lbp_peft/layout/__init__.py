"""Where the tokens of a layer's input lie, followed from the model's input through every operation."""

from .finder import GridMismatchError, LayoutFinder, LayoutRecord, given_layout

__all__ = ["GridMismatchError", "LayoutFinder", "LayoutRecord", "given_layout"]
