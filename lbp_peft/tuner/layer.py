"""A linear layer with LBP-WHT adapters: which weight it uses, and whether its backward pass is low-rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..bases import BasisSet, LayoutError, TokenLayout
from ..encoder import is_plain_linear
from ..grid import GridFinder
from ..lowrank import low_rank_linear
from ..projection import num_kept


@dataclass(frozen=True)
class BackwardRule:
    """How an adapter wants the backward pass of one layer done.

    Attributes:
        for_weight: Bases of the weight gradient.
        for_input: Bases of the input gradient; None: exact.
        grid_size, num_prefix_tokens: As given in the configuration.
    """

    for_weight: BasisSet
    for_input: BasisSet | None
    grid_size: tuple[int, int] | None = None
    num_prefix_tokens: int | None = None


@dataclass(frozen=True)
class BackwardPass:
    """How the last training forward of a layer prepared its backward pass.

    Attributes:
        num_tokens: L; 0 where the input has no token axis.
        layout: Where they lie, if it is known.
        kept_for_weight, kept_for_input: k of the L tokens that each gradient is computed from; L: exact.
        why_exact: Empty where at least one of the two is low-rank.
    """

    num_tokens: int
    layout: TokenLayout | None
    kept_for_weight: int
    kept_for_input: int
    why_exact: str = ""


class LBPWHTLayer(BaseTunerLayer):
    """The adapters of one layer. An adapter's weight is a full copy of the base weight, trained; the base stays intact.

    Args:
        base_layer: The adapted layer.
        finder: Knows the patch grid; shared by all layers of the model.
        layer_name: Of the layer in the model, for messages.
    """

    adapter_layer_names = ("lbpwht_weight", "lbpwht_bias")
    other_param_names = ("lbpwht_rule",)

    def __init__(self, base_layer: nn.Module, finder: GridFinder, layer_name: str):
        self.base_layer = base_layer
        self.lbpwht_weight = nn.ParameterDict({})
        self.lbpwht_bias = nn.ParameterDict({})
        self.lbpwht_rule: dict[str, BackwardRule] = {}
        self.finder = finder
        self.layer_name = layer_name
        self.exact_backward = False
        self.last_backward: BackwardPass | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[Tensor, Tensor | None] | None = None
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(
        self, adapter_name: str, rule: BackwardRule, train_base_weight: bool, inference_mode: bool = False
    ) -> None:
        """Add an adapter, whose weights start as the base layer's."""
        self.lbpwht_rule[adapter_name] = rule
        if train_base_weight:
            weight, bias = self._base_parameters()
            self.lbpwht_weight[adapter_name] = nn.Parameter(weight.detach().clone())
            if bias is not None:
                self.lbpwht_bias[adapter_name] = nn.Parameter(bias.detach().clone())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # What the layer computes with

    @property
    def weight(self) -> Tensor:
        """The weight the layer works with, for code that reads it instead of calling the layer; shape (out, in)."""
        return self._adapted_parameters()[0]

    @property
    def bias(self) -> Tensor | None:
        return self._adapted_parameters()[1]

    def _base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Those of the base layer, as they were before any merge."""
        if self._unmerged is not None:
            return self._unmerged
        base = self.get_base_layer()
        return base.weight, base.bias

    def _has_active_weights(self) -> bool:
        return any(name in self.lbpwht_weight for name in self.active_adapters)

    def _adapted_parameters(self) -> tuple[Tensor, Tensor | None]:
        if self.disable_adapters:
            return self._base_parameters()
        if self.merged:
            base = self.get_base_layer()
            return base.weight, base.bias
        return self._combined_parameters(self.active_adapters)

    def _combined_parameters(self, adapter_names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Those of one adapter; of several, the base's plus what each of them changed. In the base layer's dtype."""
        weight, bias = self._base_parameters()
        trained = [name for name in adapter_names if name in self.lbpwht_weight]
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
        if not names:
            return
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
                self._unmerged = (base.weight.data, None if base.bias is None else base.bias.data)
            base.weight.data = weight.detach().clone()
            if bias is not None:
                base.bias.data = bias.detach().clone()
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Give the base layer its own weights back."""
        if self._unmerged is None:
            return
        base = self.get_base_layer()
        weight, bias = self._unmerged
        base.weight.data = weight.to(base.weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self._unmerged = None
        self.merged_adapters = []

    # How to go backward

    def _active_rule(self, x: Tensor) -> BackwardRule | None:
        """The rule of the coming backward pass; None where there is none to come, or it is to be exact."""
        if not self.training or self.exact_backward or not torch.is_grad_enabled():
            return None
        rules = {self.lbpwht_rule[name] for name in self.active_adapters if name in self.lbpwht_rule}
        if len(rules) > 1:
            why = f"the active adapters {', '.join(self.active_adapters)} ask for different ranks or layouts"
            self._fall_back(x, why, "Give them equal settings, or activate one at a time.", cause="rules")
            return None
        if rules and not is_plain_linear(self.get_base_layer()):
            why = f"its type, {type(self.get_base_layer()).__name__}, multiplies in a way of its own"
            self._fall_back(x, why, "Leave it out with exclude_modules to silence this.", cause="type")
            return None
        return rules.pop() if rules else None

    def _low_rank_layout(self, x: Tensor, train_weight: bool, rule: BackwardRule) -> TokenLayout | None:
        """Where the tokens lie; None where the backward pass has to be, or may as well be, exact."""
        for_weight = rule.for_weight if train_weight else None
        for_input = rule.for_input if x.requires_grad else None
        if for_weight is None and for_input is None:
            self._note(x, "its weight is not trained and its input gradient is to be exact or is not needed")
            return None
        if x.dim() not in (3, 4):
            self._note(x, "its input has no token axis")
            return None
        if _num_tokens(x) <= 1:
            self._note(x, "its input has a single token")
            return None
        try:
            layout = self.finder.layout(x.shape, rule.grid_size, rule.num_prefix_tokens)
            kept_for_weight, kept_for_input = num_kept(layout, for_weight), num_kept(layout, for_input)
        except LayoutError as error:
            self._fall_back(x, error.why, error.remedy, cause=error.remedy)
            return None
        if min(kept_for_weight, kept_for_input) == layout.num_tokens:
            self._note(x, "it would keep as many rows as there are tokens", layout)
            return None
        self._note(x, "", layout, kept_for_weight, kept_for_input)
        return layout

    def _fall_back(self, x: Tensor, why: str, remedy: str, cause: str) -> None:
        self._note(x, why)
        self.finder.warn_once(
            cause,
            f"{self.layer_name} uses exact backpropagation, as do any layers like it: {why}. {remedy} "
            "lbp_peft.layout_report(model) lists all layers.",
        )

    def _note(
        self,
        x: Tensor,
        why_exact: str,
        layout: TokenLayout | None = None,
        kept_for_weight: int | None = None,
        kept_for_input: int | None = None,
    ) -> None:
        if not torch.compiler.is_compiling():
            num_tokens = _num_tokens(x)
            self.last_backward = BackwardPass(
                num_tokens, layout, kept_for_weight or num_tokens, kept_for_input or num_tokens, why_exact
            )


def _num_tokens(x: Tensor) -> int:
    return math.prod(x.shape[1:-1]) if x.dim() > 2 else 0


def _plus_changes(base: Tensor, adapted: list[Tensor]) -> Tensor:
    """The base plus what each adapted copy of it changed, in the base's dtype."""
    if not adapted:
        return base
    if len(adapted) == 1:
        return adapted[0].to(base.dtype)
    master = base.to(adapted[0].dtype)
    return (master + torch.stack([copy - master for copy in adapted]).sum(dim=0)).to(base.dtype)


class LBPWHTLinear(nn.Module, LBPWHTLayer):
    """`nn.Linear` with LBP-WHT adapters.

    Args:
        base_layer: The adapted layer.
        finder: Knows the patch grid; shared by all layers of the model.
        layer_name: Of the layer in the model, for messages.
        adapter_name, rule, train_base_weight, inference_mode: The first adapter, see [`LBPWHTLayer.update_layer`].
    """

    def __init__(
        self,
        base_layer: nn.Module,
        finder: GridFinder,
        layer_name: str,
        adapter_name: str,
        rule: BackwardRule,
        train_base_weight: bool = True,
        inference_mode: bool = False,
    ):
        super().__init__()
        LBPWHTLayer.__init__(self, base_layer, finder, layer_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rule, train_base_weight, inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        rule = self._active_rule(x)
        if rule is None and not self._has_active_weights():
            return self.base_layer(x)
        weight, bias = self._adapted_parameters()
        layout = None if rule is None else self._low_rank_layout(x, weight.requires_grad, rule)
        if rule is None or layout is None:
            return F.linear(x, weight, bias)
        return low_rank_linear(x, weight, bias, layout, rule.for_weight, rule.for_input)

    def __repr__(self) -> str:
        return "lbpwht." + super().__repr__()
