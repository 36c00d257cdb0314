"""Python code that prepares a model as recommended."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from .candidates import LORA
from .table import WIDTH

if TYPE_CHECKING:
    from .result import Recommendation


def as_python(recommendation: Recommendation) -> str:
    """Python code that turns the plain model, `model`, into the model to train."""
    setting, config = recommendation.setting, recommendation.config
    assert setting is not None
    if config is None:
        lines = ["# Train the model as it is: full fine-tuning, without an adapter."]
    elif setting.lbp_wht is None:
        lines = ["from peft import LoraConfig, get_peft_model", ""]
        lines += _adaptation("model", "model", "LoraConfig", _lora_settings(config))
    elif setting.lora:
        lines = ["from peft import LoraConfig, get_peft_model", "from lbp_peft import LBPWHTConfig", ""]
        lora_config = next(iter(config.stack_on.values()))
        lines += _adaptation("lora", "model", "LoraConfig", _lora_settings(lora_config))
        lines += _adaptation("model", "lora", "LBPWHTConfig", {**setting.lbp_wht, "train_base_weight": False})
    else:
        lines = ["from peft import get_peft_model", "from lbp_peft import LBPWHTConfig", ""]
        saved = {"modules_to_save": recommendation.heads} if recommendation.heads else {}
        lines += _adaptation("model", "model", "LBPWHTConfig", {**setting.lbp_wht, **saved})
    if setting.checkpointing:
        lines += [f"model.{recommendation.checkpointing_call}"]
    if setting.compiled:
        lines += ["model.compile()"]
    return "\n".join(lines)


def _lora_settings(config: LoraConfig) -> dict[str, Any]:
    """The arguments with which code makes the same `LoraConfig`."""
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    saved = {"modules_to_save": list(config.modules_to_save)} if config.modules_to_save else {}
    return {**LORA, "target_modules": targets, **saved}


def _adaptation(result: str, model: str, kind: str, settings: dict[str, Any]) -> list[str]:
    """The lines that put an adapter on a model, no longer than the table is wide."""
    arguments = [
        f"{name}={json.dumps(value) if isinstance(value, (str, list)) else value}" for name, value in settings.items()
    ]
    line = f"{result} = get_peft_model({model}, {kind}({', '.join(arguments)}))"
    if len(line) <= WIDTH:
        return [line]
    indented = (
        textwrap.fill(f"{argument},", WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
        for argument in arguments
    )
    return [f"config = {kind}(", *indented, ")", f"{result} = get_peft_model({model}, config)"]
