"""Activation functions and norms that save their input in 8 bits.

Once linear layers save projections, these inputs are most of the saved activations. The forward pass is exact. The
backward pass runs the module again on the rounded input and differentiates it there, so nothing else that the module
would have saved is saved either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.in_groups import dequantize_groups
from ..transforms import backward_pass
from .kept import keep_quantized
from .layer_state import LayerRecord, same_autocast, to_save
from .once_differentiable import once_differentiable


def compressed_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, bit for bit, which saves x in 8 bits for the backward pass.

    Args:
        layer: An activation function or a norm that is deterministic. It is run again in the backward pass, in its
            state of the forward pass, see [`lbp_peft.ops.layer_state`].
        x: Shape (..., C), of any floating dtype.

    Returns:
        The shape and dtype of `layer(x)`.

    Raises:
        RuntimeError: in the backward pass, if it is differentiated again.
    """
    record = LayerRecord(layer)
    tensors = record.take_tensors()
    return _CompressedLayer.apply(_State(record, x.dtype, same_autocast(x.device.type)), x, *tensors)


@dataclass(frozen=True)
class _State:
    """Non-tensor state saved for backward."""

    layer: LayerRecord
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager]


class _CompressedLayer(torch.autograd.Function):
    @staticmethod
    def forward(state: _State, x: Tensor, *held: Tensor) -> Tensor:
        return state.layer.layer(x).detach()  # autograd refuses to change a view in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.state, x, *held = inputs
        ctx.save_for_backward(*keep_quantized(x), *to_save(held))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        state, second_order = ctx.state, torch.is_grad_enabled()
        values, scales, *held = ctx.saved_tensors
        x = dequantize_groups(values, scales, state.dtype)
        _, needs_x, *trained = ctx.needs_input_grad
        with backward_pass(), torch.enable_grad(), state.autocast():
            x.requires_grad_(needs_x)
            leaves = state.layer.leaves(held, trained)
            seen = x.view_as(x)  # hooks on modules, such as those of FLOP counters, cannot handle a leaf here
            with state.layer.put_back(leaves):
                y = state.layer.layer(seen)
            wanted = [t for t, needed in zip((x, *leaves), (needs_x, *trained), strict=True) if needed]
            computed = iter(torch.autograd.grad(y, wanted, grads[0].to(y.dtype), allow_unused=True))
        gradients = [next(computed) if needed else None for needed in (needs_x, *trained)]
        return None, *(once_differentiable(gradients, grads[0]) if second_order else gradients)
