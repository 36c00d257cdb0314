"""The weight of a layer with low-rank updates beside it, summed: y = x (W + s B A)^T is one product.

LoRA (arXiv 2106.09685) computes y = x W^T + s (x A^T) B^T. The two small products and the addition read and write the
layer's output several times, which takes a tenth of a layer's forward pass or more. To sum the matrices first takes
r C_in C_out multiply-adds, whatever the number of tokens. RunLoRA (arXiv 2312.03415) chooses between such ways by their
cost, and so does [`lbp_peft.heuristics.Heuristics.sum_weights`]. The sum is not kept: the backward pass makes it again.

The sum is computed in float32 or float64. Under autocast it is rounded once, as the weight alone would be. If the
weight itself has 16 bits, nothing is summed, since small updates would be lost in the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import heuristics
from ..formats.full import without_autocast
from ..transforms import in_dispatch_mode, in_transform, must_be_functional

# Elements of the sum that are rounded at once: 1 MiB in float32, which stays in the cache.
_ELEMENTS_AT_ONCE = 2**18
# A sum of at most so many elements is rounded as a whole: fewer calls save more time there than the cache does.
_ELEMENTS_OF_SMALL_SUM = 2**20


def summed_weight(weight: Tensor, factors: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """W + s_1 B_1 A_1 + s_2 B_2 A_2 + ..., rounded to a dtype once.

    Args:
        weight: W, shape (C_out, C_in), float32 or float64.
        factors: A_1, B_1, A_2, B_2, ..., shapes (r, C_in) and (C_out, r), of any floating dtype.
        scalings: s_1, s_2, ...
        dtype: The dtype of the result.
    """
    with without_autocast(weight.device):
        if factors and dtype.itemsize < 4 and _can_sum_by_parts(weight):
            return _rounded_sum(weight, factors, scalings, dtype)
        for down, up, scaling in zip(factors[::2], factors[1::2], scalings, strict=True):
            weight = torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scaling)
        return weight.to(dtype)


def _can_sum_by_parts(weight: Tensor) -> bool:
    """Whether parts of the sum can be written one after another. Dispatch modes may keep them, and FSDP has shards."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() > _ELEMENTS_OF_SMALL_SUM
    return plain and weight.device.type == "cpu" and not must_be_functional() and not in_dispatch_mode()


@torch.no_grad()
def _rounded_sum(weight: Tensor, factors: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """[`summed_weight`], some rows at a time, so that the sum is rounded while it is still in the cache."""
    rounded = weight.new_empty(weight.shape, dtype=dtype)
    wide = [factor.to(weight.dtype) for factor in factors]
    num_rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    sums = weight.new_empty(min(num_rows, len(weight)), weight.shape[1])
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        part = weight[rows]
        for down, up, scaling in zip(wide[::2], wide[1::2], scalings, strict=True):
            part = torch.addmm(part, up[rows], down, alpha=scaling, out=sums[: len(part)])
        rounded[rows].copy_(part)
    return rounded


@torch.library.custom_op("lbp_peft::weight_in_backward", mutates_args=())
def _weight_in_backward(weight: Tensor, factors: Sequence[Tensor], scalings: Sequence[float], grad: Tensor) -> Tensor:
    summed = summed_weight(weight, factors, scalings, grad.dtype)
    return summed.clone() if summed is weight else summed  # an operation must not return its argument


@_weight_in_backward.register_fake
def _(weight: Tensor, factors: Sequence[Tensor], scalings: Sequence[float], grad: Tensor) -> Tensor:
    return grad.new_empty(weight.shape)


def weight_in_backward(weight: Tensor, factors: Sequence[Tensor], scalings: Sequence[float], grad: Tensor) -> Tensor:
    """[`summed_weight`] of the dtype of a gradient, made in the backward pass; without factors W itself, of any shape.

    `torch.compile` would keep the sum of the forward pass, as large as the weight, or the weight's copy in 16 bits,
    because it expects to save time by that. An operation that it does not know and that reads a gradient has to wait
    for the backward pass.
    """
    if torch.compiler.is_compiling() and (factors or weight.dtype != grad.dtype):
        return _weight_in_backward(weight, list(factors), list(scalings), grad)
    return summed_weight(weight, factors, scalings, grad.dtype)


def should_sum(x: Tensor, weight: Tensor, factors: Sequence[Tensor], num_rows: int) -> bool:
    """Whether the forward pass of a layer with low-rank updates should be one product.

    Args:
        x: The input, shape (..., C_in).
        weight: Shape (C_out, C_in), as the forward pass gets it. A parameter may still have to be cast.
        factors: See [`summed_weight`].
        num_rows: M, of the input (M, C_in).
    """
    plain = (Tensor, nn.Parameter)  # others, such as quantized weights or shards, may not be added to
    if not factors or in_transform() or not all(type(tensor) in plain for tensor in (x, weight, *factors)):
        return False
    return weight.dtype.itemsize >= 4 and heuristics.active().sum_weights(num_rows, *weight.shape)
