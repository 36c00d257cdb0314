"""Makes inputs of the kind that a model takes, as far as its configuration and its first layers tell."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..encoder import cuts_patches

# The images, videos or texts in the inputs.
NUM_IMAGES = 2
# Sides of images to try, in pixels, where nothing tells for which position embeddings are made.
_USUAL_SIDES = (224, 32, 64, 96, 128, 192, 256, 384, 512)
_MOST_SIZES = 12
# Following images of a larger side takes several times as long as a smaller one.
_COSTLY = 384
# The places of more pixels would take too much memory.
_MOST_PIXELS = 2**22
# Encoders make several patches of images with this side or a larger one: the strides of the last stages are 32 or 64.
_LARGE = 128
# Attributes of parts of models, and of configurations, that tell sizes of images and numbers of frames.
_SIZES_OF = ("image_size", "img_size", "crop_size")
_FRAMES_OF = ("num_frames", "frames_per_clip")
_IMAGE_TOKENS = ("image_token_id", "image_token_index")
_WORDS = 7


def example_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sets of keyword arguments that a model may take, the most likely one first; none if nothing is known of them.

    Images and spectrograms are on the meta device, words are not. Images and videos with very many pixels are left out.
    Whether a model takes one of these sets is only seen when it is called.

    Args:
        model: A model of transformers or of timm, or any other one that has one argument of images, which a convolution
            cuts into patches, or one of words, which an `nn.Embedding` embeds, or one of each.
    """
    config, takes = getattr(model, "config", None), inspect.signature(model.forward).parameters
    needed = [name for name, one in takes.items() if _is_needed(one)]
    several = _of_transformers(model, config, takes) if hasattr(config, "to_dict") else _of_others(model, needed)
    for inputs in several:
        if inputs.keys() >= set(needed) and all(_num_places(value) <= _MOST_PIXELS for value in inputs.values()):
            yield inputs


def parts_with_images(model: nn.Module) -> list[str]:
    """The names of the outermost parts of transformers' models that take images and no words, as vision towers do."""
    names: list[str] = []
    for name, part in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in names) or not isinstance(part, PreTrainedModel):
            continue
        takes = inspect.signature(part.forward).parameters
        if "pixel_values" in takes and "input_ids" not in takes:
            names.append(name)
    return names


def _num_places(value: Tensor) -> int:
    """The number of pixels of images; that of elements, for other tensors."""
    return value.numel() // (value.shape[-3] if value.dim() > 3 else 1)


def _of_others(model: nn.Module, arguments: list[str]) -> Iterator[dict[str, Tensor]]:
    has_words = any(type(part) is nn.Embedding for part in model.modules())
    images = _images(model) if _embedding_of_patches(model) is not None else ()
    if len(arguments) == 1 and (images or has_words):
        yield from ({arguments[0]: one} for one in images or [_words()])
    elif len(arguments) == 2 and images and has_words:
        first, second = arguments
        for image in images:
            yield {first: image, second: _words()}
            yield {first: _words(), second: image}


def enlarged(inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The same inputs with larger images; None if none of them is so small that an encoder may make one patch of it."""
    small = [name for name, value in inputs.items() if value.is_meta and max(value.shape[-2:]) < _LARGE]
    sizes = {name: (*inputs[name].shape[:-2], 2 * inputs[name].shape[-2], 2 * inputs[name].shape[-1]) for name in small}
    return inputs | {name: inputs[name].new_empty(size) for name, size in sizes.items()} if small else None


def _is_needed(parameter: inspect.Parameter) -> bool:
    has_default = parameter.default is not parameter.empty
    return not has_default and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _of_transformers(model: nn.Module, config: Any, takes: Container[str]) -> Iterator[dict[str, Tensor]]:
    configs = list(_configs(config))
    if any(hasattr(one, name) for one in configs for name in _IMAGE_TOKENS):
        return  # the words must have as many places for an image as it has tokens
    words = {"input_ids": _words()} if "input_ids" in takes else {}
    if words and "attention_mask" in takes:
        words["attention_mask"] = torch.ones_like(words["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        words["decoder_input_ids"] = _words()
    frames = next((n for one in configs for name in _FRAMES_OF if isinstance(n := getattr(one, name, None), int)), None)
    if "spatial_shapes" in takes:
        yield from ({**_patches(one), **words} for one in configs if hasattr(one, "num_patches"))
    elif "pixel_values" in takes:
        for image in _images(model, configs):
            if frames is not None:
                yield {"pixel_values": _video(image, frames), **words}
            yield {"pixel_values": image, **words}
    elif "pixel_values_videos" in takes:
        yield from ({"pixel_values_videos": _video(image, frames or 2), **words} for image in _images(model, configs))
    elif "input_values" in takes:
        length, bands = (getattr(config, name, None) for name in ("max_length", "num_mel_bins"))
        if isinstance(length, int) and isinstance(bands, int):
            yield {"input_values": torch.empty((NUM_IMAGES, length, bands), dtype=_dtype(model), device="meta")}
    elif words:
        yield words


def _configs(config: Any) -> Iterator[Any]:
    """A configuration of transformers and those in it, the outermost first."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def _images(model: nn.Module, configs: Iterable[Any] = ()) -> Iterator[Tensor]:
    """Images (N, C, H, W) of the sizes that attributes of a model's parts or its configurations tell, or usual ones."""
    embedding = _embedding_of_patches(model)
    channels = 3 if embedding is None else embedding.in_channels
    of_timm = getattr(model, "pretrained_cfg", None) or {}
    told = [vars(part).get(name) for part in model.modules() for name in _SIZES_OF]
    told += [getattr(config, name, None) for config in configs for name in _SIZES_OF]
    told += [tuple(of_timm.get("input_size", ()))[-2:]]
    sizes = [size for given in told if (size := _size(given))]
    if any(max(size) > _COSTLY for size in sizes):  # a smaller image may do
        sizes = sorted([*sizes, (_USUAL_SIDES[0],) * 2], key=lambda size: max(size) > _COSTLY)
    sizes += [(side, side) for side in _USUAL_SIDES]
    for size in itertools.islice(dict.fromkeys(sizes), _MOST_SIZES):
        yield torch.empty((NUM_IMAGES, channels, *size), dtype=_dtype(model), device="meta")


def _size(given: Any) -> tuple[int, int] | None:
    """(H, W) as it is given: as a side, as two of them, or in a dictionary."""
    if isinstance(given, dict):
        given = [given.get("height"), given.get("width")]
    if not isinstance(given, (list, tuple)):
        given = [given]
    if len(given) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in given):
        return None
    return given[0], given[-1]


def _patches(config: Any) -> dict[str, Tensor]:
    """Images that were cut into patches beforehand (N, L, features), as SigLIP2 takes them."""
    side = math.isqrt(config.num_patches)
    features = config.num_channels * config.patch_size**2
    return {
        "pixel_values": torch.empty((NUM_IMAGES, side * side, features), device="meta"),
        "pixel_attention_mask": torch.ones((NUM_IMAGES, side * side), dtype=torch.int64),
        "spatial_shapes": torch.tensor([[side, side]] * NUM_IMAGES),
    }


def _video(image: Tensor, frames: int) -> Tensor:
    """Frames (N, frames, C, H, W)."""
    return image[:, None].expand(-1, frames, -1, -1, -1)


def _embedding_of_patches(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    return next((part for part in model.modules() if cuts_patches(part)), None)


def _words() -> Tensor:
    """Words that differ, (N, L), int64."""
    return torch.arange(1, NUM_IMAGES * _WORDS + 1).view(NUM_IMAGES, _WORDS)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.float32)
