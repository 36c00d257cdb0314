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
    """Names of the linear layers inside the encoder's blocks.

    Blocks are the like members of an `nn.ModuleList` or `nn.Sequential`. A head, a pooler or an embedding stands
    outside them. Where a transformers model says which part of it is the base model, only that part is searched.
    """
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    searched = base if isinstance(base, nn.Module) else model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is searched and name), "")
    inside = {id(linear) for blocks in _block_lists(searched) for linear in _linears(blocks)}
    return [f"{prefix}{name}" for name, module in searched.named_modules() if id(module) in inside]


def _block_lists(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            alike = len({type(block) for block in module}) == 1
            if alike and all(
                not is_plain_linear(block) and next(_linears(block), None) is not None for block in module
            ):
                yield module


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.MultiheadAttention):  # reads its projections' weights without calling them
        return
    for child in module.children():
        if is_plain_linear(_unwrapped(child)):
            yield child
        else:
            yield from _linears(child)


def _unwrapped(module: nn.Module) -> nn.Module:
    """An adapter that is there already stands for the layer it wraps, its `base_layer`."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
