"""Integers of 8 bits with one scale for each group of neighbouring channels.

A few outlying channels cost only their own group. What a backward pass reads once, such as the input of a norm, is kept
in this format; [`lbp_peft.formats.products`] has those that matrix products read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import largest_magnitude, scaled_to_range

GROUP = 64  # channels
# Values that are rounded at once on CPUs: the intermediate results of so many stay in the cache.
_VALUES_AT_ONCE = 2**17


def rounded_in_groups(x: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(..., C) -> int8 values (..., C), and float32 scales (..., C / 64), or (..., 1) where 64 does not divide C.

    Args:
        x: What to round.
        offset: Subtracted from it before; broadcast to it, but for its last axis (..., 1) or (..., C).
    """
    group = _group(x.shape[-1])
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= _VALUES_AT_ONCE:
        grouped = (x if offset is None else x - offset).unflatten(-1, (-1, group))
        largest = largest_magnitude(grouped, dim=-1)
        values = scaled_to_range(grouped, largest, torch.int8).round_().to(torch.int8)
        return values.flatten(-2), (largest / 127).squeeze(-1)
    return _rounded_by_parts(x, offset, group)


def _rounded_by_parts(x: Tensor, offset: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[-1]
    # Matrices of rows that share an offset, if they do.
    shared = x.shape[-2] if offset is not None and offset.shape[-2] == 1 else 1
    matrices = x.reshape(-1, shared, channels)
    offsets = None if offset is None else offset.reshape(len(matrices), 1, offset.shape[-1])
    values = torch.empty(matrices.shape, dtype=torch.int8)
    scales = torch.empty(len(matrices), shared, channels // group, 1, dtype=torch.float32)
    at_once = max(_VALUES_AT_ONCE // (shared * channels), 1)
    buffer = torch.empty(at_once, shared, channels, dtype=torch.float32)
    for start in range(0, len(matrices), at_once):
        part = slice(start, start + at_once)
        some = matrices[part]
        found = buffer[: len(some)]
        if some.dtype != torch.float32:  # of two dtypes at once all but copies are slow
            some = found.copy_(some)
        if offsets is not None:
            some = torch.sub(some, offsets[part], out=found)
        some, found = some.unflatten(-1, (-1, group)), found.unflatten(-1, (-1, group))
        largest = largest_magnitude(some, dim=-1)
        values[part].view(found.shape).copy_(scaled_to_range(some, largest, torch.int8, out=found).round_())
        torch.div(largest, 127, out=scales[part])
    return values.view(x.shape), scales.view(*x.shape[:-1], channels // group)


def restored(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of [`rounded_in_groups`], up to half a step."""
    grouped = values.unflatten(-1, (scales.shape[-1], -1))
    return (grouped * scales.unsqueeze(-1)).to(dtype).flatten(-2)


def rows_with_scales(x: Tensor) -> Tensor:
    """(..., C) -> int8, (..., C + 4): integers from -127 to 127, and the float32 scale of the row in the last 4 bytes.

    One tensor, so that what is saved of an input stays one. Rows may differ much in scale, as those of coefficients do.
    """
    largest = largest_magnitude(x, dim=-1)
    values = scaled_to_range(x, largest, torch.int8).round_().to(torch.int8)
    return torch.cat((values, (largest / 127).view(torch.int8)), dim=-1)


def restored_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of [`rows_with_scales`], up to half a step."""
    scales = rows[..., -4:].contiguous().view(torch.float32)
    return (rows[..., :-4] * scales).to(dtype)


def _group(channels: int) -> int:
    return GROUP if channels % GROUP == 0 else channels
