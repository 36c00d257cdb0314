"""Which layers make up the encoder of a model, told from its structure rather than from names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b the way `nn.Linear` does (subclasses that override forward do not)."""
    cls = getattr(type(module), "plain_class", type(module))  # LBP-WHT may run a layer's forward pass from inside
    return isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward


def is_pointwise_conv(module: nn.Module) -> bool:
    """Whether a module multiplies the channels of every pixel by one matrix: a convolution with kernel 1."""
    cls = getattr(type(module), "plain_class", type(module))
    return (
        isinstance(module, nn.Conv2d)
        and cls.forward is nn.Conv2d.forward
        and module.kernel_size == module.stride == module.dilation == (1, 1)
        and module.padding in ((0, 0), 0, "same", "valid")
        and module.groups == 1
    )


def encoder_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers, and the convolutions that are like them, inside the encoder's blocks.

    Blocks are the members of an `nn.ModuleList`, or the like members of an `nn.Sequential`. A head, a pooler or an
    embedding stands outside them. Where a transformers model says which part of it is the base model, only that part is
    searched. The blocks of a text tower, which embeds words and not patches, do not count, nor do layers that work on
    coordinates instead of features.
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
    on_images = [module for name, module in lists if not _is_of_text(model, name)]
    yield from on_images or [module for _, module in lists]


def _is_list_of_blocks(module: nn.ModuleList | nn.Sequential) -> bool:
    if any(_is_adaptable(block) for block in module):
        return False
    with_linears = [next(_linears(block), None) is not None for block in module]
    if isinstance(module, nn.ModuleList):
        return any(with_linears)
    return bool(with_linears) and all(with_linears) and len({type(block) for block in module}) == 1


def _is_of_text(model: nn.Module, name: str) -> bool:
    """Whether the nearest embedding around a module is one of words: there is no convolution beside it."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        around = list(model.get_submodule(".".join(parts[:length])).modules())
        if any(isinstance(module, nn.Conv2d) for module in around):
            return False
        if any(isinstance(module, nn.Embedding) for module in around):
            return True
    return False


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
    layer = _unwrapped(module)
    return is_plain_linear(layer) or is_pointwise_conv(layer)


def _unwrapped(module: nn.Module) -> nn.Module:
    """An adapter that is there already stands for the layer it wraps, its `base_layer`."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
