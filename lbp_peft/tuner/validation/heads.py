"""Warns of a head that was initialised at random and stays frozen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...encoder import encoder_linears


def warn_of_frozen_heads(model: nn.Module) -> None:
    """Warn, in one warning, of layers after the encoder that still have their initial weights and stay frozen.

    Args:
        model: The model with its adapters.
    """
    loaded = any(_was_loaded(parameter) for parameter in model.parameters())
    fresh = [name for name, module in _layers_of_heads(model) if _is_frozen(module) and _is_fresh(module, loaded)]
    if not fresh:
        return
    names = list(dict.fromkeys(_outermost(model, name) for name in fresh))
    verb, pronoun = ("are", "them") if len(names) > 1 else ("is", "it")
    warnings.warn(
        f"{', '.join(names)} {verb} freshly initialised and frozen, so predictions stay random. "
        f"Train {pronoun} with modules_to_save={names}, or load a model whose head is trained.",
        stacklevel=2,
    )


def _layers_of_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with a weight matrix that come after the encoder, except those that an adapter trains or contains."""
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    modules = list(model.named_modules())
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(module) for module in base.modules()}
        after = [(name, module) for name, module in modules if id(module) not in inside]
    else:
        encoder = set(encoder_linears(model))
        last = max((index for index, (name, _) in enumerate(modules) if name in encoder), default=len(modules))
        after = modules[last + 1 :]
    adapters = tuple(
        f"{name}." for name, module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    )
    for name, module in after:
        matrix = getattr(module, "weight", None)
        is_layer = isinstance(matrix, Tensor) and matrix.dim() > 1 and not isinstance(module, BaseTunerLayer)
        if is_layer and "pooler" not in name and not f"{name}.".startswith(adapters):
            yield name, module


def _outermost(model: nn.Module, name: str) -> str:
    """The name of the outermost module that contains this one and no adapted layer; its own name if there is none."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        outer = ".".join(parts[:length])
        if not any(isinstance(module, BaseTunerLayer) for module in model.get_submodule(outer).modules()):
            return outer
    return name


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _is_fresh(module: nn.Module, others_loaded: bool) -> bool:
    """Whether a layer's parameters are certainly those of its initialisation.

    transformers and timm initialise biases to zero, and training changes that. PyTorch draws weights within bounds that
    training soon exceeds; that alone is no proof, so the rest of the model must have come from a checkpoint.

    Args:
        module: A layer whose weight has one row per output feature.
        others_loaded: Whether transformers loaded other parameters of the model from a checkpoint.
    """
    parameters = list(module.parameters(recurse=False))
    if any(_was_loaded(p) or p.is_meta or p.numel() == 0 or not p.is_floating_point() for p in parameters):
        return False
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter):
        return False
    if not bias.any():
        return True
    bound = 1 / math.sqrt(weight[0].numel())
    largest = max(float(weight.abs().max()), float(bias.abs().max()))
    return others_loaded and 0.9 * bound < largest <= bound * (1 + 1e-2)


def _was_loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers loaded the parameter from a checkpoint, which it marks by this attribute."""
    return bool(getattr(parameter, "_is_hf_initialized", False))
