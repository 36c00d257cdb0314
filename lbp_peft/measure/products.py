"""Counts the multiply-adds of a training step while it runs, by the same rules for all methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class MultiplyAdds:
    """The multiply-adds of matrix products in any precision, convolutions and fused attention within a block."""

    total: int = 0


@contextmanager
def multiply_adds() -> Iterator[MultiplyAdds]:
    """Count the multiply-adds of the block with PyTorch's own FLOP counter, at two FLOPs each.

    Some formulas of the counter are corrected or added: for grouped convolutions, products in int8, products that are
    added in place, and the fused attention of CPUs.

    Yields:
        [`MultiplyAdds`], complete when the block ends.

    Example:
        >>> with multiply_adds() as backward:
        ...     loss.backward()
        >>> print(f"{backward.total / 1e9:.1f} G")
    """
    result = MultiplyAdds()
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        yield result
    result.total = counter.get_total_flops() // 2


def _flops_of_product(left: torch.Size, right: torch.Size, *args: object, **kwargs: object) -> int:
    """The FLOPs of a product (M, K) x (K, N)."""
    return 2 * math.prod(left) * right[1]


def _flops_of_addmm_(to: torch.Size, left: torch.Size, right: torch.Size, *args: object, **kwargs: object) -> int:
    return _flops_of_product(left, right)


def _flops_of_convolution_backward(
    grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: object
) -> int:
    """Count the multiply-adds of the forward pass for each gradient.

    PyTorch's own formula ignores groups in the gradient of the weight: its result for a depthwise convolution of C
    channels is C times too large.
    """
    *_, transposed, _, _, output_mask = args
    pixels = math.prod((x_shape if transposed else grad_shape)[2:])
    return 2 * x_shape[0] * pixels * math.prod(weight_shape) * sum(output_mask[:2])


def _flops_of_attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **kwargs: object) -> int:
    """The FLOPs of q k^T and softmax(q k^T) v, of shapes (N, heads, L, d), (N, heads, M, d) and (N, heads, M, e).

    A causal mask saves nothing, as in PyTorch's formulas for other kinds of fused attention.
    """
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _flops_of_attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **kwargs: object
) -> int:
    """Count two products for each of the forward pass, and q k^T again, since it was not saved."""
    scores = math.prod(query[:-1]) * key[-2]
    return 2 * _flops_of_attention(query, key, value) + 2 * scores * query[-1]


_FORMULAS = {
    torch.ops.aten._int_mm: _flops_of_product,
    torch.ops.aten.addmm_: _flops_of_addmm_,
    torch.ops.aten.convolution_backward: _flops_of_convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flops_of_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flops_of_attention_backward,
}
