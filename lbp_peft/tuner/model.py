"""Puts LBP-WHT layers into a model, and takes them out again."""

from __future__ import annotations

import copy
from collections import ChainMap
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .calibrated_state import KEYS as BASIS_KEYS
from .calibrated_state import calibrated_tensors, put_bases, take_bases
from .config import LBPWHTConfig
from .inject import create_and_replace, detach_all, patch_blocks, prepare
from .layers.base import LBPWHTLayer
from .layers.linear import LBPWHTLinear
from .report import LayoutReport, layout_report
from .stacking.stack import KEYS, Stack, has_other_adapters, restore_adapter_states, stack_beneath
from .validation.checkpoint import adapter_keys, check_state_dict
from .validation.heads import warn_of_frozen_heads
from .validation.modules import check_modules_to_save
from .validation.names import is_free_in_dictionaries
from .weighted import add_weighted_adapter


class LBPWHTModel(BaseTuner):
    """A model whose targeted layers have LBP-WHT adapters.

    `get_peft_model(model, LBPWHTConfig(...))` makes it. It is `base_model` of the model that this function returns.

    On a model that another PEFT method has adapted, it makes that method's backward pass cheap: the other adapters stay
    in the model under their own names, are trained, and are saved and loaded along with this one.

    Args:
        model: The model, which is adapted in place. If it is a `PeftModel`, the model inside it is adapted.
        peft_config: The configurations of the adapters, by name; or a single one, when PEFT injects the adapter.
        adapter_name: The name of the first adapter.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be filled by a checkpoint.
        state_dict: See PEFT.

    Attributes:
        stack: The adapters of another method that it is stacked on; None: there are none.
    """

    prefix: str = "lbpwht_"
    tuner_layer_cls = LBPWHTLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # targets are found from the structure, see encoder.py

    def __init__(
        self,
        model: nn.Module,
        peft_config: LBPWHTConfig | dict[str, LBPWHTConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ):
        # An injected adapter joins those that are there, whereas a PeftModel has a list of its own.
        injected = isinstance(peft_config, PeftConfig)
        config: Any = peft_config if injected else peft_config[adapter_name]
        self.peft_config: Any
        self.stack = None if injected else stack_beneath(model)
        if config.stack_on and injected:
            raise ValueError(_no_stack_by_injection(config))
        if config.stack_on and self.stack is not None:
            raise ValueError(
                "stack_on brings adapters of its own and needs a plain model. To stack on those of this model, leave "
                "it out; to put both on a plain model, use get_peft_model."
            )
        if config.stack_on:
            for config_beneath in config.stack_on.values():
                check_modules_to_save(model, config_beneath)
            self.stack = Stack.build(model, config.stack_on, config.stack_active or [], config.inference_mode)
        if self.stack is None:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
            return
        config = copy.copy(config)  # stack_on is set in it, and not in the caller's
        peft_config = {adapter_name: config}
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = self.stack.base_model_name_or_path
        model = self.stack.base_model
        configs_beneath = model.__dict__.pop("peft_config")  # so that PEFT does not add to it
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            model.peft_config = configs_beneath
            if config.stack_on:
                self.stack.holder.unload()
            raise
        self.peft_config = ChainMap(self.peft_config, self.stack.configs)
        model.peft_config = configs_beneath

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as AdaLoRA's update_and_allocate
            stack = self.__dict__.get("stack")
            if stack is None or not isinstance(stack.holder, PeftModel) or name == "peft_config":
                raise
            return getattr(stack.holder.base_model, name)

    @property
    def stacked_on(self) -> nn.Module | None:
        """The model of the other method. Its `save_pretrained` writes a checkpoint of that method alone."""
        return None if self.stack is None else self.stack.holder

    def layout_report(self) -> LayoutReport:
        """A report of how the backward pass of each adapted layer ran last, see [`lbp_peft.layout_report`]."""
        return layout_report(self.model)

    def _prepare_adapter_config(self, peft_config: LBPWHTConfig, model_config: dict) -> LBPWHTConfig:
        return peft_config

    def _prepare_model(self, peft_config: LBPWHTConfig, model: nn.Module) -> None:
        prepare(self, peft_config, model)

    def _create_and_replace(self, peft_config: LBPWHTConfig, *args: Any, **kwargs: Any) -> None:
        create_and_replace(self, peft_config, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.peft_config[adapter_name].stack_on and self._is_built():
            raise ValueError(
                f"Adapter {adapter_name!r} was stacked on adapters of its own. Load it into a plain model, with "
                "PeftModel.from_pretrained."
            )
        if not is_free_in_dictionaries(adapter_name):
            raise ValueError(
                f"An adapter cannot be called {adapter_name!r}: PyTorch's dictionaries of parameters take no key with "
                "a dot, and none that is the name of one of their methods."
            )
        with restore_adapter_states(model) if has_other_adapters(model) else nullcontext():
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        patch_blocks(model, self._checks_targets)
        if not self.peft_config[adapter_name].inference_mode:
            warn_of_frozen_heads(model)

    def _is_built(self) -> bool:
        return any(isinstance(module, LBPWHTLayer) for module in self.model.modules())

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            names: list[str] = super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # some detectors tie weights and have no word embedding
            return []
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # the trained copy replaces its original
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # Calls for the adapters of the other method, whose PeftModel and tuner are not submodules of this one.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tuner = None if self.stack is None else self.stack.tuner
        if tuner is None or type(tuner).forward is BaseTuner.forward or tuner.model is not self.model:
            return super().forward(*args, **kwargs)
        return tuner(*args, **kwargs)  # AdaLoRA adds to the loss

    def train(self, mode: bool = True) -> LBPWHTModel:
        super().train(mode)
        if self.stack is not None:
            self.stack.train(mode)
        return self

    def enable_adapter_layers(self) -> None:
        if self.stack is None or self.stack.tuner is None:
            super().enable_adapter_layers()
        else:
            self.stack.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        self._check_base_weights("Disabling the adapter")
        if self.stack is None or self.stack.tuner is None:
            super().disable_adapter_layers()
        else:
            self.stack.enable_adapters(False)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.stack is not None and self.stack.tuner is not None:
            self.stack.tuner._check_merge_allowed()
        for module in self.model.modules():  # check all of them before the first is merged
            if isinstance(module, LBPWHTLinear) and module.weights_in_effect():
                module.check_base_weight_is_a_parameter()

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        tuner: Any = None if self.stack is None else self.stack.tuner
        if hasattr(tuner, "_enable_peft_forward_hooks"):
            hooks: AbstractContextManager[Any] = tuner._enable_peft_forward_hooks(*args, **kwargs)
            return hooks
        for argument in ("adapter_names", "alora_offsets"):  # which PEFT would ignore silently
            if kwargs.get(argument) is not None:
                raise ValueError(
                    f"{argument}: only LoRA chooses an adapter for each image of a batch. Call "
                    "model.set_adapter(name), and pass the images of one adapter at a time."
                )
        return nullcontext()

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter that is a linear combination of others: the base weights plus the weighted sum of what each of
        them changed.

        Each layer that one of them adapts, with its bias, and each of their modules_to_save is combined; what an
        adapter does not adapt counts as unchanged by it. With weights that sum to 1 this averages the adapters'
        weights. The new adapter has the settings of the first and is, as in PEFT, neither active nor trained. On a
        stack, names of adapters beneath are passed on to their own method, with all arguments, in its own signature.

        Args:
            adapters: Names of adapters that have weights of their own.
            weights: One weight for each adapter, of any sign.
            adapter_name: The name of the new adapter.
            *args: `combination_type`, which can only be "linear", the default.
            **kwargs: The same by name.

        Raises:
            ValueError: a name is unknown or taken, an adapter has no weights (train_base_weight=False), the numbers of
                names and weights differ, a weight is not a finite number, another combination_type is asked for, or
                modules_to_save hold buffers that differ. Nothing is added then.
        """
        configs_beneath = {} if self.stack is None else self.stack.configs
        own_configs = self.peft_config.maps[0] if isinstance(self.peft_config, ChainMap) else self.peft_config
        if configs_beneath and all(name in configs_beneath for name in adapters):
            tuner = self.stack.tuner  # type: ignore[union-attr]
            if not hasattr(tuner, "add_weighted_adapter"):
                raise ValueError(
                    f"The adapters beneath, {', '.join(adapters)}, cannot be combined: "
                    + (
                        "transformers injected them. Put them on with get_peft_model instead."
                        if tuner is None
                        else f"{type(tuner).__name__} has no add_weighted_adapter."
                    )
                )
            tuner.add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        else:
            add_weighted_adapter(self, own_configs, adapters, weights, adapter_name, *args, **kwargs)

    # Switching adapters. A name means every adapter that has it, of LBP-WHT and of the other method.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self.stack is None or not isinstance(self.peft_config, ChainMap):  # for instance while it is being built
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            return
        if names_on_top := [name for name in names if name in self.peft_config.maps[0]]:
            set_adapter(self.model, names_on_top, inference_mode=inference_mode, layer_cls=LBPWHTLayer)
            self.active_adapter = names_on_top
        if names_beneath := [name for name in names if name in self.stack.configs]:
            self.stack.set_adapter(names_beneath, inference_mode=inference_mode)
        modules_to_save = {name: self.peft_config[name].modules_to_save or [] for name in self.active_adapters}
        self.stack.activate_modules_to_save(modules_to_save, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.stack is not None and adapter_name in self.stack.configs:
            self.stack.delete_adapter(adapter_name)
            if adapter_name not in self.peft_config:
                return
        self._check_base_weights(f"Deleting the adapter {adapter_name!r}")
        super().delete_adapter(adapter_name)

    def _check_base_weights(self, operation: str) -> None:
        """Check that all base weights are available, before the first layer is changed."""
        for module in self.model.modules():
            if isinstance(module, LBPWHTLinear):
                module.check_base_weight(operation)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        if not (args[0] if args else kwargs.get("merge", True)):
            self._check_base_weights("Unloading the adapter without merging it")
        finders = detach_all(self.model)
        holder = self.stacked_on
        tuner: Any = holder.base_model if isinstance(holder, PeftModel) else super()
        model: nn.Module = tuner._unload_and_optionally_merge(*args, **kwargs)
        if self._is_built():  # it was stacked by `stack_on`, whose adapters are removed already
            model = super()._unload_and_optionally_merge(*args, **kwargs)
        for finder in finders:
            finder.detach()
        return model

    # Checkpoints

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LBPWHTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        tensors = {key: state_dict[key] for key in sorted(adapter_keys(model, adapter_name))}
        tensors.update(calibrated_tensors(model, adapter_name))
        if (stack := _stack_of(model)) is not None:
            config.stack_on, config.stack_active = stack.describe()
            tensors.update(stack.modules_to_save(state_dict))
            tensors.update(stack.state_dict(state_dict, unwanted_adapter_names))
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if key.startswith(KEYS) or BASIS_KEYS in key:
            return key
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LBPWHTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors_beneath = {key: tensor for key, tensor in state_dict.items() if key.startswith(KEYS)}
        own_tensors = {key: tensor for key, tensor in state_dict.items() if key not in tensors_beneath}
        stack = _stack_of(model)
        if stack is not None:
            own_tensors = stack.without_shared(own_tensors, tensors_beneath, adapter_name)
        bases, own_tensors = take_bases(model, adapter_name, own_tensors)
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, own_tensors
        )
        check_state_dict(model, adapter_name, remapped)
        if stack is not None:
            stack.load_state_dict(tensors_beneath)
        put_bases(model, bases, adapter_name)
        return remapped


def _stack_of(model: nn.Module) -> Stack | None:
    tuner = getattr(model, "base_model", None)
    return tuner.stack if isinstance(tuner, LBPWHTModel) else None


def _no_stack_by_injection(config: Any) -> str:
    """The message for transformers' own `from_pretrained`, `load_adapter`, `add_adapter` and `pipeline`: no stacks."""
    methods = ", ".join(sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in config.stack_on.values()}))
    return (
        f"This adapter is a stack, LBP-WHT on {methods} (stack_on). transformers' own from_pretrained, load_adapter, "
        "add_adapter and PEFT's inject_adapter_in_model take one method only. Load a stack into its base model: "
        "PeftModel.from_pretrained(base_model, folder); create one: get_peft_model(base_model, config). For inference "
        f"the {methods} part is enough, which model.stacked_on.save_pretrained(folder) writes as a checkpoint of its "
        "own that transformers loads."
    )
