"""Activation functions that save their derivative in 4 bits, see [`lbp_peft.formats.derivatives`].

The forward pass is exact. The backward pass multiplies by the saved derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats.derivatives import DerivativeTable
from ..transforms import backward_pass
from .checkpointing import empty, saved_tensors_are_discarded
from .kept import keep
from .once_differentiable import once_differentiable


def elementwise_function(function: Callable[[Tensor], Tensor], x: Tensor, table: DerivativeTable) -> Tensor:
    """`function(x)`, bit for bit, which saves its derivative in 4 bits.

    Args:
        function: An elementwise, deterministic function without tensors of its own.
        x: Any shape and floating dtype.
        table: The table of the function's derivative.

    Returns:
        The shape and dtype of `function(x)`.

    Raises:
        RuntimeError: in the backward pass, if it is differentiated again.
    """
    return _Elementwise.apply(function, table, x)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], table: DerivativeTable, x: Tensor) -> Tensor:
        ctx.table, ctx.dtype = table, x.dtype
        # The first pass of gradient checkpointing discards what is saved.
        is_discarded = saved_tensors_are_discarded()
        ctx.save_for_backward(empty(x, table.packed_shape(x), torch.uint8) if is_discarded else keep(table.pack(x)))
        return function(x).detach()  # an alias, since the function may return x itself

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        (packed,) = ctx.saved_tensors
        with backward_pass():
            gradient = ctx.table.times_derivative(grads[0], packed).to(ctx.dtype)
        return None, None, *(once_differentiable([gradient], grads[0]) if second_order else [gradient])
