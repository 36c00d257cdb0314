"""The interface of number formats, and the base class of formats of 8 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from .hadamard import rotate
from .scaling import RANGES, largest_magnitude, scaled_to_range


@dataclass(frozen=True)
class Quantized:
    """A tensor in a number format: values, and the scales that they are to be multiplied by.

    Attributes:
        values: The tensor's shape, of the dtype of the format.
        scales: Float32, of size 1 along the dimension that shares a scale: for a matrix (M, K), shape (M, 1) with one
            scale per row, or (1, K) with one per column. None: the format has no scales.
    """

    values: Tensor
    scales: Tensor | None = None


class NumberFormat(ABC):
    """A number format for the product g W of an input gradient and for tensors saved for the backward pass.

    Formats have no state. One instance of each is registered in [`lbp_peft.formats.registry`].

    Attributes:
        name: The value of `grad_input_dtype` that selects it.
        rotates: Whether a Hadamard matrix can be applied before quantization (`hadamard_size`).
        requirement: The hardware that it needs, for messages.
    """

    name: str
    rotates = False
    requirement = ""

    @abstractmethod
    def quantize(self, tensor: Tensor, dim: int) -> Quantized:
        """Round a floating-point tensor to the format, with one scale for all values along `dim`."""

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """The inverse of [`quantize`], up to rounding, in a floating dtype."""
        values, scales = quantized.values, quantized.scales
        return values.to(dtype) if scales is None else (values.float() * scales).to(dtype)

    def quantize_weight(self, weight: Tensor, hadamard_size: int) -> Quantized:
        """Quantize a weight (C_out, C_in), with one scale per column, after mixing blocks of its rows.

        Args:
            weight: The weight, of any floating dtype.
            hadamard_size: The number of rows that a Hadamard matrix mixes, a divisor of C_out; 0 or 1: none.
        """
        if hadamard_size > 1:
            weight = rotate(weight.t(), hadamard_size).t()
        return self.quantize(weight, dim=0)

    @abstractmethod
    def multiply(self, g: Tensor, weight: Quantized, hadamard_size: int) -> Tensor:
        """Compute g W. It is called outside autocast.

        Args:
            g: Shape (M, C_out), of any floating dtype.
            weight: The result of [`quantize_weight`], shape (C_out, C_in).
            hadamard_size: The size that the weight was quantized with.

        Returns:
            Shape (M, C_in), of any floating dtype.
        """

    def is_supported(self, device: torch.device) -> bool:
        """Whether a device can compute products in this format, fast or not."""
        return True

    def caches_weight(self, device: torch.device) -> bool:
        """Whether to keep the quantized copy of a parameter for as long as it does not change."""
        return False

    def is_faster(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether products can be faster than those of g in its own dtype, for layers that are wide enough."""
        return False

    def cost(
        self, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> float | None:
        """The time of g W, quantization included, per multiply-add, in units of a multiply-add of float32.

        Args:
            rows: M, of g (M, C_out).
            out_features, in_features: C_out and C_in.
            dtype: The dtype of g.
            device: The device of g.

        Returns:
            None if `grad_input_dtype="auto"` must not choose the format: it was not measured, or would lose precision.
        """
        return None


class EightBitFormat(NumberFormat):
    """A format of 8 bits with scales in float32: the largest magnitude along a dimension becomes its largest number.

    Attributes:
        dtype: The dtype of the values, int8 or float8_e4m3fn.
    """

    dtype: torch.dtype
    rotates = True

    def quantize(self, tensor: Tensor, dim: int) -> Quantized:
        """Quantize in such a way that rounding does not depend on the scale of the tensor.

        Multiplying the tensor by a power of two leaves the values the same, down to the smallest normal number of
        float32.
        """
        largest = largest_magnitude(tensor, dim)
        return Quantized(self._to_dtype(scaled_to_range(tensor, largest, self.dtype)), self._scales(largest))

    def _scales(self, largest: Tensor) -> Tensor:
        return largest / RANGES[self.dtype].largest

    def _to_dtype(self, scaled: Tensor) -> Tensor:
        """Round values that are scaled to the range of the dtype. It may change its argument in place."""
        return scaled.to(self.dtype)

    def quantize_rows(self, rows: Tensor, hadamard_size: int) -> Quantized:
        """Mix blocks of the columns of a matrix (M, K) by a Hadamard matrix, and quantize with one scale per row."""
        if kernels.IN_USE and kernels.serve_rows(rows, hadamard_size):
            return Quantized(*kernels.quantize_rows(rows, hadamard_size, self.dtype))
        return self.quantize(rotate(rows, hadamard_size) if hadamard_size > 1 else rows, dim=1)

    def multiply(self, g: Tensor, weight: Quantized, hadamard_size: int) -> Tensor:
        return self.multiply_quantized(self.quantize_rows(g, hadamard_size), weight)

    @abstractmethod
    def multiply_quantized(self, left: Quantized, right: Quantized) -> Tensor:
        """Multiply (M, K) with one scale per row by (K, N) with one per column -> (M, N)."""

    def caches_weight(self, device: torch.device) -> bool:
        return device.type == "cpu"  # elsewhere, waiting for a fingerprint takes longer than quantizing again


def edges(rows: int, out_features: int, in_features: int) -> float:
    """The elements of the factors and of the result of g W per multiply-add, to which quantization time is
    proportional."""
    return 1 / max(rows, 1) + 1 / out_features + 1 / in_features
