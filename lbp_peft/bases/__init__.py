"""Bases: the functions over the patch grid that a backward pass keeps."""

from .base import Basis
from .basis_set import BasisSet
from .dense import DenseBasis
from .grids import LayoutError, TokenLayout
from .listed import ListedBasis

__all__ = ["Basis", "BasisSet", "DenseBasis", "LayoutError", "ListedBasis", "TokenLayout"]
