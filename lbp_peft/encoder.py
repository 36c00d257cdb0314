"""Which layers make up the encoder of a model, determined from its structure rather than from names."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator
from functools import cache
from typing import TypeGuard

from torch import nn

from .layer_types import LayerType, is_plain_linear, layer_type_of

# Names of classes that turn the encoder's tokens into outputs. The name alone decides nothing: a module with such a
# name that is given images is part of the encoder.
_AFTER_THE_ENCODER = re.compile(r"Decoder|Head$")
# Arguments that hold images or the sizes of packed ones, and arguments that hold sound.
_IMAGES = ("pixel_values", "flattened_patches", "image_patches", "grid_thw")
_SOUND = ("input_features", "input_values")
_MOST_CHANNELS_OF_IMAGES = 4


def encoder_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers, and the convolutions that are like them, inside the encoder's blocks.

    Blocks are the members of an `nn.ModuleList`, or the like members of an `nn.Sequential`. A head, a pooler or an
    embedding is outside them. Where a transformers model says which part of it is the base model, only that part is
    searched. The blocks of a text tower, which embeds words and not patches, do not count, nor do those of decoders and
    heads, nor projectors to another width, nor layers that work on coordinates instead of features. In a model of
    images and words, only the blocks of the vision tower count, or, if it has none, the blocks that both pass through.
    """
    prefix, searched = _base_of(model)
    inside = {id(linear) for blocks in _block_lists(searched) for linear in _linears(blocks)}
    return [f"{prefix}{name}" for name, module in searched.named_modules() if id(module) in inside]


def adaptable_layers(model: nn.Module) -> dict[str, LayerType]:
    """The types of all layers that could be adapted, by the layer's name."""
    found = {id(layer) for layer in _linears(model)}
    types = {name: layer_type_of(_unwrapped(module)) for name, module in model.named_modules() if id(module) in found}
    return {name: layer_type for name, layer_type in types.items() if layer_type is not None}


def of_the_encoder(model: nn.Module, names: Iterable[str], before_blocks: Container[str] = ()) -> list[str]:
    """Those of some layers that are part of the encoder, though perhaps not of its blocks.

    They are in its blocks, or at least inside the base model and not inside a decoder, a head or a projector. In a
    model of images and words, they are inside the part that is given images alone, if any of the layers is, or else
    sound alone, and so on.

    Args:
        model: The model.
        names: The names of the layers.
        before_blocks: The names of layers that a pass has shown to run before blocks of the encoder. The name of a
            class does not make them part of a decoder or a head.
    """
    prefix, searched = _base_of(model)
    in_blocks = set(encoder_linears(model))
    groups: dict[frozenset[str], list[str]] = {frozenset(kinds): [] for kinds in _IN_ORDER}
    for name in names:
        within = name.removeprefix(prefix)
        kinds = _modalities_around(searched, within)
        is_beside = (
            name.startswith(prefix)
            and not any(_is_projector(part) for part in ancestors(searched, within))
            and not _after_the_encoder(searched, within, kinds, by_name=name not in before_blocks)
        )
        if name in in_blocks or is_beside:
            groups[kinds].append(name)
    if any("words" in _modalities(part) for part in searched.modules()):
        return next((group for group in groups.values() if group), [])
    chosen = {name for group in groups.values() for name in group}
    return [name for name in names if name in chosen]


def _base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The prefix of the names of the base model's layers, and the base model; ("", the model) if none is known."""
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    searched = base if isinstance(base, nn.Module) else model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is searched and name), "")
    return prefix, searched


def _block_lists(model: nn.Module) -> list[nn.Module]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_list_of_blocks(module)
    ]
    # The blocks by the modalities that they are given. Where the model reads words too, the first group with any blocks
    # is adapted.
    groups: dict[frozenset[str], list[nn.Module]] = {frozenset(kinds): [] for kinds in _IN_ORDER}
    for name, blocks in lists:
        kinds = _modalities_around(model, name)
        if not any(
            _after_the_encoder(model, f"{name}.{block}".lstrip("."), kinds) for block, _ in blocks.named_children()
        ):
            groups[kinds].append(blocks)
    given = set().union(*(_modalities(part) for part in model.modules()))
    if "words" in given:
        of_encoder = next((group for kinds, group in groups.items() if group and kinds != {"words"}), [])
    else:
        of_encoder = [blocks for group in groups.values() for blocks in group]
    is_text_alone_left = "words" in given and len(given) > 1  # a language model, which is not adapted unless asked for
    return of_encoder or ([] if is_text_alone_left else [blocks for _, blocks in lists])


