"""Creates an adapter that is a linear combination of others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from numbers import Real

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import LBPWHTConfig
from .layers.adapted_weights import weighted_sum_of_changes
from .layers.linear import LBPWHTLinear
from .validation.names import check_adapter_name
from .validation.patterns import show


def add_weighted_adapter(
    tuner: BaseTuner,
    configs: MutableMapping[str, LBPWHTConfig],
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "linear",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """See [`LBPWHTModel.add_weighted_adapter`].

    Args:
        tuner: The tuner that holds the adapters.
        configs: The configurations of the LBP-WHT adapters, by name. That of the new adapter is added.
        svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method: Arguments of LoRA's method
            for other types of combination; they must be left out here.
    """
    for_other_types = {
        "svd_rank": svd_rank is not None,
        "svd_clamp": svd_clamp is not None,
        "svd_full_matrices": svd_full_matrices is not True,
        "svd_driver": svd_driver is not None,
        "density": density is not None,
        "majority_sign_method": majority_sign_method != "total",
    }
    _check_combination(combination_type, [name for name, is_given in for_other_types.items() if is_given])
    factors = _pair_with_weights(adapters, weights)
    _check_adapters(tuner, configs, adapters, adapter_name)
    model = tuner.model
    wrappers = _wrappers(model, adapters)
    configs[adapter_name] = _combined_config(tuner, [configs[name] for name in adapters], adapters)
    try:
        tuner.inject_adapter(model, adapter_name)
    except Exception:
        del configs[adapter_name]
        raise
    for module in model.modules():
        if isinstance(module, LBPWHTLinear) and adapter_name in module.lbpwht_weight:
            module.combine(adapter_name, factors)
            if adapters[0] in module.lbpwht_rule:  # the settings are the first one's, and so are calibrated bases
                module.lbpwht_rule[adapter_name] = module.lbpwht_rule[adapters[0]]
    for wrapper in wrappers.values():
        _combine_modules(wrapper, adapter_name, factors)


def _check_combination(combination_type: str, others: list[str]) -> None:
    if combination_type != "linear" or others:
        arguments = " with ".join([f"combination_type={show(combination_type)}", *others])
        raise ValueError(
            f'LBP-WHT adapters can only be combined with combination_type="linear", got {arguments}. Their weights are '
            "full matrices, and this is their exact weighted sum."
        )


def _pair_with_weights(adapters: list[str], weights: list[float]) -> list[tuple[str, float]]:
    if isinstance(adapters, str) or not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"adapters and weights must be two lists of the same length, one weight for each adapter, got "
            f"{show(adapters)} and {show(weights)}."
        )
    for weight in weights:
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"weights must be finite numbers, got {show(weight)}.")
    return [(name, float(weight)) for name, weight in zip(adapters, weights, strict=True)]


def _check_adapters(
    tuner: BaseTuner, configs: Mapping[str, LBPWHTConfig], adapters: list[str], adapter_name: str
) -> None:
    for name in adapters:
        if name not in configs:
            beneath = f" {name!r} is beneath them." if name in tuner.peft_config else ""
            raise ValueError(f"Adapter {name!r} does not exist. LBP-WHT adapters are {list(configs)}.{beneath}")
        if not configs[name].train_base_weight:
            raise ValueError(f"Adapter {name!r} has train_base_weight=False: it has no weights to combine.")
    check_adapter_name(adapter_name, "add_weighted_adapter")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already. Delete it first, or choose another name.")


def _combined_config(tuner: BaseTuner, configs: list[LBPWHTConfig], adapters: list[str]) -> LBPWHTConfig:
    """The first adapter's configuration, extended to the layers and modules_to_save of all."""
    names = [name for name, _ in tuner.model.named_modules()]
    layers = {
        name
        for name, module in tuner.model.named_modules()
        if isinstance(module, LBPWHTLinear) and any(adapter in module.lbpwht_rule for adapter in adapters)
    }
    by_suffix = any(name not in layers and name.endswith(f".{layer}") for layer in layers for name in names)
    saved = list(dict.fromkeys(name for config in configs for name in config.modules_to_save or []))
    return replace(
        configs[0],
        target_modules="|".join(map(re.escape, sorted(layers))) if by_suffix else layers,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved or None,
        stack_on=None,
        stack_active=None,
    )


def _wrappers(model: nn.Module, adapters: list[str]) -> dict[str, ModulesToSaveWrapper]:
    """The wrappers of modules_to_save that hold a copy for any of the adapters, by name.

    Raises:
        ValueError: the copies differ in a buffer, such as running statistics, which cannot be summed.
    """
    wrappers = {}
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        copies = [module.modules_to_save[adapter] for adapter in adapters if adapter in module.modules_to_save]
        if not copies:
            continue
        first = dict(copies[0].named_buffers())
        for other in copies[1:]:
            for key, buffer in other.named_buffers():
                if not torch.equal(buffer, first[key].to(buffer.device)):
                    raise ValueError(
                        f"The adapters {', '.join(adapters)} have different values for the buffer {key} of {name}, "
                        "one of their modules_to_save, and a sum of these has no meaning."
                    )
        wrappers[name] = module
    return wrappers


@torch.no_grad()
def _combine_modules(wrapper: ModulesToSaveWrapper, adapter_name: str, factors: list[tuple[str, float]]) -> None:
    copies = [(wrapper.modules_to_save[name], factor) for name, factor in factors if name in wrapper.modules_to_save]
    new, base = wrapper.modules_to_save[adapter_name], wrapper.original_module
    for key, parameter in new.named_parameters():
        weighted_copies = [(copy.get_parameter(key), factor) for copy, factor in copies]
        parameter.data = weighted_sum_of_changes(base.get_parameter(key), weighted_copies)
    for key, buffer in new.named_buffers():
        buffer.copy_(copies[0][0].get_buffer(key))
