"""The adapters of another PEFT method that LBP-WHT is stacked on. Their own method still manages them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, delete_adapter
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper, _set_adapter
from torch import Tensor, nn

from ..compat.wrappers import with_wrappers, without_wrappers
from ..layers.base import LBPWHTLayer
from ..validation.names import check_adapter_name, unmatched_modules_to_save

KEYS = "stack_on."  # before the name of the adapter and its own key, in a checkpoint
_PREFIX = "base_model.model."


class Stack:
    """The adapters beneath LBP-WHT, handled through their own method.

    Args:
        holder: A `PeftModel`, or a model that adapters were injected into (transformers' `model.add_adapter`).
    """

    def __init__(self, holder: Any):
        self.holder = holder

    @property
    def configs(self) -> dict[str, PeftConfig]:
        return self.holder.peft_config

    @property
    def base_model(self) -> nn.Module:
        return self.holder.get_base_model() if isinstance(self.holder, PeftModel) else self.holder

    @property
    def base_model_name_or_path(self) -> str | None:
        return next((config.base_model_name_or_path for config in self.configs.values()), None)

    @property
    def active_adapters(self) -> list[str]:
        active = [name for layer in self._layers() for name in layer.active_adapters]
        return [name for name in dict.fromkeys(active) if name in self.configs]

    def _layers(self) -> list[BaseTunerLayer]:
        modules = self.base_model.modules()
        return [m for m in modules if isinstance(m, BaseTunerLayer) and not isinstance(m, LBPWHTLayer)]

    @property
    def tuner(self) -> Any:
        """The other method's own tuner; None where transformers injected the adapters, which keeps none."""
        return self.holder.base_model if isinstance(self.holder, PeftModel) else None

    def train(self, mode: bool) -> None:
        """Put the model, and the modules that the other method has around it, into training or evaluation mode."""
        self.holder.train(mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the model on or off, with the warnings that the other method has for it."""
        if enabled:
            self.tuner.enable_adapter_layers()
        else:
            self.tuner.disable_adapter_layers()
        self.holder._adapters_disabled = not enabled

    def set_adapter(self, names: list[str], inference_mode: bool = False) -> None:
        for layer in self._layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter(names, inference_mode=inference_mode)
        if isinstance(self.holder, PeftModel):
            self.holder.base_model.active_adapter = names
            self.holder.active_adapter = names[0]

    def activate_modules_to_save(self, on_top: dict[str, list[str]], inference_mode: bool = False) -> None:
        """Activate the modules_to_save of the active adapters, of those beneath before those on top.

        Args:
            on_top: The names of the modules_to_save of each active LBP-WHT adapter, by name of the adapter.
            inference_mode: Whether they are frozen.
        """
        active = self.active_adapters
        for name, module in self.base_model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                above = [
                    adapter for adapter, saved in on_top.items() if any(f".{name}".endswith(f".{s}") for s in saved)
                ]
                beneath = [adapter for adapter in active if adapter in module._adapters]
                _set_adapter(module, beneath or above or active, inference_mode=inference_mode)

    def delete_adapter(self, name: str) -> None:
        if isinstance(self.holder, PeftModel):
            self.holder.delete_adapter(name)
            return
        peft_type = self.configs.pop(name).peft_type
        layer_cls = PEFT_TYPE_TO_TUNER_MAPPING[peft_type].tuner_layer_cls
        delete_adapter(self.holder, name, PEFT_TYPE_TO_PREFIX_MAPPING[peft_type], layer_cls)

    # Checkpoints

    def describe(self) -> tuple[dict[str, PeftConfig] | None, list[str] | None]:
        """What [`build`] needs: copies of the configurations and the names of the active adapters, or None."""
        configs = {name: copy.deepcopy(config) for name, config in self.configs.items()}
        for config in configs.values():
            config.inference_mode = True
            if saved := getattr(config, "modules_to_save", None):  # PEFT ignores names that match nothing
                unmatched = unmatched_modules_to_save(self.base_model, saved, config.task_type)
                config.modules_to_save = [name for name in saved if name not in unmatched]
        return configs or None, self.active_adapters or None

    @staticmethod
    def build(model: nn.Module, configs: dict[str, PeftConfig], active: list[str], inference_mode: bool) -> Stack:
        """Give a plain model the adapters that [`describe`] described."""
        configs = {name: copy.deepcopy(config) for name, config in configs.items()}
        for config in configs.values():
            config.inference_mode = inference_mode
        (first, config), *others = configs.items()
        name, trained = first, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            holder = PeftModel(model, config, first)
            for name, config in others:
                holder.add_adapter(name, config)
        except Exception as error:
            _remove_adapters(model)
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad
            if isinstance(error, (TypeError, AttributeError, KeyError)):  # the other method does not check all values
                raise ValueError(
                    f"The adapter of stack_on[{name!r}] cannot be made from its configuration: {error}"
                ) from error
            raise
        stack = Stack(holder)
        if active and active != stack.active_adapters:
            stack.set_adapter(active, inference_mode)
            stack.activate_modules_to_save({}, inference_mode)
        return stack

    def modules_to_save(self, whole_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the active modules_to_save, under the names by which PEFT looks them up.

        Args:
            whole_state_dict: The state dict of the model that LBP-WHT made of this one.
        """
        tensors = {}
        for wrapper, module in self.base_model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                prefix = f"{_PREFIX}{wrapper}."
                tensors_of_module = {prefix + key: tensor for key, tensor in module.state_dict().items()}
                tensors_of_module = {
                    key.removeprefix(prefix): whole_state_dict.get(key, tensor)
                    for key, tensor in tensors_of_module.items()
                }
                for name in module.active_adapters:
                    tensors.update(
                        {prefix + k: t for k, t in module.adapter_state_dict(name, tensors_of_module).items()}
                    )
        return tensors

    def state_dict(self, whole_state_dict: dict[str, Tensor], incomplete: list[str]) -> dict[str, Tensor]:
        """The trained tensors of all adapters.

        Args:
            whole_state_dict: The state dict of the model that LBP-WHT made of this one.
            incomplete: Names of adapters of which `whole_state_dict` has no tensors.
        """
        tensors = {}
        for name in self.configs:
            available = {}
            if name not in incomplete:
                is_peft = isinstance(self.holder, PeftModel)
                available = {k if is_peft else k.removeprefix(_PREFIX): t for k, t in whole_state_dict.items()}
            if self._names() - available.keys():  # tensors that a method shares between its layers
                available = self.holder.state_dict() | available
            available = with_wrappers(available, self.holder)
            of_adapter = get_peft_model_state_dict(self.holder, available, name, save_embedding_layers=False)
            for key, tensor in of_adapter.items():
                key = without_wrappers(key)
                if ".lbpwht_" not in key:
                    tensors[f"{KEYS}{name}.{_PREFIX if not key.startswith('base_model.') else ''}{key}"] = tensor
        return tensors

    def _names(self) -> set[str]:
        """The names of all tensors. A state dict has them too, but FSDP gathers it from all processes."""
        shared_too = {"remove_duplicate": False}
        tensors = itertools.chain(self.holder.named_parameters(**shared_too), self.holder.named_buffers(**shared_too))
        return {without_wrappers(name) for name, _ in tensors}

    def without_shared(self, tensors: dict[str, Tensor], beneath: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """The tensors of an adapter on top, without the modules_to_save that it shares with one of its name beneath.

        PEFT writes these for both.

        Args:
            tensors: The tensors of the adapter on top.
            beneath: The tensors of the adapters beneath.
            name: The name of the adapter on top.
        """
        shared = set()
        parts = {key.split(".", 2)[2] for key in beneath}
        for wrapper, module in self.base_model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                for key in (k.removeprefix(_PREFIX).removeprefix(f"{wrapper}.") for k in parts if f"{wrapper}." in k):
                    shared |= {f"{_PREFIX}{wrapper}.{key}", f"{_PREFIX}{wrapper}.modules_to_save.{name}.{key}"}
        return {key: tensor for key, tensor in tensors.items() if key not in shared}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of [`state_dict`].

        Raises:
            ValueError: tensors are missing or do not belong. Nothing is loaded then.
        """
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.configs}
        expected = self.state_dict(self.holder.state_dict(), []).keys()
        missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        if missing or extra:
            raise ValueError(
                "This checkpoint does not fit the adapters beneath LBP-WHT. Tensors: "
                f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} unexpected ({', '.join(extra[:3])}). "
                "Check that its adapter_config.json and the base model are those it was saved with."
            )
        for key, tensor in tensors.items():
            name = next(n for n in parts if key.startswith(f"{KEYS}{n}."))
            own_key = key.removeprefix(f"{KEYS}{name}.")
            parts[name][own_key if isinstance(self.holder, PeftModel) else own_key.removeprefix(_PREFIX)] = tensor
        on_meta = any(p.is_meta for p in self.holder.parameters())
        for name, part in parts.items():
            set_peft_model_state_dict(self.holder, part, adapter_name=name, low_cpu_mem_usage=on_meta)


def stack_beneath(model: nn.Module) -> Stack | None:
    """The adapters of another method that a model has, on which LBP-WHT is to be stacked; None if it has none.

    Raises:
        TypeError: LBP-WHT cannot be put on such a model; the message says what to do instead.
        ValueError: one of its adapters has a name with which a checkpoint could not be loaded.
    """
    if isinstance(model, PeftMixedModel):
        raise TypeError(
            'A PeftMixedModel takes LBP-WHT as one more adapter: model.add_adapter("lbp", LBPWHTConfig(...)).'
        )
    if isinstance(model, PeftModel):
        if model.peft_type == PeftType.LBPWHT:
            raise TypeError("This model has an LBP-WHT adapter already: add another one with model.add_adapter(...).")
        if model.active_peft_config.is_prompt_learning:
            raise TypeError(f"LBP-WHT cannot be stacked on prompt learning ({model.peft_type.value}).")
        if isinstance(model.get_base_model(), PeftModel):
            raise TypeError("LBP-WHT can be stacked on one PeftModel, not on one inside another. Merge the inner one.")
        return _check_adapter_names(Stack(model))
    configs = getattr(model, "peft_config", None)
    others = configs and any(config.peft_type != PeftType.LBPWHT for config in configs.values())
    return _check_adapter_names(Stack(model)) if others else None


def _check_adapter_names(stack: Stack) -> Stack:
    """Refuse names of adapters with which a checkpoint could be saved, but not loaded; return the stack."""
    for name in stack.configs:
        check_adapter_name(name, "The model to stack on")
    return stack


def _remove_adapters(model: nn.Module) -> None:
    """Put back the modules that adapters have replaced, even if an error interrupted the replacement."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            original = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original = module.original_module
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, original)
    model.__dict__.pop("peft_config", None)


def has_other_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters of another method than LBP-WHT."""
    return any(isinstance(m, BaseTunerLayer) and not isinstance(m, LBPWHTLayer) for m in model.modules())


@contextmanager
def restore_adapter_states(model: nn.Module) -> Iterator[None]:
    """Restore, after the block, which modules_to_save are active and which parameters are trained."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    states = [(m, m._active_adapter, m._disable_adapters) for m in wrappers]
    yield
    for wrapper, active, disabled in states:
        wrapper._active_adapter, wrapper._disable_adapters = active, disabled
    for parameter, requires_grad in trained:
        parameter.requires_grad = requires_grad
