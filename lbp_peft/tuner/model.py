"""Puts LBP-WHT layers into a model, and takes them out again."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from ..encoder import encoder_linears
from ..grid import GridFinder
from .checks import check_state_dict, check_targets
from .config import LBPWHTConfig
from .layer import BackwardRule, LBPWHTLayer, LBPWHTLinear
from .report import LayoutReport, layout_report


class LBPWHTModel(BaseTuner):
    """A model whose targeted layers have LBP-WHT adapters.

    Made by `get_peft_model(model, LBPWHTConfig(...))`; `model.base_model` of what that returns.

    Args:
        model: Adapted in place.
        config: Or a dict of adapter name to config.
        adapter_name: Of the first adapter.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be filled by a checkpoint.
    """

    prefix: str = "lbpwht_"
    tuner_layer_cls = LBPWHTLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # structure tells, see encoder.py

    def layout_report(self) -> LayoutReport:
        """How each adapted layer's backward pass ran last, see [`lbp_peft.layout_report`]."""
        return layout_report(self.model)

    # Everything that can be refused is refused here, before a module is replaced.

    def _prepare_adapter_config(self, peft_config: LBPWHTConfig, model_config: dict) -> LBPWHTConfig:
        return peft_config

    def _prepare_model(self, peft_config: LBPWHTConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = self._default_targets(peft_config, model)
        _maybe_include_all_linear_layers(peft_config, model)
        targets = [
            (name, module)
            for name, module in model.named_modules()
            if name and self._check_target_module_exists(peft_config, name)
        ]
        check_targets(targets, peft_config.train_base_weight)

    def _default_targets(self, peft_config: LBPWHTConfig, model: nn.Module) -> set[str]:
        names = encoder_linears(model)
        if not names:
            raise ValueError(
                f"No blocks with linear layers were found in {type(model).__name__}. Name the layers to adapt: "
                'target_modules=[...], a regular expression, or "all-linear".'
            )
        if peft_config.layers_to_transform is None:
            return set(names)
        # PEFT counts layers only for targets given by suffix, not for those given by their whole name.
        by_suffix = copy.copy(peft_config)
        by_suffix.target_modules = {name.rpartition(".")[2] for name in names}
        return {name for name in names if self._check_target_module_exists(by_suffix, name)}

    def _create_and_replace(
        self,
        peft_config: LBPWHTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        pattern = get_pattern_key(list(peft_config.rank_pattern), current_key)
        rule = BackwardRule(
            for_weight=peft_config.weight_bases(peft_config.rank_pattern.get(pattern, peft_config.r)),
            for_input=peft_config.input_bases(),
            grid_size=peft_config.grid_size,
            num_prefix_tokens=peft_config.num_prefix_tokens,
        )
        if isinstance(target, LBPWHTLayer):
            target.update_layer(adapter_name, rule, peft_config.train_base_weight, peft_config.inference_mode)
            return
        layer = LBPWHTLinear(
            target,
            self._grid_finder(),
            current_key,
            adapter_name,
            rule,
            peft_config.train_base_weight,
            peft_config.inference_mode,
        )
        if adapter_name not in self.active_adapters:  # an additional adapter is not trained until it is activated
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _grid_finder(self) -> GridFinder:
        """The one that all layers of the model share, whichever adapter brought them."""
        for module in self.model.modules():
            if isinstance(module, LBPWHTLayer):
                return module.finder
        return GridFinder()

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        self._grid_finder().watch(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # a trained copy takes the place of its original as it is
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        finders = {module.finder for module in self.model.modules() if isinstance(module, LBPWHTLayer)}
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for finder in finders:
            finder.detach()
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LBPWHTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_state_dict(model, adapter_name, remapped)
        return remapped
