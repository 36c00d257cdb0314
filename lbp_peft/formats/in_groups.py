"""Integers of 8 bits with one scale for each group of neighbouring channels.

Outliers in a few channels make only their own group coarser. Tensors that a backward pass reads once, such as the input
of a norm, are saved in this format. The factors of matrix products are in that of [`lbp_peft.formats.int8`].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .scaling import largest_magnitude, scaled_to_range

BYTES_OF_SCALE = 4  # float32
GROUP = 64  # channels
# The number of values in a block on CPUs. Larger blocks take a little less time, but their buffers leave larger gaps in
# the heap between what is saved: with 2^18 values or more, the peak of a ViT-B's training was a tenth higher.
_VALUES_AT_ONCE = 2**17


def quantize_groups(x: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a tensor to int8 with one scale for each group of 64 channels, or for all if 64 does not divide C.

    Args:
        x: Shape (..., C), of any floating dtype.
        offset: A tensor to subtract from x beforehand, which broadcasts to its shape. Its last axis is 1 or C.

    Returns:
        int8 values (..., C), and float32 scales (..., C / 64) or (..., 1).
    """
    group = _group(x.shape[-1])
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        grouped = (x if offset is None else x - offset).unflatten(-1, (-1, group))
        largest = largest_magnitude(grouped, dim=-1)
        values = scaled_to_range(grouped, largest, torch.int8).round_().to(torch.int8)
        return values.flatten(-2), (largest / 127).squeeze(-1)
    return _quantize_in_blocks(x, offset, group)


def _quantize_in_blocks(x: Tensor, offset: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """[`quantize_groups`] on a CPU: block after block, so that intermediate results stay in the cache."""
    # In memory order, so that x need not be copied: queries are transposed views of (N, L, heads, d).
    order = sorted(range(x.dim() - 1), key=lambda axis: -x.stride()[axis])
    ordered = x.permute(*order, -1)
    if not ordered.is_contiguous():
        order, ordered = list(range(x.dim() - 1)), x.contiguous()
    if offset is not None:
        offset = offset.permute(*order, -1).float()
    shape = ordered.shape
    if offset is None or offset.shape[:-1] == shape[:-1]:
        ordered = ordered.view(-1, shape[-1])
        offset = None if offset is None else offset.reshape(-1, offset.shape[-1])
    elif offset.shape[0] != shape[0]:
        offset = offset.expand(shape[0], *offset.shape[1:])
    grouped = ordered.unflatten(-1, (-1, group))
    values = x.new_empty(grouped.shape, dtype=torch.int8)
    scales = x.new_empty(*grouped.shape[:-1], 1, dtype=torch.float32)
    rows = max(_VALUES_AT_ONCE // max(grouped[:1].numel(), 1), 1)
    buffer = x.new_empty(min(rows, len(grouped)), *grouped.shape[1:], dtype=torch.float32)
    offsets: Iterable[Tensor | None] = itertools.repeat(None)
    if offset is not None:
        offsets = offset.unflatten(-1, (-1, min(group, offset.shape[-1]))).split(rows)
    blocks = zip(grouped.split(rows), offsets, values.split(rows), scales.split(rows), strict=False)
    for exact, subtrahend, rounded, scale in blocks:
        scaled = buffer[: len(exact)]
        if exact.dtype != torch.float32:  # operations on two dtypes are slow, except for copies
            exact = scaled.copy_(exact)
        if subtrahend is not None:
            exact = torch.sub(exact, subtrahend, out=scaled)
        largest = largest_magnitude(exact, dim=-1)
        rounded.copy_(scaled_to_range(exact, largest, torch.int8, out=scaled).round_())
        torch.div(largest, 127, out=scale)
    back = [order.index(axis) for axis in range(len(order))]
    return values.view(shape).permute(*back, -1), scales.view(*shape[:-1], shape[-1] // group).permute(*back, -1)


def shape_of_scales(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a tensor of shape (..., C)."""
    *rows, channels = shape
    return *rows, channels // _group(channels)


def dequantize_groups(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of [`quantize_groups`], up to half a step."""
    grouped = values.unflatten(-1, (scales.shape[-1], -1))
    return (grouped * scales.unsqueeze(-1)).to(dtype).flatten(-2)


def quantize_rows(x: Tensor) -> Tensor:
    """Round each row of a tensor to int8, with the row's scale beside its values.

    The result is a single tensor, so that one tensor is saved for each input. Each row has a scale of its own, since
    the coefficients of different basis functions differ much in size.

    Args:
        x: Shape (..., C), of any floating dtype.

    Returns:
        int8, (..., C + 4): integers from -127 to 127, and the float32 scale of the row in the last 4 bytes.
    """
    x = x.float()  # operations on two dtypes are slow, except for copies
    largest = largest_magnitude(x, dim=-1)
    values = scaled_to_range(x, largest, torch.int8).round_().to(torch.int8)
    scales = (largest / 127).flatten().view(torch.int8)  # in one axis, whose stride compiled code leaves at 1
    return torch.cat((values, scales.view(*x.shape[:-1], BYTES_OF_SCALE)), dim=-1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of [`quantize_rows`], up to half a step."""
    scales = rows[..., -BYTES_OF_SCALE:].contiguous().view(torch.float32)
    return (rows[..., :-BYTES_OF_SCALE] * scales).to(dtype)


def _group(channels: int) -> int:
    return GROUP if channels % GROUP == 0 else channels
