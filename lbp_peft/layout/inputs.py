"""Assigns positions to a model's inputs: to the rows and columns of images, and to the words of texts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .descriptions import describe
from .masks import is_mask
from .positions import FIRST_TEXT, encode, number_of, renumber
from .tracer import PositionTracer
from .trails import Origin

# Numbers of inputs, see [`lbp_peft.layout.positions.encode`]. All inputs of images share a number.
IMAGES = 0
# Inputs with two axes of places and no channels: (N, time, frequency).
_SPECTROGRAMS = ("input_values", "input_features", "spectrogram")
_EMBEDDED = ("embeds",)
_WORDS = ("input_ids", "inputs_embeds")
# Arguments that may hold the sizes of images. The values of other arguments are not read.
_SIZES = re.compile(r"grid|shape|size|thw|_hw")
_MOST_VALUES = 4096
TENSORS = "all tensors"


def merge_size(model: nn.Module) -> int:
    """The rows and columns of the units in which a model takes packed patches; 1 if it has no such units."""
    sizes = (getattr(module, "spatial_merge_size", None) for module in model.modules())
    return next((size for size in sizes if isinstance(size, int) and size), 1)


def named_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by their names in the module's forward method."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will raise
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound = {**bound, **bound.pop(parameter.name, {})}
    return dict(bound)


def tensors_in(inputs: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The innermost values of nested inputs, each with the name of its argument."""
    if isinstance(inputs, dict) or hasattr(inputs, "items"):
        for key, value in inputs.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            yield from tensors_in(value, name)
    else:
        yield name, inputs


def signature(inputs: dict[str, Any]) -> tuple:
    """A key of all that a trace depends on in the inputs: shapes, dtypes, types, and the values of tensors of sizes."""
    parts: list[Any] = []
    for name, value in tensors_in(inputs):
        if isinstance(value, Tensor):
            parts.append((name, value.shape, value.dtype, value.device))
            if _holds_sizes(name, value):
                parts.append(tuple(value.flatten().tolist()))
        else:
            parts.append((name, describe(value)))
    return tuple(parts)


def describe_inputs(inputs: dict[str, Any]) -> dict[str, Hashable]:
    """The parts of [`signature`]: one for all tensors, and others by the name of the argument."""
    parts: dict[str, Hashable] = {}
    tensors = []
    for name, value in inputs.items():
        has_tensors = any(isinstance(one, Tensor) for _, one in tensors_in(value))
        if has_tensors:
            tensors.append((name, value))
        else:
            parts[f"the argument {name!r}"] = signature({name: value})
    return parts | {TENSORS: signature(dict(tensors))}


def _holds_sizes(name: str, tensor: Tensor) -> bool:
    """Whether a tensor holds sizes of images: (images, 2), or (images, 3) with the number of frames first."""
    is_integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    is_small = tensor.dim() == 2 and tensor.shape[1] in (2, 3) and 0 < tensor.numel() <= _MOST_VALUES
    return is_integer and is_small and _SIZES.search(name) is not None


def assign_positions(tracer: PositionTracer, inputs: dict[str, Any], merge_size: int = 1) -> dict[int, str]:
    """Assign positions to every tensor among the inputs.

    Args:
        tracer: The tracer that follows the tensors from now on.
        inputs: The inputs, by the name of the argument.
        merge_size: The rows and columns of the units in which packed patches are ordered, as in Qwen-VL; 1: there are
            no units.

    Returns:
        The name of each text, by its number as an input.
    """
    texts: dict[int, str] = {}
    by_kind: dict[str, int] = {}
    num_images = 0
    tensors = [(name, value) for name, value in tensors_in(inputs) if isinstance(value, Tensor)]
    words = {_kind_of_text(name): name for name, _ in tensors if name.endswith(_WORDS)}
    sizes = [value for name, value in tensors if _holds_sizes(name, value)]
    for name, tensor in tensors:
        if any(tensor is given for given in sizes):
            continue
        positions, origins = None, {IMAGES: Origin(name)}
        if tensor.is_floating_point():
            positions = positions_of_images(name, tensor, sizes, merge_size)
            if positions is not None and positions.numel():  # a model may join images of several inputs in one sequence
                count = int(number_of(positions[(-1,) * positions.dim()])) + 1
                positions, num_images = renumber(positions, num_images), num_images + count
        text_shape = _text_shape(name, tensor)
        if positions is None and text_shape is not None:
            source = by_kind.setdefault(_kind_of_text(name), FIRST_TEXT + len(by_kind))
            texts.setdefault(source, name)
            positions = _positions_of_text(source, tensor, text_shape) if source < 16 else None
            origins = {source: Origin(words.get(_kind_of_text(name), name))}
        tracer.start(tensor, positions, _is_certain(tensor, positions), is_mask(name, tensor), origins)
    for given in sizes:
        tracer.start_constant(given)
    return texts


def _kind_of_text(name: str) -> str:
    """The same string for all arguments that describe the same words; a decoder and an encoder have different words."""
    for ending in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return f"{name} "


