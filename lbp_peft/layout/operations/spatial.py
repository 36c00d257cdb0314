"""Rules for operations on rows and columns: padding, patches, convolutions, pooling, resizing.

An output of a convolution or of pooling has the position of the centre of its window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..positions import NOWHERE, compact, mix
from ..resampling import resample, sample, sample_mixtures
from .registry import Result, Tracer, rule, rule_by_result

PerAxis: TypeAlias = int | Sequence[int]  # one number for all axes, or one for each


@rule("pad")
def _pad(tracer: Tracer, x: Tensor, pad: Sequence[int], mode: str = "constant", value: object = None) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    num_padded = len(pad) // 2
    for axis in range(positions.dim() - num_padded):
        if positions.shape[axis] > 1 and positions.stride(axis) == 0:
            positions = positions.narrow(axis, 0, 1)
    if mode == "constant":
        padded = F.pad(positions, tuple(pad), value=NOWHERE)
    else:
        padded = _move_as_floats(positions, lambda index: F.pad(index, tuple(pad), mode=mode))
    return padded.expand(*x.shape[: x.dim() - num_padded], *padded.shape[x.dim() - num_padded :])


def _move_as_floats(positions: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Move positions by an operation that takes only floating-point numbers and fills gaps with zeros."""
    index = torch.arange(1, positions.numel() + 1, dtype=torch.float64, device=positions.device).view(positions.shape)
    return torch.cat((positions.new_tensor([NOWHERE]), positions.flatten()))[function(index).long()]


