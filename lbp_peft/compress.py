"""Inputs of activation functions and norms, kept in 8 bits for the backward pass.

What is left of the saved activations once linear layers keep projections is mostly these. The forward pass is exact.
The backward pass runs the module again on the rounded input and differentiates it there, so whatever else the module
would have saved is not saved either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .lowrank import once_differentiable
from .precision import largest_magnitude, scaled_to_range
from .tokenwise import autocast_now

# One scale for so many neighbouring channels: a few outlying channels then cost the others nothing.
_GROUP = 64


def rounded_in_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) -> int8 values (..., C), and float32 scales (..., C / 64), or (..., 1) where 64 does not divide C."""
    grouped = x.unflatten(-1, (-1, _group(x.shape[-1])))
    largest = largest_magnitude(grouped, dim=-1)
    values = scaled_to_range(grouped, largest, torch.int8).round_().to(torch.int8)
    return values.flatten(-2), (largest / 127).squeeze(-1)


def restored(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of [`rounded_in_groups`], up to half a step."""
    grouped = values.unflatten(-1, (scales.shape[-1], -1))
    return (grouped * scales.unsqueeze(-1)).to(dtype).flatten(-2)


def _group(channels: int) -> int:
    return _GROUP if channels % _GROUP == 0 else channels


def compressed_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, bit for bit, which keeps x in 8 bits for the backward pass.

    Args:
        layer: An activation function or a norm: it has no state but its parameters, and draws no random numbers. It is
            run again in the backward pass.
        x: Shape (..., C).

    Double backward raises RuntimeError.
    """
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    how = _How(layer, tuple(parameters), x.dtype, autocast_now(x.device.type))
    return _CompressedLayer.apply(how, x, *parameters.values())


@dataclass(frozen=True)
class _How:
    """All that is no tensor."""

    layer: nn.Module
    names: tuple[str, ...]
    dtype: torch.dtype
    autocast: Callable[[], Any]


class _CompressedLayer(torch.autograd.Function):
    @staticmethod
    def forward(how: _How, x: Tensor, *parameters: Tensor) -> Tensor:
        return how.layer(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.how, x, *parameters = inputs
        ctx.save_for_backward(*rounded_in_groups(x), *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, second_order = ctx.how, torch.is_grad_enabled()
        values, scales, *parameters = ctx.saved_tensors
        x = restored(values, scales, how.dtype)
        _, needs_x, *needed = ctx.needs_input_grad
        with torch.enable_grad(), how.autocast():
            x.requires_grad_(needs_x)
            leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)]
            seen = x.view_as(x)  # no leaf: those who watch modules, as FLOP counters do, cannot follow one in here
            y = functional_call(how.layer, dict(zip(how.names, leaves, strict=True)), (seen,))
            wanted = [t for t in (x, *leaves) if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grads[0].to(y.dtype), allow_unused=True))
        gradients = [next(found) if t.requires_grad else None for t in (x, *leaves)]
        return None, *(once_differentiable(gradients) if second_order else gradients)
