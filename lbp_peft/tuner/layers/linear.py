"""A linear layer with LBP-WHT adapters: how its output is computed, depending on what the base layer is."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn
from torch.func import functional_call

from ...layer_types import LayerType, is_plain_linear, layer_type_of, register_layer_type
from ...layout import LayoutFinder
from ...ops.linear import low_rank_linear
from ...ops.plan import BackwardPlan
from ...ops.recompute import low_rank_layer
from .adapted_weights import AdaptedWeights
from .base import LBPWHTLayer
from .calling import (
    SIDE_EFFECTS,
    call_eagerly,
    call_with,
    has_hooks,
    has_own_forward,
    has_to_be_called,
    is_offloaded,
    onload_parameters,
    rerun_has_side_effects,
)
from .offloading import DROPPED, RESIDENT
from .rule import BackwardRule


@register_layer_type("torch.nn.Linear", is_plain_linear)
class LBPWHTLinear(AdaptedWeights, LBPWHTLayer):
    """`nn.Linear` with LBP-WHT adapters.

    The weight of an adapter is a trained copy of the base weight. The base weight itself is not changed; it may be
    offloaded during training, see [`lbp_peft.tuner.layers.offloading`].

    Args:
        base_layer: The adapted layer.
        finder: Finds where tokens lie; shared by all layers of the model.
        layer_name: The name of the layer in the model, for messages.
        adapter_name: The name of the first adapter.
        rule: The first adapter's settings for the backward pass.
        train_base_weight: Whether this adapter trains a copy of the weight and the bias.
        inference_mode: Whether this adapter is frozen.
        base_weights: Where the base weight is offloaded while only this adapter is active, see [`LBPWHTConfig`].
    """

    adapter_layer_names = ("lbpwht_weight", "lbpwht_bias")
    other_param_names = (*LBPWHTLayer.other_param_names, "lbpwht_base_weights")
    layer_type: ClassVar[LayerType]

    def __init__(
        self,
        base_layer: nn.Module,
        finder: LayoutFinder,
        layer_name: str,
        adapter_name: str,
        rule: BackwardRule,
        train_base_weight: bool = True,
        inference_mode: bool = False,
        base_weights: str = RESIDENT,
    ):
        super().__init__()
        LBPWHTLayer.__init__(self, finder, layer_name)
        self.base_layer = base_layer
        self._init_weights()
        self.in_features, self.out_features = self._num_features(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rule, train_base_weight, inference_mode, base_weights)

    def update_layer(
        self,
        adapter_name: str,
        rule: BackwardRule,
        train_base_weight: bool,
        inference_mode: bool = False,
        base_weights: str = RESIDENT,
    ) -> None:
        """Add an adapter, whose weights start as the base layer's.

        Args:
            adapter_name: The adapter's name.
            rule: Its settings for the backward pass.
            train_base_weight: Whether it has weights of its own.
            inference_mode: Whether these are frozen.
            base_weights: Where the base weight is offloaded while only this adapter is active, see [`LBPWHTConfig`].
        """
        self.check_base_weight(f"Adding the adapter {adapter_name!r}")
        self.lbpwht_rule[adapter_name] = rule
        self.lbpwht_base_weights[adapter_name] = base_weights
        with onload_parameters(self.get_base_layer()):
            if train_base_weight:
                weight, bias = self._base_parameters()
                weight = weight.detach()  # with "dropped", the base weight itself becomes the trained weight
                self.lbpwht_weight[adapter_name] = nn.Parameter(weight if base_weights == DROPPED else weight.clone())
                if bias is not None:
                    self.lbpwht_bias[adapter_name] = nn.Parameter(bias.detach().clone())
            device = self._device_of_copies() if self._is_on_host else None
            self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        if self.disable_adapters or self.merged:
            self._note_call(x)
            return self._call_base_layer(x)
        rule = self._rule_for(x)
        if rule is None and not self.weights_in_effect():
            return self._call_base_layer(x)
        if "_hf_hook" not in vars(self.lbpwht_weight):
            return self._compute(x, rule)
        self._refuse_to_train_offloaded_weights()
        with onload_parameters(self.lbpwht_weight, self.lbpwht_bias):
            return self._compute(x, rule)

    def _call_base_layer(self, x: Tensor) -> Tensor:
        """The output of the base layer with its own weights."""
        if self._may_be_gone and not self.merged:
            self.check_base_weight("Running the model without its adapter")
        return self.base_layer(x)

    def _compute(self, x: Tensor, rule: BackwardRule | None) -> Tensor:
        """The output of the layer with the adapters' weights, if these have any."""
        if not self.layer_type.matches(self.get_base_layer()) or has_own_forward(self.base_layer):
            return self._run_base_layer(x, rule)
        if not has_to_be_called(self.base_layer):
            return self._multiply_adapted(rule, x)
        forward = functools.partial(self._multiply_adapted, rule)
        return call_eagerly(call_with, self.base_layer, forward, x)

    def _multiply_adapted(self, rule: BackwardRule | None, x: Tensor) -> Tensor:
        """The output of a plain base layer, computed from the weights in effect without its forward method."""
        weight, bias = self._adapted_parameters()
        plan = None if rule is None else self._plan(x, self.get_base_layer(), weight.requires_grad, rule)
        if plan is None:
            return self._multiply(x, weight, bias)
        return self._as_one_operation(x, lambda: self._multiply_low_rank(x, weight, bias, plan))

    def _run_base_layer(self, x: Tensor, rule: BackwardRule | None) -> Tensor:
        """The output of a base layer that is not plain, such as a quantized one, by its own forward method."""
        base = self.base_layer
        if self.weights_in_effect():
            if rule is not None:
                self._fall_back(x, *_REPLACED_FORWARD)
            return functional_call(base, self._replacement_parameters(base), (x,))
        plan = None
        if rule is not None:
            trains_weight = self._base_parameters()[0].requires_grad
            plan = self._in_full_precision(x, self._plan(x, self.get_base_layer(), trains_weight, rule))
        if plan is None:
            return base(x)
        if has_own_forward(base) or has_hooks(base) or rerun_has_side_effects(base):
            self._fall_back(x, *SIDE_EFFECTS)
            return base(x)
        if not self._is_token_wise(base, x, None):
            return base(x)
        return self._as_one_operation(x, lambda: low_rank_layer(base, x, plan=plan))

    def _replacement_parameters(self, base: nn.Module) -> dict[str, Tensor]:
        """The weights in effect, for a call of the base layer with them. Raises ValueError if that is not possible."""
        self.check_base_weight_is_a_parameter()
        if self.is_dropped:
            self.check_base_weight("A layer whose forward method was replaced")
        if is_offloaded(base):
            raise ValueError(
                f"The base layer of {self.layer_name} is offloaded by accelerate, and its forward method was replaced "
                "on the instance, so that no other weight can be put in. Undo either, or set train_base_weight=False."
            )
        weight, bias = self._adapted_parameters()
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def _refuse_to_train_offloaded_weights(self) -> None:
        """Raise RuntimeError if accelerate has offloaded weights that are trained."""
        trained = [p for parameters in (self.lbpwht_weight, self.lbpwht_bias) for p in parameters.values()]
        trains = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in trained)
        if trains and is_offloaded(self.lbpwht_weight):
            raise RuntimeError(
                f"accelerate has offloaded the trained weights of {self.layer_name}, and would throw their gradients "
                "away. Offload the base model before get_peft_model: the adapters' weights then stay on the device "
                "that they are trained on."
            )

    def _channels_axis(self, x: Tensor) -> int:
        return self.layer_type.channels_axis

    def _num_features(self, base: Any) -> tuple[int, int]:
        """C_in and C_out of a base layer."""
        return base.in_features, base.out_features

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's forward pass with a given weight and bias."""
        return F.linear(x, weight, bias)

    def _multiply_low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: BackwardPlan) -> Tensor:
        """[`_multiply`] with a backward pass that follows a plan."""
        return low_rank_linear(x, weight, bias, plan=plan, parameter=self._parameter_of_weight())

    # Switching adapters

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.check_base_weight("Disabling the adapter")
        super().enable_adapters(enabled)
        self._reload_if_needed()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._reload_if_needed()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.lbpwht_weight:
            self.check_base_weight(f"Deleting the adapter {adapter_name!r}")
        super().delete_adapter(adapter_name)
        self._reload_if_needed()

    def _shape_of_weight(self, base: Any) -> torch.Size:
        if not self.is_dropped:
            return super()._shape_of_weight(base)
        return next(iter(self.lbpwht_weight.values())).shape

    def __repr__(self) -> str:
        return "lbpwht." + super().__repr__()


def can_be_dropped(base: nn.Module) -> bool:
    """Whether only the forward method of a plain layer needs the weight of this one, so that it can be dropped."""
    weight = base._parameters.get("weight")
    is_ours = weight is not None and not weight.is_meta and not hasattr(weight, "ds_status")
    return layer_type_of(base) is not None and is_ours and not has_own_forward(base) and "_hf_hook" not in vars(base)


_REPLACED_FORWARD = (
    "its forward method was replaced on the instance",
    "Subclass the layer's type and exclude it, or replace the forward method of the module around it instead.",
)
