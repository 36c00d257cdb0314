"""Casts the arguments of a linear layer as autocast does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def cast_as_autocast_would(weight: Tensor, tensors: list[Any]) -> tuple[list[Any], torch.dtype | None]:
    """Cast tensors as autocast casts the arguments of a linear layer.

    A weight that is a parameter is cast in both passes instead. Otherwise its copy, which may be as large as the
    inputs, would be kept from the forward pass to the backward pass.

    Returns:
        The tensors, and the dtype to which the weight has to be cast in each pass; None: it has been cast.
    """
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return tensors, None
    dtype = torch.get_autocast_dtype(device)
    later = isinstance(weight, nn.Parameter) and weight.dtype not in (dtype, torch.float64)

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 or (later and t is weight) else t.to(dtype)

    return [cast(t) for t in tensors], dtype if later else None
