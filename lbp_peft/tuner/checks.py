"""What is refused, and with which words."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ..encoder import is_plain_linear
from .layer import LBPWHTLayer


def check_targets(targets: list[tuple[str, nn.Module]], train_base_weight: bool) -> None:
    """Refuse layers that LBP-WHT cannot adapt.

    Raises:
        TypeError: a target is no linear layer, or has an adapter of another method.
        ValueError: a target is quantised, so that its weight cannot be trained.
    """
    for name, module in targets:
        if isinstance(module, LBPWHTLayer):
            module = module.get_base_layer()
        if isinstance(module, BaseTunerLayer):
            raise TypeError(
                f"Target module {name} has an adapter of another PEFT method already ({type(module).__module__}), "
                "which LBP-WHT does not adapt. Merge that adapter first (merge_and_unload), or name the module in "
                "exclude_modules."
            )
        quantised = _is_quantised(module)
        if not quantised and not is_plain_linear(module):
            raise TypeError(
                f"Target module {name} is of type {type(module).__name__}, which LBP-WHT does not support. Supported "
                "is torch.nn.Linear. Leave it out of target_modules, or name it in exclude_modules."
            )
        if quantised and train_base_weight:
            raise ValueError(
                f"Target module {name} is quantised ({type(module).__name__}), so its weight cannot be trained. Set "
                "train_base_weight=False, or load the model without quantisation."
            )


def _is_quantised(module: nn.Module) -> bool:
    if resolve_quantization_backend(module) is not None:
        return True
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.dtype.is_floating_point


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that is not one of this adapter, before any of it is loaded.

    An adapter that was only just created to hold it is removed again.

    Args:
        model: The model that the checkpoint is for.
        adapter_name: The adapter that the checkpoint is for.
        state_dict: Keys as in the model.

    Raises:
        ValueError: tensors are missing or do not belong.
    """
    expected = {
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{attribute}.{adapter_name}"
        for name, module in model.named_modules()
        if isinstance(module, LBPWHTLayer)
        for attribute in LBPWHTLayer.adapter_layer_names
        if adapter_name in getattr(module, attribute)
    }
    missing = sorted(expected - state_dict.keys())
    extra = sorted(state_dict.keys() - model.state_dict().keys())
    if not missing and not extra:
        return
    if _is_untrained(model, adapter_name):
        _remove_adapter(model, adapter_name)
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "missing"), (extra, "unexpected"))
        if keys
    ]
    raise ValueError(
        f"This checkpoint does not fit adapter {adapter_name!r}. Tensors: {'; '.join(problems)}. "
        + (
            "None of its tensors is of an LBP-WHT adapter: was it saved by another PEFT method? Load it with its own "
            "adapter_config.json."
            if expected and not expected & state_dict.keys()
            else "Check that its adapter_config.json and the base model are those it was saved with."
        )
    )


def _is_untrained(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter's weights are still those of the base model, so that nothing is lost with them."""
    pairs: list[tuple[Any, Any]] = []
    for module in model.modules():
        if isinstance(module, LBPWHTLayer):
            weight, bias = module._base_parameters()
            pairs += [(module.lbpwht_weight[adapter_name], weight)] if adapter_name in module.lbpwht_weight else []
            pairs += [(module.lbpwht_bias[adapter_name], bias)] if adapter_name in module.lbpwht_bias else []
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copy, original = module.modules_to_save[adapter_name], module.original_module
            pairs += zip(copy.parameters(), original.parameters(), strict=True)
    return all(own.device.type == "meta" or torch.equal(own.to(base), base) for own, base in pairs)


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    if not isinstance(model, PeftModel):  # injected without one: who injected it can take it out
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()
