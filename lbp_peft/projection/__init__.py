"""Project the tokens of layers on a basis, and lift coefficients to tokens."""

from .base import Projection
from .dense import DenseProjection
from .factory import Float32Projection, num_kept, projection, with_dtype
from .separable import SeparableProjection

__all__ = [
    "DenseProjection",
    "Float32Projection",
    "Projection",
    "SeparableProjection",
    "num_kept",
    "projection",
    "with_dtype",
]
