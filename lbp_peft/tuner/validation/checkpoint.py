"""Checks that a checkpoint fits the adapter that it is loaded into."""

from __future__ import annotations

from typing import NoReturn

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..compat.wrappers import without_wrappers
from ..layers.linear import LBPWHTLinear


def adapter_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """The names that the adapter's tensors have in the model's state dict."""
    return {
        f"{without_wrappers(name)}.{attribute}.{adapter_name}"
        for name, module in model.named_modules()
        if isinstance(module, LBPWHTLinear)
        for attribute in LBPWHTLinear.adapter_layer_names
        if adapter_name in getattr(module, attribute)
    }


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that is not one of this adapter, before any of it is loaded.

    If it is refused, an adapter that was only just created to hold it is removed again.

    Args:
        model: The model that the checkpoint is for.
        adapter_name: The adapter that the checkpoint is for.
        state_dict: The tensors of the checkpoint, with the keys of the model's state dict.

    Raises:
        ValueError: tensors are missing or do not belong.
    """
    expected = adapter_keys(model, adapter_name)
    missing = sorted(expected - state_dict.keys())
    extra = sorted(state_dict.keys() - model.state_dict().keys())
    if not missing and not extra:
        return
    problems = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, problem in ((missing, "missing"), (extra, "unexpected"))
        if keys
    ]
    refuse_checkpoint(
        model,
        adapter_name,
        f"This checkpoint does not fit adapter {adapter_name!r}. Tensors: {'; '.join(problems)}. "
        + (
            "None of its tensors is of an LBP-WHT adapter: was it saved by another PEFT method? Load it with its own "
            "adapter_config.json."
            if expected and not expected & state_dict.keys()
            else "Check that its adapter_config.json and the base model are those it was saved with."
        ),
    )


def refuse_checkpoint(model: nn.Module, adapter_name: str, message: str) -> NoReturn:
    """Raise ValueError; an adapter that was only just created to hold the checkpoint is removed again."""
    if _is_untrained(model, adapter_name):
        _remove_adapter(model, adapter_name)
    raise ValueError(message)


def _is_untrained(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter's weights are still those of the base model, so that nothing is lost with them."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, LBPWHTLinear):
            if module.is_dropped:
                return False
            weight, bias = module._base_parameters()
            pairs += [(module.lbpwht_weight[adapter_name], weight)] if adapter_name in module.lbpwht_weight else []
            if bias is not None and adapter_name in module.lbpwht_bias:
                pairs.append((module.lbpwht_bias[adapter_name], bias))
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copy, original = module.modules_to_save[adapter_name], module.original_module
            pairs += zip(copy.parameters(), original.parameters(), strict=True)
    return all(copy.device.type == "meta" or torch.equal(copy.to(base), base) for copy, base in pairs)


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    if not isinstance(model, PeftModel):  # injected without a PeftModel: whoever injected it can remove it
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()
