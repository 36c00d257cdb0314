"""LBP-WHT as one of the adapters of a `PeftMixedModel`.

PEFT lists the methods that a mixed model knows in constants of one module and tells them apart by type in another.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import peft.mixed_model
import peft.tuners.mixed
from peft.tuners.mixed import model as mixed
from peft.utils import PeftType
from torch import nn

from ..config import LBPWHTConfig
from ..inject import create_and_replace, detach_all, patch_blocks, prepare
from ..layers.base import LBPWHTLayer
from ..model import LBPWHTModel
from ..stacking.stack import has_other_adapters, restore_adapter_states


class MixedModel(mixed.MixedModel):
    """PEFT's mixed model, which takes LBP-WHT adapters as well."""

    def _check_new_adapter_config(self, config: Any) -> None:
        if isinstance(config, LBPWHTConfig) and config.stack_on:
            raise ValueError("A mixed model has the other adapters already: leave out stack_on.")
        super()._check_new_adapter_config(config)

    @staticmethod
    def _prepare_adapter_config(peft_config: Any, model_config: dict) -> Any:
        if isinstance(peft_config, LBPWHTConfig):
            return peft_config
        return mixed.MixedModel._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if isinstance(peft_config, LBPWHTConfig):
            prepare(self, peft_config, model)
        else:
            super()._prepare_model(peft_config, model)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, LBPWHTConfig):
            create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.peft_config[adapter_name], LBPWHTConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        with restore_adapter_states(model) if has_other_adapters(model) else nullcontext():
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        patch_blocks(model, self._checks_targets)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        finders = detach_all(self.model)
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for finder in finders:
            finder.detach()
        return model


def extend_mixed_models() -> None:
    """Make `PeftMixedModel` take LBP-WHT adapters. Further calls have no effect."""
    if peft.mixed_model.MixedModel is MixedModel:
        return
    mixed.COMPATIBLE_TUNER_TYPES += (PeftType.LBPWHT,)
    peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
    mixed.PREFIXES.append(LBPWHTModel.prefix)
    mixed.Layers += (LBPWHTLayer,)
    mixed.Configs = mixed.Configs | LBPWHTConfig
    peft.mixed_model.MixedModel = MixedModel
