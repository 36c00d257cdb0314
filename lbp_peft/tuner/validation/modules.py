"""Checks of the modules that a configuration names: targets, excluded ones, and those that are trained in full."""

from __future__ import annotations

import copy
import itertools
import re
import warnings

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ...layer_types import described_layer_types, layer_type_of
from ..config import LBPWHTConfig
from ..layers.base import LBPWHTLayer
from ..layers.linear import LBPWHTLinear, can_be_dropped
from .names import did_you_mean, unknown_names, unmatched_modules_to_save


def check_targets(targets: list[tuple[str, nn.Module]], train_base_weight: bool, beside_others: bool) -> None:
    """Refuse layers that LBP-WHT cannot adapt.

    Args:
        targets: The layers to adapt, with their names.
        train_base_weight: The setting of the configuration.
        beside_others: Whether the model has adapters of another method.

    Raises:
        TypeError: a target is neither a linear layer nor an adapter of one.
        ValueError: a target's weight cannot be trained, as it is quantized or another method adapts the layer.
    """
    for name, module in targets:
        if train_base_weight and beside_others and _is_of_others(module):
            raise ValueError(
                f"Target module {name} is trained by another PEFT method ({type(module).__module__}). To make that "
                "training cheap, set train_base_weight=False. To train its weight instead, merge the other adapter "
                "first (merge_and_unload), or name the module in exclude_modules."
            )
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        quantized = _is_quantized(base)
        if not quantized and layer_type_of(base) is None:
            settings = f" ({base.extra_repr()})" if base.extra_repr() else ""
            raise TypeError(
                f"Target module {name} is of type {type(base).__name__}{settings}, which LBP-WHT does not support. "
                f"Supported are {described_layer_types()}. Leave it out of target_modules, or name it in "
                "exclude_modules."
            )
        if quantized and train_base_weight:
            raise ValueError(
                f"Target module {name} is quantized ({type(base).__name__}), so its weight cannot be trained. Set "
                "train_base_weight=False, or load the model without quantization."
            )


def check_base_weights_are_there(model: nn.Module) -> None:
    """Refuse another adapter where the first has `base_weights="dropped"`.

    Raises:
        ValueError: the message names the setting.
    """
    for module in model.modules():
        if isinstance(module, LBPWHTLinear):
            module.check_base_weight("Adding another adapter")


def check_base_weights_can_be_dropped(model: nn.Module, targets: list[tuple[str, nn.Module]], shared: set[int]) -> None:
    """Refuse `base_weights="dropped"` where anything but the new adapter needs a target's base weight.

    Args:
        model: The model to be adapted.
        targets: The layers to adapt, with their names.
        shared: Ids of the parameters that several modules use.

    Raises:
        ValueError: the message names the setting and the layer.
    """
    adapted = {name for name, module in model.named_modules() if isinstance(module, LBPWHTLinear)}
    for name, module in targets:
        base = module.get_base_layer() if isinstance(module, LBPWHTLinear) else module
        why = ""
        if adapted:
            why = f"{min(adapted)} has an adapter already, and switching between the two needs the base weights"
        elif id(getattr(base, "weight", None)) in shared:
            why = "another module uses the same weight"
        elif not can_be_dropped(base):
            why = "its weight is offloaded or computed again in each call, or its forward method was replaced"
        if why:
            raise ValueError(
                f'base_weights="dropped" cannot be used for {name}: {why}. Choose another base_weights, or name the '
                "layer in exclude_modules."
            )


