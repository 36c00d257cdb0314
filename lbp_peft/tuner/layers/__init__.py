"""Layers with LBP-WHT adapters. Importing a module of this package registers its type of layers."""

from . import conv1d, conv1x1, linear

__all__ = ["conv1d", "conv1x1", "linear"]
