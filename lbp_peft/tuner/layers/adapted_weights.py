"""The trained weights of a layer's adapters: combining, merging and unmerging them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .offloading import OffloadedBaseWeight
from .rule import BackwardRule


class AdaptedWeights(OffloadedBaseWeight):
    """The part of an adapted layer that holds its adapters' weights, each of them a full copy of the base weight.

    Attributes:
        lbpwht_weight, lbpwht_bias: The trained weights and biases, by name of the adapter.
    """

    if TYPE_CHECKING:  # attributes of the layer
        lbpwht_rule: dict[str, BackwardRule]
        active_adapters: list[str]
        merged_adapters: list[str]
        disable_adapters: bool

    def _init_weights(self) -> None:
        self._init_offloading()
        self.lbpwht_weight = nn.ParameterDict({})
        self.lbpwht_bias = nn.ParameterDict({})
        self._unmerged: tuple[Tensor | None, Tensor | None] | None = None

    # The weight and bias that the layer computes with

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, shape (C_out, C_in), for code that reads it."""
        return self._adapted_parameters()[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer computes with, shape (C_out,); None: it has no bias."""
        return self._adapted_parameters()[1]

    def _base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight and bias before any merge, on the layer's device."""
        base = self.get_base_layer()
        weight: Any
        weight, bias = (base.weight, base.bias) if self._unmerged is None else self._unmerged
        if self._may_be_gone or self._is_on_host:
            weight = self._base_weight_on_device(weight)
        return weight, bias

    def _dtypes_of_base(self) -> tuple[torch.dtype, torch.dtype | None]:
        """The dtypes of the base weight and bias, in which the layer computes; None: it has no bias."""
        base = self.get_base_layer()
        weight: Any
        weight, bias = (base.weight, base.bias) if self._unmerged is None else self._unmerged
        return self._dropped_dtype if self.is_dropped else weight.dtype, None if bias is None else bias.dtype

    def weights_in_effect(self) -> list[str]:
        """The adapters whose weights replace those of the base layer in the forward pass."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lbpwht_weight]

    def _parameter_of_weight(self) -> Tensor | None:
        """The parameter that the weight is, or is a cast of; None if the weight is a sum of several."""
        names = self.weights_in_effect()
        if len(names) > 1:
            return None
        return self.lbpwht_weight[names[0]] if names else self._base_parameters()[0]

    def _adapted_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that the layer computes with."""
        if self.disable_adapters:
            return self._base_parameters()
        if self.merged:
            base = self.get_base_layer()
            return base.weight, base.bias
        return self._combined_parameters(self.active_adapters)

    def _combined_parameters(self, adapter_names: list[str]) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of one adapter, or those of the base layer plus the changes by several, in its dtype."""
        trained = [name for name in adapter_names if name in self.lbpwht_weight]
        if len(trained) == 1:  # the usual case, in which the base weight may be offloaded
            dtype, dtype_of_bias = self._dtypes_of_base()
            bias = None if dtype_of_bias is None else self.lbpwht_bias[trained[0]].to(dtype_of_bias)
            return self.lbpwht_weight[trained[0]].to(dtype), bias
        weight, bias = self._base_parameters()
        weight = _plus_changes(weight, [self.lbpwht_weight[name] for name in trained])
        if bias is not None:
            bias = _plus_changes(bias, [self.lbpwht_bias[name] for name in trained])
        return weight, bias

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change by an adapter: its weight minus the base layer's, shape (C_out, C_in)."""
        weight, _ = self._base_parameters()
        if adapter not in self.lbpwht_weight:
            return torch.zeros_like(weight)
        return self.lbpwht_weight[adapter].detach() - weight.detach()

    @torch.no_grad()
    def combine(self, new: str, weights: list[tuple[str, float]]) -> None:
        """Set an adapter's weight and bias to the base's plus a weighted sum of the changes by other adapters.

        Args:
            new: The adapter to set.
            weights: The other adapters, with their weights. Those that do not adapt this layer are skipped.
        """
        weight, bias = self._base_parameters()
        for base, copies in ((weight, self.lbpwht_weight), (bias, self.lbpwht_bias)):
            weighted_copies = [(copies[name], factor) for name, factor in weights if name in copies]
            if base is not None and weighted_copies:
                copies[new].data = weighted_sum_of_changes(base, weighted_copies)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be converted to LoRA, which has no trained bias."""
        return adapter_name not in self.lbpwht_bias

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weights into the base layer.

        Args:
            safe_merge: Check for NaN and infinity first.
            adapter_names: The adapters to merge; None: the active ones.

        Raises:
            ValueError: with safe_merge, if a weight is not finite. Nothing is changed then.
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
                # Kept, since subtracting the changes would not restore the base weight bit for bit.
                unmerged_weight = None if self.is_dropped else base.weight.data
                self._unmerged = (unmerged_weight, None if base.bias is None else base.bias.data)
            if base.weight is None:  # the base weight was dropped
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            base.weight.data = weight.detach().clone()
            if bias is not None:
                base.bias.data = bias.detach().clone()
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Give the base layer its own weights back.

        If the merged weights were changed in between, as they are when an adapter on top of this layer is merged, the
        change is added to the adapter's weights.

        Raises:
            ValueError: the base weight was dropped.
            RuntimeError: the file to which the base weight was offloaded has been overwritten.
        """
        if self._unmerged is not None:
            self.check_base_weight("Unmerging the adapter")
        names, self.merged_adapters = self.merged_adapters, []
        if self._unmerged is None:
            return
        base = self.get_base_layer()
        merged = self._combined_parameters(names)
        (weight, bias), self._unmerged = self._unmerged, None
        name = next(name for name in names if name in self.lbpwht_weight)
        assert weight is not None, "check_base_weight raises where the base weight was dropped"
        _restore(base.weight, weight, merged[0], self.lbpwht_weight[name])
        if bias is not None and merged[1] is not None:
            _restore(base.bias, bias, merged[1], self.lbpwht_bias[name])
        self._is_on_host = False  # `_restore` has moved it to the layer's device
        self._watch_training()

    def check_base_weight_is_a_parameter(self) -> None:
        """Raise ValueError if a parametrization or a hook computes the weight and would overwrite any other value."""
        base = self.get_base_layer()
        if "weight" not in base._parameters:
            raise ValueError(
                f"The weight of {self.layer_name} is computed by a parametrization or by pruning, so no other can be "
                "put in its place. Make it a plain parameter first, with "
                "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove or "
                "torch.nn.utils.remove_weight_norm."
            )


def _plus_changes(base: Tensor, adapted: list[Tensor]) -> Tensor:
    """The base plus the change by each adapted copy of it, in the base's dtype."""
    if not adapted:
        return base
    if len(adapted) == 1:
        return adapted[0].to(base.dtype)
    master = base.to(adapted[0].dtype)
    return (master + torch.stack([copy - master for copy in adapted]).sum(dim=0)).to(base.dtype)


def weighted_sum_of_changes(base: Tensor, adapted: list[tuple[Tensor, float]]) -> Tensor:
    """The base plus a multiple of the change by each adapted copy of it, in the copies' dtype."""
    dtype = adapted[0][0].dtype
    master = torch.promote_types(dtype, torch.float32)
    # In this form, a single copy of weight 1 and the mean of equal copies are exact to the bit.
    total = (1 - math.fsum(factor for _, factor in adapted)) * base.detach().to(master)
    for copy, factor in adapted:
        total = total + factor * copy.detach().to(master)
    return total.to(dtype)


@torch.no_grad()
def _restore(base: Tensor, unmerged: Tensor, merged: Tensor, copy: Tensor) -> None:
    """Put the unmerged values back into a parameter; changes that others made to the merged ones go to the copy."""
    if base.dtype == unmerged.dtype and not torch.equal(base, merged):
        copy += (base - merged).to(copy)
    base.data = unmerged.to(base)
