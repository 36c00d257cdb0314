"""The products of a backward pass, in a number format.

An exact input gradient dx = g W is the largest product of a step whose weight gradients are low-rank. Rounding its
factors to few bits hardly changes its direction, as HLQ found (arXiv 2406.15102), and integer units are several times
faster. On a device without instructions for a format, the same rounded values are multiplied in float32: integers
exactly, and bfloat16 up to the order of summation. A format then saves no time, and costs little more than float32.

The weight gradient is a small product. Its factors are in bfloat16 if g W is in a format of fewer bits than its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..instructions import multiplies_bf16
from ..transforms import in_transform
from .full import product_of_one_dtype, without_autocast
from .hadamard import fitting_size
from .registry import number_format
from .weight_cache import Origin, origin, quantized_weight

AUTO = "auto"  # the format that [`lbp_peft.heuristics.Heuristics.fastest_precision`] chooses


@dataclass(frozen=True)
class Precision:
    """The number format of g W, with its settings.

    Attributes:
        name: The name of a registered format.
        hadamard_size: The number of columns of g that a Hadamard matrix mixes before quantization, a power of two; 0:
            none. If C_out is not a multiple of it, the largest smaller power of two that divides C_out is used. Formats
            that do not rotate ignore it.
    """

    name: str = "full"
    hadamard_size: int = 0

    def __post_init__(self) -> None:
        if self.name == "full":
            object.__setattr__(self, "hadamard_size", 0)  # so that all full precisions are equal to FULL


FULL = Precision()


def product(grad: Tensor, weight: Tensor, precision: Precision, source: Tensor | Origin | None = None) -> Tensor:
    """Compute g W in a precision.

    Args:
        grad: Shape (..., C_out), of any floating dtype.
        weight: Shape (C_out, C_in), of any floating dtype.
        precision: The number format.
        source: The parameter that `weight` is, or is a cast or a transpose of, or the origin of that parameter. A
            quantized copy of it may be kept for as long as it does not change, see [`lbp_peft.formats.weight_cache`].

    Returns:
        Shape (..., C_in), of the dtype of `grad`.

    Raises:
        ValueError: the device does not support the format.
    """
    if precision.name == "full":
        return product_of_one_dtype(grad, weight.to(grad.dtype))
    chosen = number_format(precision.name)
    check_supported(precision.name, grad.device)
    with without_autocast(grad.device):
        size = fitting_size(precision.hadamard_size, weight.shape[0]) if chosen.rotates else 0
        quantized = quantized_weight(chosen, weight, size, source)
        result = chosen.multiply(grad.reshape(-1, grad.shape[-1]), quantized, size)
        return result.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])


def check_supported(name: str, device: torch.device) -> None:
    """Raise ValueError if a device does not support a number format."""
    chosen = number_format(name)
    if not chosen.is_supported(device):
        raise ValueError(
            f'grad_input_dtype="{name}" needs {chosen.requirement}; this is {device}. Use "int8" or "auto".'
        )


def saved_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype in which the projection of an input of a dtype is saved for the weight gradient."""
    return torch.bfloat16 if precision.name != "full" and dtype == torch.float32 else dtype


def weight_grad(g_hat: Tensor, x_hat: Tensor) -> Tensor:
    """The gradient of a weight, (N, k, C_out), (N, k, C_in) -> (C_out, C_in), of the dtype of `g_hat`.

    x_hat may be of a narrower dtype. If products are faster in that dtype, `g_hat` is cast to it.
    """
    left, right = g_hat.flatten(0, 1), x_hat.flatten(0, 1)
    dtype = left.dtype
    if left.dtype != right.dtype and multiplies_bf16(g_hat.device):
        dtype = right.dtype
    columns = left.to(dtype).t()
    if columns.device.type == "cpu" and columns.dtype == torch.bfloat16 and len(columns) < right.shape[1]:
        columns = columns.contiguous()  # faster than a product with a transposed factor
    return product_of_one_dtype(columns, right.to(dtype)).to(g_hat.dtype)


def precision_now(precision: Precision) -> Precision:
    """The precision, or full precision within transforms of `torch.func`, which cannot trace rounded products."""
    return FULL if in_transform() else precision


def source_of_weight(weight: Tensor, parameter: Tensor | None, precision: Precision) -> Origin | None:
    """The origin of the parameter that a weight is, or is a cast of; None where no quantized copy of it is kept.

    None is kept of a trained parameter: the next step changes it, and the copy would take memory until then.
    """
    parameter = weight if parameter is None else parameter
    if precision.name == "full" or torch.compiler.is_compiling() or parameter.requires_grad:
        return None
    return origin(parameter)
