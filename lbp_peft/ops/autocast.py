"""Casts the arguments of a linear layer as autocast does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def cast_as_autocast_would(
    x: Tensor, weight: Tensor, others: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor | None], torch.dtype | None]:
    """Cast tensors as autocast casts the arguments of a linear layer.

    A weight that is a parameter is cast in both passes instead. Otherwise its copy, which may be as large as the
    inputs, would be kept from the forward pass to the backward pass.

    Args:
        x: The input.
        weight: The weight.
        others: Biases, and the tensors of low-rank updates.

    Returns:
        The same three, and the dtype to which the weight has to be cast in each pass; None: it is used as it is.
    """
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, list(others), None
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    later = isinstance(weight, nn.Parameter) and weight.dtype not in (dtype, torch.float64)
    cast_others = [None if t is None else cast(t) for t in others]
    return cast(x), weight if later else cast(weight), cast_others, dtype if later else None
