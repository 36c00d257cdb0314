"""Puts LBP-WHT adapters into the targeted layers of a model."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from ..calibration import CalibratedSelection
from ..formats.weight_cache import forget
from ..layer_types import layer_type_of
from ..layout import LayoutFinder
from ..ops.adaptive import AdaptiveBasis
from ..ops.plan import ExactProduct, FixedBasis, InputGradient
from .config import LBPWHTConfig, Pairs, Selection
from .layers.base import LBPWHTLayer
from .layers.calling import has_own_forward, onload_parameters
from .layers.linear import LBPWHTLinear
from .layers.offloading import DROPPED, RESIDENT
from .layers.rule import BackwardRule
from .patches.activation_patch import compress_activations
from .patches.attention_patch import patch_attention
from .patches.forward_patch import PATCH_ATTR, ForwardPatch, attach, detach
from .stacking.layer import LBPWHTStacked
from .stacking.stack import has_other_adapters
from .targets import default_targets
from .validation.modules import (
    check_base_weights_are_there,
    check_base_weights_can_be_dropped,
    check_layers,
    check_modules_to_save,
    check_targets,
    is_adapted_linear,
    warn_of_unknown_names,
    warn_of_unmatched_ranks,
)

_Setting = TypeVar("_Setting")


def prepare(tuner: BaseTuner, config: LBPWHTConfig, model: nn.Module) -> None:
    """Complete the configuration, and check everything that can be checked before a module is replaced."""
    config.check()  # its values may have changed since it was made
    if config.modules_to_save and has_other_adapters(model):
        # Modules that another adapter trains are saved with that; a second copy would replace the trained one.
        trained = [f".{name}" for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        left = [name for name in config.modules_to_save if not any(one.endswith(f".{name}") for one in trained)]
        config.modules_to_save = left or None
    check_modules_to_save(model, config)
    takes_all = config.layers_to_transform is None and config.exclude_modules is None
    tuner._checks_targets = config.target_modules is None and takes_all
    if config.target_modules is None:
        config.target_modules = _default_targets(tuner, config, model)
    else:
        check_layers(tuner, config, model)
    _maybe_include_all_linear_layers(config, model)
    matches = [(name, m, tuner._check_target_module_exists(config, name)) for name, m in model.named_modules() if name]
    warn_of_unknown_names(model, config, any(isinstance(match, _ExcludedModule) for _, _, match in matches))
    targets = [(name, module) for name, module, match in matches if match]
    warn_of_unmatched_ranks(config, [name for name, _ in targets])
    check_targets(targets, config.train_base_weight, beside_others=has_other_adapters(model))
    shared = _shared_parameters(model)
    # PEFT takes the device of the first parameter for the device of the model.
    tuner._needed_elsewhere = shared | {id(parameter) for parameter in itertools.islice(model.parameters(), 1)}
    check_base_weights_are_there(model)
    if config.train_base_weight and config.base_weights == DROPPED:
        check_base_weights_can_be_dropped(model, targets, shared)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules use."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in counts.items() if count > 1}


def _default_targets(tuner: BaseTuner, config: LBPWHTConfig, model: nn.Module) -> set[str]:
    # A further adapter gets the same layers. The model cannot be followed as it was before the first one.
    tuner._found_targets = getattr(tuner, "_found_targets", None) or default_targets(model)
    names = list(tuner._found_targets)
    names += [name for name, module in model.named_modules() if name not in names and is_adapted_linear(module)]
    if not names:
        raise ValueError(
            f"No blocks with linear layers were found in {type(model).__name__}. Name the layers to adapt: "
            'target_modules=[...], a regular expression, or "all-linear"; lbp_peft.targets_from(model, batch) looks '
            "for them in a forward pass."
        )
    if config.layers_to_transform is None:
        return set(names)
    # PEFT counts layers only for targets given by suffix, not for those given by their whole name.
    by_suffix = copy.copy(config)
    by_suffix.target_modules = {name.rpartition(".")[2] for name in names}
    check_layers(tuner, by_suffix, model)
    return {name for name in names if tuner._check_target_module_exists(by_suffix, name)}


def create_and_replace(
    tuner: BaseTuner,
    config: LBPWHTConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
    **_: object,
) -> None:
    """Give one layer an adapter: replace the layer, or patch it if another method has adapted it."""
    rank = _setting_of_layer(config.rank_pattern, config.r, current_key)
    input_rank = _setting_of_layer(config.grad_input_rank_pattern, config.grad_input_rank, current_key)
    selection = _setting_of_layer(config.selection_pattern, config.selection, current_key)
    weight_basis = config.weight_basis(rank, selection)
    rule = BackwardRule(
        weight_basis=weight_basis,
        input_gradient=_input_gradient(config, input_rank, selection),
        compress=config.compressed_words(),
        exact_forward=config.exact_forward,
        grid_size=config.grid_size,
        num_prefix_tokens=config.num_prefix_tokens,
        num_suffix_tokens=config.num_suffix_tokens,
        chosen_by=weight_basis if isinstance(weight_basis, CalibratedSelection) else None,
    )
    base = target.get_base_layer() if isinstance(target, LBPWHTLinear) else target
    is_needed = id(getattr(base, "weight", None)) in tuner._needed_elsewhere and config.base_weights != DROPPED
    base_weights = RESIDENT if is_needed else config.base_weights
    patch = getattr(target, PATCH_ATTR, None)
    if isinstance(patch, LBPWHTStacked):
        patch.lbpwht_rule[adapter_name] = rule
    elif isinstance(target, LBPWHTLinear):
        target.update_layer(adapter_name, rule, config.train_base_weight, config.inference_mode, base_weights)
    elif isinstance(target, BaseTunerLayer) or _is_trained_by_others(target, tuner.model):
        patch = LBPWHTStacked(layout_finder(tuner.model), current_key, {adapter_name: rule})
        attach(target, patch.train(target.training))
        if has_own_forward(target):
            patch.finder.warn_once(
                "own forward",
                f"{current_key} uses exact backpropagation, as do any layers like it: its forward method was replaced "
                "on the instance, so LBP-WHT is never called. Replace it on the layer's class, or use a forward hook.",
            )
    else:
        finder = layout_finder(tuner.model)
        train, inference = config.train_base_weight, config.inference_mode
        with onload_parameters(target):  # the adapter's weights go to the device of the target's
            layer = _adapting_class(target)(
                target, finder, current_key, adapter_name, rule, train, inference, base_weights
            )
            if adapter_name not in tuner.active_adapters:  # an additional adapter is not trained until it is activated
                layer.requires_grad_(False)
            tuner._replace_module(parent, target_name, layer, target)
            if train and base_weights == DROPPED:
                layer.drop_base_weight()


def _setting_of_layer(patterns: Mapping[str, _Setting], default: _Setting, name: str) -> _Setting:
    return patterns.get(get_pattern_key(list(patterns), name), default)


def _input_gradient(config: LBPWHTConfig, rank: int | None, selection: Selection | Pairs) -> InputGradient:
    """The way to compute the input gradient of a layer with this `grad_input_rank` and selection."""
    basis, precision = config.input_basis(rank, selection), config.input_precision(rank)
    if rank is None or basis is None:
        return ExactProduct(precision=precision)
    if config.grad_input_basis == "adaptive":
        return AdaptiveBasis(rank, config.grad_input_energy, precision=precision)
    return FixedBasis(basis, precision=precision)


def _adapting_class(target: nn.Module) -> type[LBPWHTLinear]:
    layer_type = layer_type_of(target)
    if layer_type is None:  # the layer is quantized
        return LBPWHTLinear
    return cast("type[LBPWHTLinear]", layer_type.adapting_class)  # all of them are made with the same arguments


def detach_all(model: nn.Module) -> set[LayoutFinder]:
    """Remove all patches from a model, and quantized copies of its weights.

    Returns:
        The layout finders of all LBP-WHT layers, to be detached when these layers are removed too.
    """
    for module in model.modules():
        if isinstance(module, LBPWHTLinear):
            module.reload_base_weight()
    finders = {module.finder for module in model.modules() if isinstance(module, LBPWHTLayer)}
    for module in list(model.modules()):
        if isinstance(getattr(module, PATCH_ATTR, None), ForwardPatch):
            detach(module)
    forget(model.parameters())
    return finders


def _is_trained_by_others(target: nn.Module, model: nn.Module) -> bool:
    """Whether another method trains a layer's own parameters, as LoRA's bias="all" does."""
    return has_other_adapters(model) and any(p.requires_grad for p in target.parameters())


def patch_blocks(model: nn.Module, checks_targets: bool = False) -> None:
    """Have the layout finder follow a model's forward passes, and patch the modules beside the adapted layers.

    Args:
        model: The model.
        checks_targets: Whether to warn of layers that the default targets left out by mistake.
    """
    patch_attention(model)
    compress_activations(model)
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, LBPWHTLayer)
    }
    layout_finder(model).watch(model, layers, _other_layers(model), checks_targets)


def _other_layers(model: nn.Module) -> dict[str, int]:
    """The axis of the channels in the input of each layer that could be adapted but is not, by name."""
    adapted = [
        module
        for module in model.modules()
        if isinstance(module, LBPWHTLayer) or isinstance(getattr(module, PATCH_ATTR, None), LBPWHTLayer)
    ]
    inside_adapted = {id(child) for module in adapted for child in module.modules()}
    return {
        name.removesuffix(".base_layer"): layer_type.channels_axis
        for name, module in model.named_modules()
        if id(module) not in inside_adapted and (layer_type := layer_type_of(module)) is not None
    }


def layout_finder(model: nn.Module) -> LayoutFinder:
    """The layout finder that all LBP-WHT layers of a model share; a new one if it has none."""
    finders = (module.finder for module in model.modules() if isinstance(module, LBPWHTLayer))
    return next(finders, None) or LayoutFinder()