@rule("im2col")
def _im2col(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    positions = tracer.positions(x)
    return None if positions is None else _move_as_floats(positions, lambda index: F.unfold(index, *args, **kwargs))


@rule("col2im")
def _col2im(
    tracer: Tracer, x: Tensor, output_size: PerAxis, kernel_size: int | tuple[int, ...], *args: Any, **kwargs: Any
) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    size = [_number_for_axis(output_size, i) for i in (0, 1)]
    pixels = torch.arange(1, size[0] * size[1] + 1, dtype=torch.float64, device=x.device).view(1, 1, *size)
    places = F.unfold(pixels, kernel_size, *args, **kwargs)[0].long() - 1  # (pixels of a patch, patches)
    if places.min() < 0 or places.numel() != size[0] * size[1] or len(places.unique()) != places.numel():
        return None  # patches overlap, or leave gaps
    *before, rows, columns = x.shape
    patches = positions.reshape(*before, rows // len(places), len(places) * columns)
    result = torch.empty_like(patches, memory_format=torch.contiguous_format)
    result[..., places.flatten()] = patches
    return result.unflatten(-1, size)


@rule("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _unshuffle(tracer: Tracer, x: Tensor, factor: int) -> Result:
    function = F.pixel_unshuffle if tracer.current_name == "pixel_unshuffle" else F.channel_shuffle
    positions = tracer.positions(x)
    return None if positions is None else function(positions, factor)


@rule("pixel_shuffle")
def _pixel_shuffle(tracer: Tracer, x: Tensor, factor: int) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    positions = mix(positions, -3)
    for axis in (-2, -1):
        positions = resample(positions, axis, positions.shape[axis] * factor)
    *before, channels, _, _ = x.shape
    return positions.expand(*before, channels // factor**2, *positions.shape[-2:])


@rule("conv1d", "conv2d", "conv3d")
def _convolution(
    tracer: Tracer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: PerAxis = 1,
    padding: PerAxis | str = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Result:
    num_axes = weight.dim() - 2
    positions = tracer.positions(x)
    if positions is None:
        return None
    channels_axis = -num_axes - 1
    if groups == 1 or compact(positions).shape[channels_axis] == 1:
        positions = mix(positions, channels_axis)
    else:
        of_groups = [mix(p, channels_axis) for p in positions.chunk(groups, channels_axis)]
        positions = torch.cat(of_groups, channels_axis)
    positions = _sample_centres(positions, weight.shape[2:], stride, padding, dilation)
    shape = list(positions.shape)
    if shape[channels_axis] != weight.shape[0]:
        if shape[channels_axis] != 1:
            positions = positions.repeat_interleave(weight.shape[0] // shape[channels_axis], channels_axis)
        shape[channels_axis] = weight.shape[0]
    return positions.expand(shape)


def _sample_centres(
    positions: Tensor,
    kernel: Sequence[int],
    stride: PerAxis,
    padding: PerAxis | str,
    dilation: PerAxis,
    ceil_mode: bool = False,
) -> Tensor:
    """The positions of the centres of all windows of a convolution or of pooling."""
    num_axes = len(kernel)
    for i in range(num_axes):
        axis, k = i - num_axes, int(kernel[i])
        s, d = _number_for_axis(stride, i), _number_for_axis(dilation, i)
        before = after = _number_for_axis(padding, i) if not isinstance(padding, str) else 0
        if padding == "same":
            before = d * (k - 1) // 2
            after = d * (k - 1) - before
        span = positions.shape[axis] + before + after - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        if ceil_mode and (count - 1) * s >= positions.shape[axis] + before:
            count -= 1
        first = torch.arange(count) * s - before
        centre = first + d * (k - 1) // 2
        if s > 1 and d == 1:  # otherwise each output stands for the element at its centre
            positions = sample_mixtures(positions, axis, first, k, centre)
        else:
            positions = sample(positions, axis, centre)
    return positions


def _number_for_axis(value: PerAxis, i: int) -> int:
    """The number that an argument such as a stride gives for axis i."""
    if isinstance(value, SupportsIndex):  # of NumPy too
        return int(value)
    return int(value[i] if len(value) > 1 else value[0])


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def _pool(
    tracer: Tracer,
    x: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    *args: Any,
    **kwargs: Any,
) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    is_max = tracer.current_name.startswith("max")
    dilation = kwargs.get("dilation", args[0] if is_max and args else 1)
    ceil_mode = kwargs.get("ceil_mode", (args[1:2] if is_max else args[:1]) or (False,))
    ceil_mode = ceil_mode[0] if isinstance(ceil_mode, tuple) else ceil_mode
    num_axes = int(next(c for c in tracer.current_name if c in "123"))
    kernel = [_number_for_axis(kernel_size, i) for i in range(num_axes)]
    stride = kernel if stride in (None, []) else stride
    return [_sample_centres(positions, kernel, stride, padding, dilation, ceil_mode)]


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_avg_pool3d")
def _adaptive_pool(
    tracer: Tracer, x: Tensor, output_size: int | Sequence[int | None], *args: object, **kwargs: object
) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    num_axes = int(next(c for c in tracer.current_name if c in "123"))
    sizes = [output_size] * num_axes if isinstance(output_size, int) else list(output_size)
    return [_resize(positions, [x.shape[i - num_axes] if n is None else n for i, n in enumerate(sizes)])]


def _resize(positions: Tensor, sizes: list[int]) -> Tensor:
    for i, size in enumerate(sizes):
        axis = i - len(sizes)
        positions = mix(positions, axis) if size == 1 else resample(positions, axis, int(size))
    return positions


@rule_by_result("interpolate", "upsample", "upsample_bilinear", "upsample_nearest")
def _interpolate(tracer: Tracer, result: Tensor, x: Tensor, *args: object, **kwargs: object) -> Result:
    positions = tracer.positions(x)
    return None if positions is None else _resize(positions, list(result.shape[2:]))


@rule_by_result("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(
    tracer: Tracer, result: Tensor, x: Tensor, weight: Tensor, *args: object, **kwargs: object
) -> Result:
    positions = tracer.positions(x)
    if positions is None:
        return None
    num_axes = weight.dim() - 2
    positions = _resize(mix(positions, -num_axes - 1), list(result.shape[-num_axes:]))
    return positions.expand(result.shape)
