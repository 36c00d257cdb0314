"""The base class of layers with LBP-WHT adapters: chooses the rule of the active adapters for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...bases.grids import LayoutError, TokenLayout
from ...bounded import BoundedCache
from ...layout import LayoutFinder
from ...ops.attention import outside_attention_mode
from ...ops.token_wise import why_not_token_wise
from ...transforms import in_forward_mode, in_transform
from .planning import BackwardPlanner
from .rule import COMPRESSIBLE, BackwardRule


class LBPWHTLayer(BackwardPlanner, BaseTunerLayer):
    """A layer with adapters, each of which has a rule for the layer's backward pass.

    Args:
        finder: Finds where tokens lie; shared by all layers of the model.
        layer_name: The name of the layer in the model, for messages.
    """

    # The attributes, besides weights, that hold something for each adapter. PEFT reads this.
    other_param_names: tuple[str, ...] = ("lbpwht_rule",)

    if TYPE_CHECKING:  # attributes of BaseTunerLayer, which has no types
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        get_base_layer: Callable[[], Any]
        set_adapter: Callable[..., None]
        _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, finder: LayoutFinder, layer_name: str):
        BackwardPlanner.__init__(self, finder, layer_name)
        self.lbpwht_rule: dict[str, BackwardRule] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._why_not_token_wise: BoundedCache[Hashable, str] = BoundedCache(16)

    def rules_in_effect(self) -> list[BackwardRule]:
        """The rules of the active adapters; empty if the backward pass has to be exact."""
        if self.disable_adapters or self.merged or self.finder.is_exact(self.layer_name):
            return []
        return [self.lbpwht_rule[name] for name in self.active_adapters if name in self.lbpwht_rule]

    def _rule_for(self, x: Tensor) -> BackwardRule | None:
        """The rule for the backward pass of this call; None if there will be no such pass, or it has to be exact."""
        rule = self._common_rule(x) if self.training and torch.is_grad_enabled() else None
        if rule is None:
            self._note_call(x)
        return rule

    def _note_call(self, x: Tensor) -> None:
        """Record a call without a plan, since tracing and reruns need to know about all calls."""
        self.finder.note_call(self.layer_name, x, self._channels_axis(x))

    def _common_rule(self, x: Tensor) -> BackwardRule | None:
        """The rule that all active adapters agree on; None, after a warning, if they do not."""
        rules = self.rules_in_effect()
        if rules and in_forward_mode():
            why = "forward-mode differentiation (torch.func.jvp, jacfwd, hessian) has no backward pass"
            self._fall_back(x, why, "Use lbp_peft.exact_backward(model) or model.eval() to silence this.")
            return None
        if len(rules) > 1:
            # Rules may differ in this: the patches of activation functions, norms and attention read each of them.
            words = tuple(word for word in COMPRESSIBLE if all(word in rule.compress for rule in rules))
            rules = list({replace(rule, compress=words) for rule in rules})
        if len(rules) > 1:
            why = f"the active adapters {', '.join(self.active_adapters)} ask for different ranks or layouts"
            self._fall_back(x, why, "Give them equal settings, or activate one at a time.", cause="rules")
            return None
        return rules[0] if rules else None

    def _as_one_operation(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run a function of x that maps each token independently. The tracer treats it as a single operation."""
        with outside_attention_mode():
            return self.finder.as_one_operation(x, run, self._channels_axis(x))

    def _is_token_wise(self, layer: nn.Module, x: Tensor, state: Hashable) -> bool:
        """Whether a layer maps each token independently, so that few rows can replace the tokens in its backward pass.

        Args:
            layer: A layer of any type, which is run to find out.
            x: Its input.
            state: A key of everything that the answer depends on. The layer is tested once for each state.
        """
        if torch.compiler.is_compiling():
            return False
        if in_transform():
            no_rerun = "transforms of torch.func (grad, vjp, vmap) cannot run it again in the backward pass"
            self._fall_back(x, no_rerun, "Use lbp_peft.exact_backward(model) to silence this.")
            return False
        key = (state, x.dtype, torch.is_autocast_enabled(x.device.type))
        why = self._why_not_token_wise.get(key)
        if why is None:
            why = self._why_not_token_wise[key] = why_not_token_wise(layer, x.shape[-1], x.dtype, x.device)
        if why:
            self._fall_back(x, why, "Leave it out with exclude_modules to silence this.")
        return not why


def check_image_layout(x: Tensor, layout: TokenLayout) -> None:
    """Raise LayoutError unless images (N, C, H, W) have rows and columns of patches along their last two axes."""
    if x.dim() == 4 and layout != TokenLayout((int(x.shape[2]), int(x.shape[3]))):
        raise LayoutError(
            "its images are unfolded, so that neither of their axes is height or width",
            "Leave it out with exclude_modules to silence this.",
        )
