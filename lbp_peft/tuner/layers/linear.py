"""A linear layer with LBP-WHT adapters: which weight it uses."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.func import functional_call

from ...layer_types import LayerType, is_plain_linear, layer_type_of, register_layer_type
from ...layout import LayoutFinder
from ...ops.linear import low_rank_linear
from ...ops.plan import BackwardPlan
from ...ops.recompute import low_rank_layer
from .base import LBPWHTLayer
from .calling import (
    WATCHED,
    call_with,
    eagerly,
    has_hooks,
    has_own_forward,
    has_to_be_called,
    is_offloaded,
    onloaded,
    parts_are_watched,
)
from .rule import BackwardRule
from .waiting import DROPPED, RESIDENT, WaitingBaseWeight


@register_layer_type("torch.nn.Linear", is_plain_linear)
class LBPWHTLinear(WaitingBaseWeight, LBPWHTLayer):
    """`nn.Linear` with LBP-WHT adapters. An adapter's weight is a full copy of the base weight, trained; the base stays
    intact, see [`WaitingBaseWeight`].

    Args:
        base_layer: The adapted layer.
        finder: Knows where tokens lie; shared by all layers of the model.
        layer_name: Of the layer in the model, for messages.
        adapter_name: The first adapter.
        rule: Its backward pass.
        train_base_weight: Whether it trains a copy of the weight and the bias.
        inference_mode: Whether it is frozen.
        base_weights: Where the base weight waits while it is active, see [`LBPWHTConfig`].
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
        self._init_waiting()
        self.base_layer = base_layer
        self.lbpwht_weight = nn.ParameterDict({})
        self.lbpwht_bias = nn.ParameterDict({})
        self._unmerged: tuple[Tensor | None, Tensor | None] | None = None
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
            base_weights: Where the base weight waits while only this adapter is active, see [`LBPWHTConfig`].
        """
        self.check_base_weight(f"Adding the adapter {adapter_name!r}")
        self.lbpwht_rule[adapter_name] = rule
        self.lbpwht_base_weights[adapter_name] = base_weights
        with onloaded(self.get_base_layer()):
            if train_base_weight:
                weight, bias = self._base_parameters()
                weight = weight.detach()  # where the base's is dropped, it is itself trained
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
        rule = self._active_rule(x)
        if rule is None and not self.weights_in_effect():
            return self._call_base_layer(x)
        if "_hf_hook" not in vars(self.lbpwht_weight):
            return self._compute(x, rule)
        self._refuse_to_train_what_is_offloaded()
        with onloaded(self.lbpwht_weight, self.lbpwht_bias):
            return self._compute(x, rule)

    def _call_base_layer(self, x: Tensor) -> Tensor:
        if (self.is_dropped or self._file is not None) and not self.merged:
            self.check_base_weight("Running the model without its adapter")
        return self.base_layer(x)

    def _compute(self, x: Tensor, rule: BackwardRule | None) -> Tensor:
        if not self.layer_type.matches(self.get_base_layer()) or has_own_forward(self.base_layer):
            return self._run_base_layer(x, rule)
        if not has_to_be_called(self.base_layer):
            return self._multiply_adapted(rule, x)
        forward = functools.partial(self._multiply_adapted, rule)
        return eagerly(call_with, self.base_layer, forward, x)

    def _multiply_adapted(self, rule: BackwardRule | None, x: Tensor) -> Tensor:
        """In the place of a plain base layer's forward method."""
        weight, bias = self._adapted_parameters()
        plan = None if rule is None else self._plan(x, self.get_base_layer(), weight.requires_grad, rule)
        if plan is None:
            return self._multiply(x, weight, bias)
        return self._as_one_operation(x, lambda: self._multiply_low_rank(x, weight, bias, plan))

    def _run_base_layer(self, x: Tensor, rule: BackwardRule | None) -> Tensor:
        """Where the base layer computes something else, or in another way, than a plain one."""
        base = self.base_layer
        if self.weights_in_effect():
            if rule is not None:
                self._fall_back(x, *_OWN_FORWARD, cause=_OWN_FORWARD[0])
            return functional_call(base, self._parameters_to_put_in(base), (x,))
        plan = None
        if rule is not None:
            trains_weight = self._base_parameters()[0].requires_grad
            plan = self._in_full_precision(x, self._plan(x, self.get_base_layer(), trains_weight, rule))
        if plan is None:
            return base(x)
        if has_own_forward(base) or has_hooks(base) or parts_are_watched(base):
            self._fall_back(x, *WATCHED, cause=WATCHED[0])
            return base(x)
        if not self._is_token_wise(base, x, None):
            return base(x)
        return self._as_one_operation(x, lambda: low_rank_layer(base, x, plan=plan))

    def _parameters_to_put_in(self, base: nn.Module) -> dict[str, Tensor]:
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

    def check_base_weight_is_a_parameter(self) -> None:
        """Raise ValueError where a parametrization or a hook computes it anew and would undo what is written to it."""
        base = self.get_base_layer()
        if "weight" not in base._parameters:
            raise ValueError(
                f"The weight of {self.layer_name} is computed by a parametrization or by pruning, so no other can be "
                "put in its place. Make it a plain parameter first, with "
                "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove or "
                "torch.nn.utils.remove_weight_norm."
            )

    def _refuse_to_train_what_is_offloaded(self) -> None:
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
        return base.in_features, base.out_features

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _multiply_low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: BackwardPlan) -> Tensor:
        return low_rank_linear(x, weight, bias, plan=plan, parameter=self._parameter_of_weight())

    def __repr__(self) -> str:
        return "lbpwht." + super().__repr__()

    # What the layer computes with

    @property
    def weight(self) -> Tensor:
        """The weight the layer works with, for code that reads it instead of calling the layer; shape (out, in)."""
        return self._adapted_parameters()[0]

    @property
    def bias(self) -> Tensor | None:
        return self._adapted_parameters()[1]

    def _shape_of_weight(self, base: Any) -> torch.Size:
        if not self.is_dropped:
            return super()._shape_of_weight(base)
        return next(iter(self.lbpwht_weight.values())).shape

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.check_base_weight("Disabling the adapter")
        super().enable_adapters(enabled)
        self._base_weight_may_be_needed()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._base_weight_may_be_needed()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.lbpwht_weight:
            self.check_base_weight(f"Deleting the adapter {adapter_name!r}")
        super().delete_adapter(adapter_name)
        self._base_weight_may_be_needed()

    def _base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Those of the base layer, as they were before any merge, on the layer's device."""
        base = self.get_base_layer()
        weight: Any
        weight, bias = (base.weight, base.bias) if self._unmerged is None else self._unmerged
        if self.is_dropped or self._is_on_host or self._file is not None:
            weight = self._waiting_weight(weight)
        return weight, bias

    def _dtypes_of_base(self) -> tuple[torch.dtype, torch.dtype | None]:
        """The dtypes of the base weight and bias, which the layer computes in; None: it has no bias."""
        base = self.get_base_layer()
        weight: Any
        weight, bias = (base.weight, base.bias) if self._unmerged is None else self._unmerged
        return self._dropped_dtype if self.is_dropped else weight.dtype, None if bias is None else bias.dtype

    def weights_in_effect(self) -> list[str]:
        """The adapters whose weights the layer computes with, in place of those of the base layer."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lbpwht_weight]

    def _parameter_of_weight(self) -> Tensor | None:
        """The one that the weight is, or is a cast of; None where it is the sum of several."""
        names = self.weights_in_effect()
        if len(names) > 1:
            return None
        return self.lbpwht_weight[names[0]] if names else self._base_parameters()[0]

    def _adapted_parameters(self) -> tuple[Tensor, Tensor | None]:
        if self.disable_adapters:
            return self._base_parameters()
        if self.merged:
            base = self.get_base_layer()
            return base.weight, base.bias
        return self._combined_parameters(self.active_adapters)

    def _combined_parameters(self, adapter_names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Those of one adapter; of several, the base's plus what each of them changed. In the base layer's dtype."""
        trained = [name for name in adapter_names if name in self.lbpwht_weight]
        if len(trained) == 1:  # nearly always, and then the base weight may be elsewhere
            dtype, dtype_of_bias = self._dtypes_of_base()
            bias = None if dtype_of_bias is None else self.lbpwht_bias[trained[0]].to(dtype_of_bias)
            return self.lbpwht_weight[trained[0]].to(dtype), bias
        weight, bias = self._base_parameters()
        weight = _plus_changes(weight, [self.lbpwht_weight[name] for name in trained])
        if bias is not None:
            bias = _plus_changes(bias, [self.lbpwht_bias[name] for name in trained])
        return weight, bias

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter changed: its weight less the base layer's, shape (C_out, C_in)."""
        weight, _ = self._base_parameters()
        if adapter not in self.lbpwht_weight:
            return torch.zeros_like(weight)
        return self.lbpwht_weight[adapter].detach() - weight.detach()

    @torch.no_grad()
    def combine(self, new: str, weights: list[tuple[str, float]]) -> None:
        """Make an adapter's weight and bias the base's plus the weighted sum of what others changed.

        Args:
            new: The adapter to fill.
            weights: Of the others, by name. Those that do not adapt this layer changed nothing.
        """
        weight, bias = self._base_parameters()
        for base, copies in ((weight, self.lbpwht_weight), (bias, self.lbpwht_bias)):
            given = [(copies[name], factor) for name, factor in weights if name in copies]
            if base is not None and given:
                copies[new].data = weighted_sum_of_changes(base, given)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A LoRA has no place for a trained bias."""
        return adapter_name not in self.lbpwht_bias

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weights into the base layer.

        Args:
            safe_merge: Check for NaN and infinity first.
            adapter_names: Default: the active ones.

        Raises:
            ValueError: safe_merge, and an adapter is broken. Nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lbpwht_rule]
        if not any(name in self.lbpwht_weight for name in names):
            self.merged_adapters = [*self.merged_adapters, *names]
            return
        self.check_base_weight_is_a_parameter()
        with torch.no_grad():
            weight, bias = self._combined_parameters([*self.merged_adapters, *names])
            if safe_merge and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
                raise ValueError(
                    f"NaNs detected in the merged weights of {self.layer_name}. The adapter {', '.join(names)} seems "
                    "to be broken."
                )
            base = self.get_base_layer()
            if self._unmerged is None:
                # Kept, not recomputed: taking differences back out would not restore the base weight bit for bit.
                kept = None if self.is_dropped else base.weight.data
                self._unmerged = (kept, None if base.bias is None else base.bias.data)
            if base.weight is None:  # it was dropped
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            base.weight.data = weight.detach().clone()
            if bias is not None:
                base.bias.data = bias.detach().clone()
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Give the base layer its own weights back.

        What others merged into it or took out of it in between, as an adapter on top of this layer does, stays with
        this layer's weights.

        Raises:
            ValueError: the base weight was dropped.
            RuntimeError: the file that the base weight waited in was overwritten.
        """
        if self._unmerged is not None:
            self.check_base_weight("Unmerging the adapter")
        names, self.merged_adapters = self.merged_adapters, []
        if self._unmerged is None:
            return
        base = self.get_base_layer()
        merged = self._combined_parameters(names)
        stash, self._unmerged = self._unmerged, None
        name = next(name for name in names if name in self.lbpwht_weight)
        _restore(base.weight, stash[0], merged[0], self.lbpwht_weight[name])
        if base.bias is not None:
            _restore(base.bias, stash[1], merged[1], self.lbpwht_bias[name])
        self._is_on_host = False  # it came to the layer's device
        self._watch_training()