def _is_certain(tensor: Tensor, positions: Tensor | None) -> bool:
    """Whether the shape alone shows which axis runs over channels; if not, the first convolution will."""
    if positions is None or not tensor.is_floating_point() or tensor.dim() not in (3, 4, 5):
        return True
    if tensor.dim() == 5:
        return min(tensor.shape[1:3]) <= 4 or tensor.shape[4] in (1, 3)
    if tensor.dim() == 3:  # one image, or tokens
        return tensor.shape[0] not in (1, 3) or bool((positions[0] != positions[-1]).any())
    return tensor.shape[1] <= 4 or tensor.shape[3] in (1, 3)


def _text_shape(name: str, tensor: Tensor) -> torch.Size | None:
    if tensor.is_floating_point():
        return tensor.shape[:2] if tensor.dim() == 3 and name.endswith(_EMBEDDED) else None
    return tensor.shape if tensor.dim() == 2 and tensor.dtype != torch.bool else None


def _positions_of_text(source: int, tensor: Tensor, shape: torch.Size) -> Tensor:
    count, length = (torch.arange(n, device=tensor.device) for n in shape)
    positions = encode(source, count[:, None], torch.zeros_like(length), length)
    return positions if tensor.dim() == 2 else positions[..., None].expand(tensor.shape)


def positions_of_images(name: str, tensor: Tensor, sizes: list[Tensor], merge_size: int) -> Tensor | None:
    """The positions of an input's elements; None if the input does not hold images."""
    for given in sizes:
        if (packed := _positions_of_patches(tensor, given.tolist(), merge_size)) is not None:
            return packed
    if tensor.dim() == 3 and not name.endswith(_SPECTROGRAMS):
        is_image = tensor.shape[0] in (1, 3) and min(tensor.shape[1:]) >= 8
        positions = positions_of_images(name, tensor[None], [], 1) if is_image else None
        return None if positions is None else positions[0]
    axes = _image_axes(tensor)
    if axes is None:
        return None
    *before, row_axis, column_axis = axes

    def along(axis: int) -> Tensor:
        places = torch.arange(tensor.shape[axis], device=tensor.device)
        return places.view([-1 if a == axis else 1 for a in range(tensor.dim())])

    image = torch.zeros((1,) * tensor.dim(), dtype=torch.int64, device=tensor.device)
    for axis in before:
        image = image * tensor.shape[axis] + along(axis)
    return encode(IMAGES, image, along(row_axis), along(column_axis)).expand(tensor.shape)


def _image_axes(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes of images (or frames), rows and columns; the remaining axis, if any, is that of the channels."""
    shape = tensor.shape
    if tensor.dim() == 3:
        return (0, 1, 2)
    if tensor.dim() == 4:
        return (0, 1, 2) if shape[3] in (1, 3) and shape[1] not in (1, 3) else (0, 2, 3)
    if tensor.dim() == 5:  # (N, frames, channels, height, width), or with the channels before the frames or last
        if shape[4] in (1, 3) and not {shape[1], shape[2]} & {1, 3}:
            return (0, 1, 2, 3)
        are_first = shape[1] in (1, 3) and shape[2] not in (1, 3)
        return (0, 2, 3, 4) if are_first or shape[1] <= 4 < shape[2] else (0, 1, 3, 4)
    if tensor.dim() == 6 and shape[3] in (1, 3):  # (N, images, tiles, channels, height, width)
        return (0, 1, 2, 4, 5)
    return None


def _positions_of_patches(tensor: Tensor, sizes: list[list[int]], merge_size: int) -> Tensor | None:
    """The positions of images that were cut into patches beforehand: (N, L, features), or packed, (total, features)."""
    counts = [size[-2] * size[-1] * (size[0] if len(size) == 3 else 1) for size in sizes]
    places: list[Tensor] = []
    for size in sizes:
        frames = size[0] if len(size) == 3 else 1
        for _ in range(frames):
            merged = merge_size if len(size) == 3 else 1
            places.append(_positions_on_grid(len(places), size[-2], size[-1], merged, tensor.device))
    if tensor.dim() == 3 and tensor.shape[0] == len(sizes) and max(counts) <= tensor.shape[1] and len(sizes[0]) == 2:
        rows = [torch.cat((p, p.new_full((tensor.shape[1] - len(p),), -1))) for p in places]
        return torch.stack(rows)[..., None].expand(tensor.shape)
    if tensor.dim() == 2 and tensor.shape[0] == sum(counts):
        return torch.cat(places)[:, None].expand(tensor.shape)
    return None


def _positions_on_grid(number: int, height: int, width: int, merge_size: int, device: torch.device) -> Tensor:
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in (height, width)), indexing="ij")
    positions = encode(IMAGES, torch.full_like(row, number), row, column)
    if merge_size > 1 and height % merge_size == width % merge_size == 0:
        units = positions.view(height // merge_size, merge_size, width // merge_size, merge_size)
        positions = units.transpose(1, 2)
    return positions.flatten()
