"""What the modules of a model tell about its tokens, before any image has passed through them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# Learned tokens that vision transformers put before their patches: cls_token, class_embedding, register_tokens, ...
# Models with several patch embeddings number them, one for each.
_PREFIX_TOKEN = re.compile(r"((cls|class|dist|distillation|reg|register)_(tokens?|embedding))(_?\d+)?")
# And after them.
_SUFFIX_TOKEN = re.compile(r"((det|detection)_tokens?)(_?\d+)?")
# These put theirs after the patches, whatever the name says.
_PUT_LAST = ("Llama4VisionModel",)
# Tables of learned tokens that some layers put before all others (EoMT's queries).
_QUERIES = re.compile(r"quer(y|ies)")
# Parts of a model whose tokens are not its patches, or that turn them into answers. Only their names tell.
_AFTER_THE_ENCODER = re.compile(r"Decoder|Head$")
# MobileViTV2 works on (N, C, pixels of a patch, patches).
_UNFOLDING = ("MobileViTV2Transformer", "LinearTransformerBlock")
_MAKES_GRIDS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def patch_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Layers that cut into patches or merge them (stride > 1), each with its ancestors, nearest first."""
    for name, module in model.named_modules():
        if isinstance(module, _MAKES_GRIDS) and max(pair(module.stride) or (1, 1)) > 1:
            yield module, list(ancestors(model, name))


def ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around the one of that name, nearest first."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:length]))


def learned_tokens(around: list[nn.Module]) -> tuple[int, int]:
    """How many learned tokens the nearest ancestor holding any puts before the patches, and how many after them."""
    for ancestor in around:
        before, after = _count(ancestor, _PREFIX_TOKEN), _count(ancestor, _SUFFIX_TOKEN)
        declared = getattr(ancestor, "num_prefix_tokens", None)  # timm says it outright
        if isinstance(declared, int):
            return declared, after
        if type(ancestor).__name__ in _PUT_LAST:
            return 0, before
        if before or after:
            return before, after
    return 0, 0


def _count(module: nn.Module, pattern: re.Pattern[str]) -> int:
    found: dict[str, int] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if match := pattern.fullmatch(name):
            found[match[1]] = 1 if parameter.dim() == 1 else parameter.shape[-2]
    return sum(found.values())


def learned_queries(model: nn.Module) -> set[int]:
    """How many tokens the tables of queries hold."""
    return {
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _QUERIES.fullmatch(name.rpartition(".")[2])
    }


def may_merge_patches(module: nn.Module) -> bool:
    """Patch merging joins 2 x 2 patches of C channels and reduces 4 C to 2 C (Swin, arXiv 2103.14030)."""
    if not isinstance(module, nn.Linear) or module.bias is not None:
        return False
    return module.in_features == 2 * module.out_features and module.in_features % 4 == 0


def unroll_schedule(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """By which strides patches are unrolled (Hiera); timm says it in a module, transformers in an attribute."""
    for module in model.modules():
        schedule = getattr(module, "schedule" if type(module).__name__ == "Unroll" else "unroll_schedule", None)
        if isinstance(schedule, (list, tuple)):
            strides = [pair(stride) for stride in schedule]
            return tuple(stride for stride in strides if stride is not None)
    return ()


def window_near(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module around a layer that says its `window_size`."""
    return next((module for module in ancestors(model, name) if window_size(module) is not None), None)


def window_size(windowed: nn.Module | None) -> tuple[int, int] | None:
    """(H, W) of the windows of what [`window_near`] found; they may change with the image."""
    return pair(getattr(windowed, "window_size", None))


def why_off_grid(model: nn.Module, name: str) -> str:
    """Why the tokens of a layer are, or may be, no patches of a grid, whatever their number; "" if nothing says so."""
    if kind := after_the_encoder(model, name):
        return f"it is part of a {kind}, whose tokens may be others than patches"
    if any(type(module).__name__ in _UNFOLDING for module in ancestors(model, name)):
        return "its images are unfolded, so that neither axis of its tokens is height or width"
    layer: Any = model.get_submodule(name)
    features = {getattr(layer, side, None) for side in ("in_features", "out_features", "in_channels", "out_channels")}
    heads = getattr(next(ancestors(model, name)), "num_heads", None)
    if heads is not None and features - {None} == {heads}:
        return "it mixes the heads of attention, so that both axes of its input are tokens"
    return ""


def is_of_text(model: nn.Module, name: str) -> bool:
    """Whether the nearest module around one that is given words has no convolution, which would cut images."""
    for around in ancestors(model, name):
        if any(isinstance(module, nn.Conv2d) for module in around.modules()):
            return False
        if takes(around, "input_ids"):
            return True
    return False


def after_the_encoder(model: nn.Module, name: str) -> str:
    """The decoder or head, by its class, that a module is part of; "" if of none."""
    kinds = (type(module).__name__ for module in (model.get_submodule(name), *ancestors(model, name)))
    return next((kind for kind in kinds if _AFTER_THE_ENCODER.search(kind)), "")


def takes(module: nn.Module, *names: str) -> bool:
    """Whether a module's forward method has arguments of these names."""
    return set(names) <= inspect.signature(module.forward).parameters.keys()


def patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Of models that cut patches without a convolution."""
    return pair(getattr(getattr(model, "config", None), "patch_size", None))


def pair(size: Any) -> tuple[int, int] | None:
    """(H, W) of a side or of two; None of anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return (size, size)
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return (size[0], size[1])
    return None
