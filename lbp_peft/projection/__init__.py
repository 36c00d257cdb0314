"""Projections of tokens on a basis, which also lift coefficients to tokens."""

from .base import Float32Projection, Projection
from .dense import DenseProjection
from .factory import num_coefficients, projection
from .packed import PackedProjection
from .separable import SeparableProjection

__all__ = [
    "DenseProjection",
    "Float32Projection",
    "PackedProjection",
    "Projection",
    "SeparableProjection",
    "num_coefficients",
    "projection",
]