def _modalities_around(model: nn.Module, name: str) -> frozenset[str]:
    """The modalities of the innermost module that contains this one and whose modalities are known."""
    return next((kinds for around in ancestors(model, name) if (kinds := _modalities(around))), frozenset())


def ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that contain the module of this name, the innermost first."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:length]))


# Sets of modalities, in the order in which blocks that are given them are preferred.
_IN_ORDER: tuple[tuple[str, ...], ...] = (
    ("images",), ("sound",), (), ("images", "words"), ("sound", "words"), ("words",),
)  # fmt: skip


def _modalities(module: nn.Module) -> frozenset[str]:
    """What a module is given (images, sound, words), judged by its arguments and its embedding."""
    kinds = {"words"} if any(_takes(part, "input_ids") for part in module.modules()) else set()
    embedding = next((part for part in module.modules() if cuts_patches(part)), None)
    of_sound = _takes(module, *_SOUND) or (embedding is not None and embedding.in_channels == 1)  # of spectrograms
    if _takes(module, *_IMAGES):
        kinds.add("images")
    elif of_sound or embedding is not None:
        kinds.add("sound" if of_sound else "images")
    return frozenset(kinds)


def cuts_patches(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    """Whether a module cuts images or videos into patches, rather than features of a head into larger ones."""
    if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
        return False
    return max(module.stride) > 1 and module.in_channels <= _MOST_CHANNELS_OF_IMAGES


def _after_the_encoder(model: nn.Module, name: str, kinds: frozenset[str], by_name: bool = True) -> bool:
    around = (model.get_submodule(name), *ancestors(model, name))
    return any(_is_decoder(part, kinds, by_name) and not _modalities(part) - {"words"} for part in around)


def _is_decoder(module: nn.Module, kinds: frozenset[str], by_name: bool = True) -> bool:
    """Whether a module reads what an encoder has made or generates text, or, by its name, is a decoder or a head."""
    of_words = not kinds or "words" in kinds
    is_called_so = by_name and bool(_AFTER_THE_ENCODER.search(type(module).__name__))
    return is_called_so or _takes(module, "encoder_hidden_states") or (of_words and _takes(module, "past_key_values"))


def _takes(module: nn.Module, *names: str) -> bool:
    forward = getattr(type(module), "forward", None)  # modules of torch.jit.script have none
    return forward is not None and not _parameters(forward).isdisjoint(names)


@cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _is_list_of_blocks(module: nn.ModuleList | nn.Sequential) -> bool:
    if any(_is_adaptable(block) for block in module) or any(_is_projector(block) for block in module):
        return False
    with_linears = [next(_linears(block), None) is not None for block in module]
    if isinstance(module, nn.ModuleList):
        return any(with_linears)
    return bool(with_linears) and all(with_linears) and len({type(block) for block in module}) == 1


def _is_projector(block: nn.Module) -> bool:
    """Whether a block is nothing but an MLP to another width, such as the mergers of Qwen3-VL."""
    layers = list(block.children())
    linears = [layer for layer in layers if is_plain_linear(_unwrapped(layer))]
    if len(linears) < 2 or any(next(layer.children(), None) is not None for layer in layers if layer not in linears):
        return False
    sizes = [(layer.in_features, layer.out_features) for layer in map(_unwrapped, linears)]
    is_chain = all(one[1] == following[0] for one, following in itertools.pairwise(sizes))
    return is_chain and sizes[0][0] != sizes[-1][1]


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.MultiheadAttention):  # reads its projections' weights without calling them
        return
    if getattr(next(module.children(), None), "in_features", 5) <= 4:
        return  # a map from two or three coordinates, as of relative positions
    for child in module.children():
        if _is_adaptable(child):
            yield child
        else:
            yield from _linears(child)


def _is_adaptable(module: nn.Module) -> bool:
    return layer_type_of(_unwrapped(module)) is not None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside an adapter that the model has already, its `base_layer`; any other module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
