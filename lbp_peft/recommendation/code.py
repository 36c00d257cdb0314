"""The lines of Python that prepare a model as recommended."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from .candidates import LORA
from .table import WIDTH

if TYPE_CHECKING:
    from .result import Recommendation


def as_python(found: Recommendation) -> str:
    """Python code that turns the plain model, `model`, into the model to train."""
    setting, config = found.setting, found.config
    assert setting is not None
    if config is None:
        lines = ["# Train the model as it is: full fine-tuning, without an adapter."]
    elif setting.lbp_wht is None:
        lines = ["from peft import LoraConfig, get_peft_model", ""]
        lines += _adaptation("model", "model", "LoraConfig", _of_lora(config))
    elif setting.lora:
        lines = ["from peft import LoraConfig, get_peft_model", "from lbp_peft import LBPWHTConfig", ""]
        beneath = next(iter(config.stack_on.values()))
        lines += _adaptation("lora", "model", "LoraConfig", _of_lora(beneath))
        lines += _adaptation("model", "lora", "LBPWHTConfig", {**setting.lbp_wht, "train_base_weight": False})
    else:
        lines = ["from peft import get_peft_model", "from lbp_peft import LBPWHTConfig", ""]
        saved = {"modules_to_save": found.heads} if found.heads else {}
        lines += _adaptation("model", "model", "LBPWHTConfig", {**setting.lbp_wht, **saved})
    if setting.checkpointing:
        lines += [f"model.{found.checkpointing_call}"]
    if setting.compiled:
        lines += ["model.compile()"]
    return "\n".join(lines)


def _of_lora(config: Any) -> dict[str, Any]:
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    saved = {"modules_to_save": list(config.modules_to_save)} if config.modules_to_save else {}
    return {**LORA, "target_modules": targets, **saved}


def _adaptation(result: str, model: str, kind: str, settings: dict[str, Any]) -> list[str]:
    """Lines, not too long, that put an adapter on a model."""
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