def check_modules_to_save(model: nn.Module, config: PeftConfig) -> None:
    """Refuse names that match no module, and names that match a module and another one inside it.

    PEFT matches the ends of names, and ignores a name without a match. Of two modules inside one another it would
    freeze the inner one in the copy that runs, train a copy of it that never runs, and write a checkpoint that it
    cannot load again.

    Args:
        model: The model to be adapted.
        config: The configuration of LBP-WHT, or of an adapter that it is stacked on.

    Raises:
        ValueError: the message says what to name instead.
    """
    names = getattr(config, "modules_to_save", None) or []
    for name in unmatched_modules_to_save(model, names, config.task_type):
        raise ValueError(
            f"modules_to_save names {name!r}, but {type(model).__name__} has no such module.{did_you_mean(model, name)}"
        )
    matched = [key for key, _ in model.named_modules(remove_duplicate=False) if key.endswith(tuple(names))]
    for outer, inner in itertools.permutations(matched, 2):
        if not inner.startswith(f"{outer}."):
            continue
        if any(outer.endswith(name) and inner.endswith(name) for name in names):
            children = model.get_submodule(outer).named_children()
            parts = [f"{outer}.{name}" for name, child in children if _has_state(child)]
            remedy = f"Name the parts of {outer} instead: {parts}."
        else:
            remedy = f"Leave {inner} out: it is trained and saved with {outer}."
        raise ValueError(
            f"modules_to_save={names} matches {outer} and, inside it, {inner}, since PEFT compares the ends of names. "
            f"{inner} would not be trained, and the checkpoint could not be loaded. {remedy}"
        )


def check_layers(tuner: BaseTuner, config: LBPWHTConfig, model: nn.Module) -> None:
    """Refuse indices in `layers_to_transform` without a block; PEFT ignores them as long as one has a block.

    Args:
        tuner: The tuner that decides whether a configuration targets a module.
        config: The configuration, whose targets are names or ends of names.
        model: The model to be adapted.

    Raises:
        ValueError: an index has no block; the message lists the indices that exist.
    """
    if config.layers_to_transform is None:
        return
    indices = config.layers_to_transform
    config_of_index, with_targets = copy.copy(config), []
    names = [name for name, _ in model.named_modules()]
    known = sorted({int(part) for name in names for part in name.split(".") if part.isdecimal()})
    for index in known:
        config_of_index.layers_to_transform = [index]
        if any(tuner._check_target_module_exists(config_of_index, name) for name in names):
            with_targets.append(index)
    wrong = sorted(set(indices if isinstance(indices, list) else [indices]) - set(with_targets))
    if wrong:
        raise ValueError(
            f"layers_to_transform has {', '.join(map(str, wrong))}, but the blocks with target modules are "
            f"{', '.join(map(str, with_targets)) or 'none'}"
            f"{f' for layers_pattern={config.layers_pattern!r}' if config.layers_pattern else ''}."
        )


def warn_of_unknown_names(model: nn.Module, config: LBPWHTConfig, excludes_any: bool) -> None:
    """Warn about names in `target_modules` and `exclude_modules` that match no module, unless PEFT does.

    Args:
        model: The model to be adapted.
        config: The configuration as the user gave it.
        excludes_any: Whether any module is excluded. If none is excluded or targeted, PEFT itself warns or raises.
    """
    for field, is_checked in (("target_modules", True), ("exclude_modules", excludes_any)):
        names = getattr(config, field)
        if not is_checked or not names or isinstance(names, str):
            continue
        unknown = unknown_names(model, names)
        if unknown and len(unknown) < len(names) + (field == "exclude_modules"):
            warnings.warn(
                f"{field} names {', '.join(unknown)}, but {type(model).__name__} has no such module."
                f"{did_you_mean(model, unknown[0])}",
                stacklevel=2,
            )


def warn_of_unmatched_ranks(config: LBPWHTConfig, targets: list[str]) -> None:
    """Warn about keys of patterns that match no target, except those of `rank_pattern`, of which PEFT warns.

    Args:
        config: The configuration as the user gave it.
        targets: Names of the modules to adapt.
    """
    for field in ("grad_input_rank_pattern", "selection_pattern"):
        for key in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets):  # as PEFT's get_pattern_key
                warnings.warn(f"{field} has {key!r}, which matches no module to adapt.", stacklevel=2)


def _has_state(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def _is_of_others(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):
        return not isinstance(module, LBPWHTLayer)
    return any(p.requires_grad for p in module.parameters())


def is_adapted_linear(module: nn.Module) -> bool:
    """Whether a module is another method's adapter of a layer that LBP-WHT supports."""
    if not isinstance(module, BaseTunerLayer) or isinstance(module, LBPWHTLayer):
        return False
    base = module.get_base_layer()
    return layer_type_of(base) is not None or _is_quantized(base)


def _is_quantized(module: nn.Module) -> bool:
    if resolve_quantization_backend(module) is not None:
        return True
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.dtype.is_floating_point
