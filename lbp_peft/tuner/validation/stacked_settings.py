"""Checks the configurations of other methods in a configuration of LBP-WHT, which it is stacked on (`stack_on`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType

from .names import check_adapter_name, is_module_name
from .patterns import IN_LAYERS_PATTERN, IN_RANK_PATTERN, check_pattern, show
from .values import are_names

if TYPE_CHECKING:
    from ..config import LBPWHTConfig


def check_stack(config: LBPWHTConfig) -> None:
    """Check `stack_on` and `stack_active`, and convert them to a dict of configurations and a list of names.

    Raises:
        ValueError: the message names the setting.
    """
    active, stack = config.stack_active, config.stack_on
    if isinstance(active, str):
        active = config.stack_active = [active]
    if active is not None and not (isinstance(active, (list, tuple)) and all(isinstance(name, str) for name in active)):
        raise ValueError(f"stack_active must be names of adapters of stack_on, got {show(active)}.")
    if stack is None:
        if active:
            raise ValueError("stack_active says which adapters of stack_on are active: give stack_on too.")
        return
    if isinstance(stack, PeftConfig):
        stack = {"default": stack}
    if (
        not isinstance(stack, dict)
        or not stack
        or not all(isinstance(value, (PeftConfig, dict)) for value in stack.values())
    ):
        raise ValueError(f"stack_on must be a PEFT configuration, or several by adapter name, got {show(stack)}.")
    for name in stack:
        check_adapter_name(name, "stack_on")
    config.stack_on = {name: _validate_config(name, value) for name, value in stack.items()}
    unknown = set(active or []) - config.stack_on.keys()
    if unknown:
        raise ValueError(f"stack_active names {', '.join(sorted(unknown))}, but stack_on has {list(config.stack_on)}.")


def _validate_config(name: str, value: PeftConfig | dict[str, object]) -> PeftConfig:
    """Check the configuration of an adapter that LBP-WHT is stacked on. If it is the dict of a checkpoint, convert it.

    Raises:
        ValueError: the configuration is invalid, or of a method that LBP-WHT cannot be stacked on, or has a value that
            must not come from a file.
    """
    field = f"stack_on[{name!r}]"
    peft_type = value.get("peft_type") if isinstance(value, dict) else value.peft_type
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(known_type.value for known_type in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"{field} has the peft_type {show(peft_type)}, which PEFT does not know. It knows {known}.")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    # X-LoRA's configuration names folders and repositories to load further adapters from.
    if peft_type in (PeftType.LBPWHT, PeftType.XLORA) or not issubclass(tuner, BaseTuner):
        raise ValueError(
            "stack_on must be a configuration of another method with adapters in layers, such as LoRA, and not of "
            f"{PeftType(peft_type).value}."
        )
    if isinstance(value, dict):
        if value.get("megatron_config"):
            raise ValueError(
                f"{field} has a megatron_config, with which PEFT imports whatever module megatron_core names. LBP-WHT "
                "does not adapt Megatron's layers: leave both out."
            )
        try:
            config = PeftConfig.from_peft_type(**value)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{field} is not a valid configuration of {PeftType(peft_type).value}: {error}") from error
    else:
        config = value
        if not isinstance(config, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]):
            expected_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].__name__
            raise ValueError(
                f"{field} must be a {expected_class} for the peft_type {peft_type}, got a {type(config).__name__}."
            )
    _check_patterns(field, config)
    return config


def _check_patterns(field: str, config: PeftConfig) -> None:
    """Refuse regular expressions that could take forever to match, and names that PEFT would read as expressions."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(value := getattr(config, name, None), str) and value:
            check_pattern(f"{field}.{name}", value)
    patterns = getattr(config, "layers_pattern", None) or []
    for expression in [patterns] if isinstance(patterns, str) else patterns:
        check_pattern(f"{field}.layers_pattern", expression, IN_LAYERS_PATTERN)
    for name, value in vars(config).items():  # rank_pattern, alpha_pattern and their like
        if name.endswith("_pattern") and isinstance(value, dict):
            for pattern in value:
                check_pattern(f"A key of {field}.{name}", pattern, IN_RANK_PATTERN)
    saved = getattr(config, "modules_to_save", None) or []
    if not are_names(saved) or not all(map(is_module_name, saved)):
        raise ValueError(f"{field}.modules_to_save must be names of modules or None, got {show(saved)}.")