def can_be_dropped(base: nn.Module) -> bool:
    """Whether a layer's own weight is needed by nothing but the forward method of a plain layer."""
    weight = base._parameters.get("weight")
    is_ours = weight is not None and not weight.is_meta and not hasattr(weight, "ds_status")
    return layer_type_of(base) is not None and is_ours and not has_own_forward(base) and "_hf_hook" not in vars(base)


_OWN_FORWARD = (
    "its forward method was replaced on the instance",
    "Subclass the layer's type and exclude it, or replace the forward method of the module around it instead.",
)


def _plus_changes(base: Tensor, adapted: list[Tensor]) -> Tensor:
    """The base plus what each adapted copy of it changed, in the base's dtype."""
    if not adapted:
        return base
    if len(adapted) == 1:
        return adapted[0].to(base.dtype)
    master = base.to(adapted[0].dtype)
    return (master + torch.stack([copy - master for copy in adapted]).sum(dim=0)).to(base.dtype)


def weighted_sum_of_changes(base: Tensor, adapted: list[tuple[Tensor, float]]) -> Tensor:
    """The base plus, for each adapted copy of it, a multiple of what it changed; in the copies' dtype."""
    dtype = adapted[0][0].dtype
    master = torch.promote_types(dtype, torch.float32)
    # Written so that a single copy of weight 1, or the mean of equal ones, comes out to the bit.
    total = (1 - math.fsum(factor for _, factor in adapted)) * base.detach().to(master)
    for copy, factor in adapted:
        total = total + factor * copy.detach().to(master)
    return total.to(dtype)


@torch.no_grad()
def _restore(base: Tensor, stash: Any, merged: Any, copy: Tensor) -> None:
    """Put the stash back into a parameter; what it differs by from what was merged goes to the adapter's copy."""
    if base.dtype == stash.dtype and not torch.equal(base, merged):
        copy += (base - merged).to(copy)
    base.data = stash.to(base)
