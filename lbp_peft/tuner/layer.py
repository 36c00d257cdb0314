"""What every layer with LBP-WHT adapters knows: whether and how its backward pass is to be low-rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..bases import BasisSet, LayoutError, TokenLayout
from ..cost import fastest_precision, low_rank_pays
from ..grid import GridFinder
from ..hints import window_size
from ..precision import AUTO, FULL, Precision
from ..projection import num_kept
from ..tokenwise import why_not_token_wise
from ..transforms import in_forward_mode, in_transform

_USUAL_BATCH = 8


@dataclass(frozen=True)
class BackwardRule:
    """How an adapter wants the backward pass of one layer done.

    Attributes:
        for_weight: Bases of the weight gradient.
        for_input: Bases of the input gradient; None: exact.
        precision: Of the product in the input gradient.
        compress: Whether activation functions and norms around the layer keep their inputs in 8 bits.
        grid_size, num_prefix_tokens, num_suffix_tokens: As given in the configuration.
    """

    for_weight: BasisSet
    for_input: BasisSet | None
    precision: Precision = FULL
    compress: bool = False
    grid_size: tuple[int, int] | None = None
    num_prefix_tokens: int | None = None
    num_suffix_tokens: int | None = None


@dataclass(frozen=True)
class BackwardPlan:
    """What a backward pass that is not exact needs to know.

    Attributes:
        layout: Where the tokens lie; None where no bases are asked for.
        for_weight, for_input: Bases; None: exact, or not needed.
        padding: Shape (N, L), True where a token is only padding.
        precision: Of the product in the input gradient, and of what is kept for the weight gradient. The latter is why
            a first layer, whose input gradient is not needed, has it too: checkpointing makes it need one.
    """

    layout: TokenLayout | None = None
    for_weight: BasisSet | None = None
    for_input: BasisSet | None = None
    padding: Tensor | None = None
    precision: Precision = FULL


@dataclass(frozen=True)
class BackwardPass:
    """How the last training forward of a layer prepared its backward pass.

    Attributes:
        num_tokens: L; 0 where the input has no token axis.
        layout: Where they lie, if it is known.
        kept_for_weight, kept_for_input: k of the L tokens that each gradient is computed from; L: exact.
        why_exact: Empty where at least one of the two is low-rank or in low precision.
        precision: Of the product in the input gradient.
    """

    num_tokens: int
    layout: TokenLayout | None
    kept_for_weight: int
    kept_for_input: int
    why_exact: str = ""
    precision: str = "full"


class LBPWHTLayer(BaseTunerLayer):
    """The rules that the adapters of one layer have for its backward pass.

    Args:
        finder: Knows the patch grid; shared by all layers of the model.
        layer_name: Of the layer in the model, for messages.
    """

    other_param_names = ("lbpwht_rule",)

    if TYPE_CHECKING:  # PEFT's, which is not followed
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        get_base_layer: Callable[[], Any]
        set_adapter: Callable[..., None]
        _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, finder: GridFinder, layer_name: str):
        self.lbpwht_rule: dict[str, BackwardRule] = {}
        self.finder = finder
        self.layer_name = layer_name
        # In a tuple, since it is around this layer, not a part of it.
        self.windowed: tuple[nn.Module | None] = (None,)
        self.is_of_text = False
        self.why_off_grid = ""
        self.exact_backward = False
        self.last_backward: BackwardPass | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._why_not_token_wise: dict[Hashable, str] = {}

    # How to go backward

    def rules_in_effect(self) -> list[BackwardRule]:
        """Those of the active adapters; none where the backward pass is to be exact whatever they say."""
        if self.disable_adapters or self.merged or self.exact_backward:
            return []
        return [self.lbpwht_rule[name] for name in self.active_adapters if name in self.lbpwht_rule]

    def _active_rule(self, x: Tensor) -> BackwardRule | None:
        """The rule of the coming backward pass; None where there is none to come, or it is to be exact."""
        if not self.training or not torch.is_grad_enabled():
            return None
        rules = set(self.rules_in_effect())
        if rules and in_forward_mode():
            why = "forward-mode differentiation (torch.func.jvp, jacfwd, hessian) has no backward pass"
            self._fall_back(x, why, "Use lbp_peft.exact_backward(model) or model.eval() to silence this.", cause=why)
            return None
        if len(rules) > 1:
            rules = {replace(rule, compress=False) for rule in rules}  # that is about others than this layer
        if len(rules) > 1:
            why = f"the active adapters {', '.join(self.active_adapters)} ask for different ranks or layouts"
            self._fall_back(x, why, "Give them equal settings, or activate one at a time.", cause="rules")
            return None
        return rules.pop() if rules else None

    def _plan(self, x: Tensor, base: nn.Module, train_weight: bool, rule: BackwardRule) -> BackwardPlan | None:
        """How to prepare the backward pass; None where it has to be, or may as well be, exact."""
        # Within vmap, tensors do not know whether a transform around it differentiates them.
        train_weight, needs_x = (needed or in_transform() for needed in (train_weight, x.requires_grad))
        for_weight = rule.for_weight if train_weight else None
        for_input = rule.for_input if needs_x else None
        precision = rule.precision if needs_x else FULL
        if for_weight is None and for_input is None and precision == FULL:
            self._note(x, "its weight is not trained and its input gradient is to be exact or is not needed")
            return None
        if x.dim() not in (3, 4):
            self._note(x, "its input has no token axis")
            return None
        shape = self._shape_of_tokens(x)
        if _num_tokens(shape) <= 1:
            self._note(x, "its input has a single token")
            return None
        if for_weight is None and for_input is None:
            return self._of_precision(x, base, BackwardPlan(precision=precision))
        try:
            layout = self._layout(shape, rule)
            kept_for_weight, kept_for_input = num_kept(layout, for_weight), num_kept(layout, for_input)
        except LayoutError as error:
            self._fall_back(x, error.why, error.remedy, cause=self.why_off_grid or error.remedy)
            return None
        if min(kept_for_weight, kept_for_input) == layout.num_tokens and precision.name in ("full", AUTO):
            self._note(x, "it would keep as many rows as there are tokens", layout)
            return None
        plan = BackwardPlan(layout, for_weight, for_input, self._padding(x), rule.precision)
        return self._of_precision(x, base, plan, kept_for_weight, kept_for_input)

    def _of_precision(
        self, x: Tensor, base: Any, plan: BackwardPlan, kept_for_weight: int = 0, kept_for_input: int = 0
    ) -> BackwardPlan | None:
        """The plan, with "auto" settled for this shape."""
        shape = self._shape_of_tokens(x)
        num_tokens = _num_tokens(shape)
        kept_for_weight, kept_for_input = kept_for_weight or num_tokens, kept_for_input or num_tokens
        if plan.precision.name == AUTO:
            features = (base.weight.numel() // int(shape[-1]), int(shape[-1]))
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            on_images = x.dim() == 4 and shape != x.shape
            # What is compiled shall serve batches of all sizes.
            num_images = _USUAL_BATCH if torch.compiler.is_compiling() else int(shape[0])
            # Of factors alone low-rank gradients save the memory of x, and in 16 bits little time: not what is weighed.
            weighed = dtype if self._trains_whole_weight(base) else torch.float32
            given = (num_images, num_tokens, kept_for_weight, *features, weighed, x.device, on_images)
            if kept_for_weight < num_tokens and not low_rank_pays(*given):
                self._leave_exact(x, plan.layout)
                return None
            name = fastest_precision(num_images * kept_for_input, *features, dtype, x.device)
            plan = replace(plan, precision=replace(plan.precision, name=name))
        if min(kept_for_weight, kept_for_input) == num_tokens and plan.precision.name == "full":
            self._note(x, "nothing is faster than exact backpropagation here", plan.layout)
            return None
        self._note(x, "", plan.layout, kept_for_weight, kept_for_input, plan.precision.name)
        return plan

    def _trains_whole_weight(self, base: Any) -> bool:
        """Whether the layer, if anything of it is trained, trains a matrix of its size."""
        return True

    def _leave_exact(self, x: Tensor, layout: TokenLayout | None) -> None:
        why = "exact backpropagation is faster for so narrow a layer"
        self._note(x, why, layout)
        self.finder.warn_once(
            why,
            f'{self.layer_name} uses exact backpropagation, as do any layers like it: {why}, so grad_input="auto" '
            'chose it. To save memory there all the same, set grad_input="full" (or "bf16", "int8").',
        )

    def _of_full_precision(self, x: Tensor, plan: BackwardPlan | None) -> BackwardPlan | None:
        """The plan for a layer whose product g W is not ours to round, since it is run again as it is."""
        if plan is None or plan.precision.name == "full" or self.last_backward is None:
            return plan
        ran = self.last_backward = replace(self.last_backward, precision="full")
        if min(ran.kept_for_weight, ran.kept_for_input) == ran.num_tokens:
            self._note(x, "only products of plain linear layers and LoRA's can be rounded", plan.layout)
            return None
        return plan

    def _layout(self, shape: torch.Size, rule: BackwardRule) -> TokenLayout:
        if self.is_of_text and len(shape) == 3:
            return TokenLayout((1, int(shape[1])))
        if self.why_off_grid and rule.grid_size is None:
            raise LayoutError(self.why_off_grid, "Set grid_size if they are patches; exclude_modules silences this.")
        window = window_size(self.windowed[0])
        return self.finder.layout(shape, rule.grid_size, rule.num_prefix_tokens, rule.num_suffix_tokens, window)

    def _padding(self, x: Tensor) -> Tensor | None:
        """Shape (N, L), True where a token is only padding."""
        return self.finder.padding(self._shape_of_tokens(x)) if self.is_of_text and x.dim() == 3 else None

    def _shape_of_tokens(self, x: Tensor) -> torch.Size:
        """(N, L, C) or (N, H, W, C)"""
        return x.shape

    def _is_token_wise(self, layer: nn.Module, x: Tensor, state: Hashable) -> bool:
        """Whether a layer that is no plain linear one can go backward on few rows; tried out once in each state."""
        if torch.compiler.is_compiling():
            return False
        if in_transform():
            why = "transforms of torch.func (grad, vjp, vmap) cannot run it again in the backward pass"
            self._fall_back(x, why, "Use lbp_peft.exact_backward(model) to silence this.", cause=why)
            return False
        state = (state, x.dtype, torch.is_autocast_enabled(x.device.type))
        if state not in self._why_not_token_wise:
            self._why_not_token_wise[state] = why_not_token_wise(layer, x.shape[-1], x.dtype, x.device)
        if why := self._why_not_token_wise[state]:
            self._fall_back(x, why, "Leave it out with exclude_modules to silence this.", cause=why)
        return not why

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
        precision: str = "full",
    ) -> None:
        if not torch.compiler.is_compiling():
            num_tokens = _num_tokens(self._shape_of_tokens(x))
            self.last_backward = BackwardPass(
                num_tokens, layout, kept_for_weight or num_tokens, kept_for_input or num_tokens, why_exact, precision
            )


def _num_tokens(shape: torch.Size) -> int:
    return math.prod(shape[1:-1]) if len(shape) > 2 else 0
