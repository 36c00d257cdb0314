"""Which layers make up the encoder of a model, told from its structure rather than from names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# What turns the encoder's tokens into answers. The name alone does not tell: such a part has no patch embedding.
_AFTER_THE_ENCODER = re.compile(r"Decoder|Head$")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b the way `nn.Linear` does (subclasses that override forward do not)."""
    cls = getattr(type(module), "plain_class", type(module))  # LBP-WHT may run a layer's forward pass from inside
    return isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module computes x W + b: transformers' `Conv1D`, a linear layer with its weight as (C_in, C_out)."""
    cls = getattr(type(module), "plain_class", type(module))
    return isinstance(module, Conv1D) and cls.forward is Conv1D.forward


def is_pointwise_conv(module: nn.Module) -> bool:
    """Whether a module multiplies the channels of every pixel by one matrix: a 1-D or 2-D convolution with kernel 1."""
    cls: Any = getattr(type(module), "plain_class", type(module))
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and cls.forward in (nn.Conv1d.forward, nn.Conv2d.forward)
        and {*module.kernel_size, *module.stride, *module.dilation} == {1}
        and module.padding in ((0,), (0, 0), 0, "same", "valid")
        and module.groups == 1
    )


def is_supported(module: nn.Module) -> bool:
    """Whether a module treats every token by one matrix, in one of the three ways above."""
    return is_plain_linear(module) or is_transposed_linear(module) or is_pointwise_conv(module)


def encoder_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers, and the convolutions that are like them, inside the encoder's blocks.

    Blocks are the members of an `nn.ModuleList`, or the like members of an `nn.Sequential`. A head, a pooler or an
    embedding stands outside them. Where a transformers model says which part of it is the base model, only that part is
    searched. The blocks of a text tower, which embeds words and not patches, do not count, nor do those of decoders and
    heads, nor layers that work on coordinates instead of features.
    """
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    searched = base if isinstance(base, nn.Module) else model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is searched and name), "")
    inside = {id(linear) for blocks in _block_lists(searched) for linear in _linears(blocks)}
    return [f"{prefix}{name}" for name, module in searched.named_modules() if id(module) in inside]


def _block_lists(model: nn.Module) -> Iterator[nn.Module]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_list_of_blocks(module)
    ]
    of_encoder = [blocks for name, blocks in lists if not is_of_text(model, name) and not _answers(model, name, blocks)]
    yield from of_encoder or [blocks for _, blocks in lists]


def _answers(model: nn.Module, name: str, blocks: nn.Module) -> bool:
    return any(_after_the_encoder(model, f"{name}.{block}") for block, _ in blocks.named_children())


def is_of_text(model: nn.Module, name: str) -> bool:
    """Whether the nearest module around one that is given words or images is given words alone."""
    for around in ancestors(model, name):
        if embeds_images(around) or _takes(around, "pixel_values"):
            return False
        if _takes(around, "input_ids"):
            return True
    return False


def ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around the one of that name, nearest first."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:length]))


def embeds_images(module: nn.Module) -> bool:
    """Whether a convolution in a module cuts images or videos into patches, or merges patches."""
    return any(isinstance(part, (nn.Conv2d, nn.Conv3d)) and max(part.stride) > 1 for part in module.modules())


def _after_the_encoder(model: nn.Module, name: str) -> bool:
    around = (model.get_submodule(name), *ancestors(model, name))
    return any(_AFTER_THE_ENCODER.search(type(part).__name__) and not embeds_images(part) for part in around)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _is_list_of_blocks(module: nn.ModuleList | nn.Sequential) -> bool:
    if any(_is_adaptable(block) for block in module):
        return False
    with_linears = [next(_linears(block), None) is not None for block in module]
    if isinstance(module, nn.ModuleList):
        return any(with_linears)
    return bool(with_linears) and all(with_linears) and len({type(block) for block in module}) == 1


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
    return is_supported(_unwrapped(module))


def _unwrapped(module: nn.Module) -> nn.Module:
    """An adapter that is there already stands for the layer it wraps, its `base_layer`."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
