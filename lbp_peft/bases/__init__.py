"""Bases of the small space: which functions over the patch grid a backward pass keeps."""

from .basis_set import BasisSet, LayoutError, TokenLayout

__all__ = ["BasisSet", "LayoutError", "TokenLayout"]
