"""Multiplication by blockwise Hadamard matrices, which spreads the outliers of a row over its block.

An orthogonal matrix R between two factors cancels, g W = (g R) (R^T W), so that the product stays the same while an
outlier takes less of the range of a number format from the other values of its row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.walsh import walsh_functions
from ..bounded import BoundedCache
from ..instructions import product_dtype


def rotate(matrix: Tensor, size: int) -> Tensor:
    """Multiply blocks of columns by a symmetric orthogonal Hadamard matrix; (M, K) -> (M, K), where `size` divides K.

    The result has the dtype of the matrix, or float32 if the device has no instructions for products in that dtype.
    """
    matrix = matrix.to(product_dtype(matrix.dtype, matrix.device))
    return (matrix.reshape(-1, size) @ _hadamard(size, matrix.dtype, matrix.device)).view_as(matrix)


def fitting_size(size: int, features: int) -> int:
    """The largest power of two that is at most `size` and divides the features; 1 or 0: no rotation."""
    while size > 1 and features % size:
        size //= 2
    return size


def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not torch.compiler.is_compiling():
        return _cached_hadamard(size, dtype, device)
    matrix = torch.ones(1, 1, dtype=dtype, device=device)  # in PyTorch, since the compiler does not trace NumPy here
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    sign_changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[sign_changes.argsort()] * size**-0.5


_hadamards: BoundedCache[tuple, Tensor] = BoundedCache(64)


def _cached_hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (size, dtype, device)
    matrix = _hadamards.get(key)
    if matrix is None:
        matrix = torch.from_numpy(walsh_functions(size) * size**-0.5).to(device, dtype)
        if type(matrix) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
            return matrix
        _hadamards[key] = matrix
    return matrix
