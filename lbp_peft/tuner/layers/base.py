"""The base class of layers with LBP-WHT adapters: it decides whether and how the backward pass is low-rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ... import heuristics
from ...bases.base import Basis
from ...bases.grids import LayoutError, TokenLayout
from ...bounded import BoundedCache, ScratchCache
from ...formats.products import AUTO, FULL
from ...instructions import product_dtype
from ...layout import NOT_TRACED, GridMismatchError, LayoutFinder, LayoutRecord, given_layout
from ...ops.adaptive import AdaptiveBasis
from ...ops.plan import BackwardPlan, ExactProduct, InputGradient
from ...ops.recompute import why_not_token_wise
from ...projection import num_kept
from ...transforms import in_forward_mode, in_transform

# What `compress_activations` may name.
COMPRESSIBLE = ("activation", "norm", "attention", "projection")

_USUAL_BATCH = 8


class NothingToGainError(LayoutError):
    """An input of shape (N, C), or with one token of each image: nothing to warn of."""


@dataclass(frozen=True)
class BackwardRule:
    """The settings of an adapter for the backward pass of one layer.

    Attributes:
        weight_basis: Basis of the weight gradient.
        input_gradient: How the input gradient is computed. The name of its precision may be "auto".
        compress: What is saved in few bits in the block of the layer, words of `compress_activations`.
        grid_size, num_prefix_tokens, num_suffix_tokens: As given in the configuration.
    """

    weight_basis: Basis
    input_gradient: InputGradient = ExactProduct()
    compress: tuple[str, ...] = ()
    grid_size: tuple[int, int] | None = None
    num_prefix_tokens: int | None = None
    num_suffix_tokens: int | None = None


@dataclass(frozen=True)
class BackwardPass:
    """How the last training forward of a layer prepared its backward pass.

    Attributes:
        num_tokens: L; 0 if the input has no token axis.
        layout: Where the tokens lie, if that is known.
        kept_for_weight, kept_for_input: k of the L tokens that each gradient is computed from; L: exact.
        why_exact: The reason why both are exact; "" if at least one is low-rank or in low precision.
        precision: Precision of the product in the input gradient.
        known_by: The source of the layout: the number of operations through which it was followed from the model's
            input, or the configuration.
    """

    num_tokens: int
    layout: TokenLayout | None
    kept_for_weight: int
    kept_for_input: int
    why_exact: str = ""
    precision: str = "full"
    known_by: str = ""


class _MadePlan(NamedTuple):
    """A plan as a layer remembers it: making it takes longer than a small product, and most calls are alike."""

    plan: BackwardPlan | None
    ran: BackwardPass | None
    rule: BackwardRule
    record: LayoutRecord


class LBPWHTLayer(BaseTunerLayer):
    """A layer with adapters, each of which has a rule for the layer's backward pass.

    Args:
        finder: Finds where tokens lie; shared by all layers of the model.
        layer_name: The name of the layer in the model, for messages.
    """

    other_param_names: tuple[str, ...] = ("lbpwht_rule",)

    if TYPE_CHECKING:  # PEFT's, which is not followed
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        get_base_layer: Callable[[], Any]
        set_adapter: Callable[..., None]
        _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, finder: LayoutFinder, layer_name: str):
        self.lbpwht_rule: dict[str, BackwardRule] = {}
        self.finder = finder
        self.layer_name = layer_name
        self.last_backward: BackwardPass | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._why_not_token_wise: BoundedCache[Hashable, str] = BoundedCache(16)
        self._plans: ScratchCache[Hashable, _MadePlan] = ScratchCache(16)

    # How to run the backward pass

    def rules_in_effect(self) -> list[BackwardRule]:
        """The rules of the active adapters; none if the backward pass has to be exact."""
        if self.disable_adapters or self.merged or self.finder.is_exact(self.layer_name):
            return []
        return [self.lbpwht_rule[name] for name in self.active_adapters if name in self.lbpwht_rule]

    def _active_rule(self, x: Tensor) -> BackwardRule | None:
        """The rule for the coming backward pass; None if there will be none, or if it is to be exact."""
        rule = self._choose_rule(x) if self.training and torch.is_grad_enabled() else None
        if rule is None:
            self._note_call(x)
        return rule

    def _note_call(self, x: Tensor) -> None:
        """Record a call without a plan, since tracing and reruns need to know about all calls."""
        self.finder.note_call(self.layer_name, x, self._channels_axis(x))

    def _choose_rule(self, x: Tensor) -> BackwardRule | None:
        rules = self.rules_in_effect()
        if rules and in_forward_mode():
            why = "forward-mode differentiation (torch.func.jvp, jacfwd, hessian) has no backward pass"
            self._fall_back(x, why, "Use lbp_peft.exact_backward(model) or model.eval() to silence this.", cause=why)
            return None
        if len(rules) > 1:
            # Activation functions, norms and attention serve each rule for itself.
            words = tuple(word for word in COMPRESSIBLE if all(word in rule.compress for rule in rules))
            rules = list({replace(rule, compress=words) for rule in rules})
        if len(rules) > 1:
            why = f"the active adapters {', '.join(self.active_adapters)} ask for different ranks or layouts"
            self._fall_back(x, why, "Give them equal settings, or activate one at a time.", cause="rules")
            return None
        return rules[0] if rules else None

    def _plan(self, x: Tensor, base: nn.Module, train_weight: bool, rule: BackwardRule) -> BackwardPlan | None:
        """The plan of the backward pass; None if it has to be exact, or if nothing is gained otherwise."""
        record = self.finder.record(self.layer_name, x, self._channels_axis(x))
        if torch.compiler.is_compiling():
            return self._plan_for(x, base, train_weight, rule, record)
        if record.text or in_transform():  # the plan depends on the attention mask of the pass, or on the transform
            return self._make_plan(x, base, train_weight, rule, record).plan
        # All that a plan depends on. Rules and records are immutable, and the entry keeps them alive, so that no other
        # one can have the same id.
        key = (
            x.shape, x.dtype, x.device, x.requires_grad, _dtype_of_layer(x), self._channels_axis(x),
            train_weight, self._trains_whole_weight(base), self._shape_of_weight(base), id(rule), id(record),
            heuristics.active(),
        )  # fmt: skip
        made = self._plans.get(key)
        if made is None:
            made = self._plans[key] = self._make_plan(x, base, train_weight, rule, record)
        elif self.last_backward is not made.ran:
            self.last_backward = made.ran
        return made.plan

    def _make_plan(
        self, x: Tensor, base: nn.Module, train_weight: bool, rule: BackwardRule, record: LayoutRecord
    ) -> _MadePlan:
        self._warn_of_slow_dtype(x)
        plan = self._plan_for(x, base, train_weight, rule, record)
        if (ran := self.last_backward) is not None:
            self.last_backward = replace(ran, known_by=_known_by(record, rule, ran))
        return _MadePlan(plan, self.last_backward, rule, record)

    def _plan_for(
        self, x: Tensor, base: nn.Module, train_weight: bool, rule: BackwardRule, record: LayoutRecord
    ) -> BackwardPlan | None:
        # Within vmap, requires_grad does not tell whether an outer transform differentiates a tensor.
        train_weight, needs_x = (needed or in_transform() for needed in (train_weight, x.requires_grad))
        weight_basis = rule.weight_basis if train_weight else None
        # A first layer, which needs no input gradient, has the precision of the others all the same: its input is saved
        # by it, and under checkpointing it does compute an input gradient.
        input_gradient = rule.input_gradient if needs_x else ExactProduct(precision=rule.input_gradient.precision)
        if weight_basis is None and (not needs_x or input_gradient.is_exact):
            self._note(x, "its weight is not trained and its input gradient is to be exact or is not needed")
            return None
        if x.dim() < 2:
            self._note(x, "its input has no token axis")
            return None
        if x.dim() > 2 and _num_tokens(self._shape_of_tokens(x)) <= 1 and math.prod(x.shape[:-1]) == x.shape[0]:
            self._note(x, "its input has a single token")
            return None
        if isinstance(input_gradient, AdaptiveBasis):
            input_gradient = self._adaptive_if_it_pays(x, base, input_gradient)
            if weight_basis is None and input_gradient.is_exact:
                self._note(x, "exact backpropagation is faster for so narrow a layer")
                return None
        if weight_basis is None and not input_gradient.uses_layout:
            return self._with_chosen_precision(x, base, BackwardPlan(input_gradient=input_gradient))
        try:
            layout, padding_mask = self._layout(x, record, rule)
            kept_for_weight = num_kept(layout, weight_basis)
            kept_for_input = input_gradient.num_coefficients(layout)
        except NothingToGainError as error:
            self._note(x, error.why)
            return None
        except LayoutError as error:
            if input_gradient.needs_layout or not input_gradient.uses_layout or x.dim() < 3:
                self._fall_back(x, error.why, error.remedy, cause=error.why)
                return None
            if weight_basis is not None:
                self._fall_back(x, error.why, error.remedy, cause=error.why, instead="computes exact weight gradients")
            return self._without_layout(x, base, input_gradient)
        precision = input_gradient.precision.name if needs_x else "full"
        if min(kept_for_weight, kept_for_input) == layout.num_tokens and precision in ("full", AUTO):
            self._note(x, "it would keep as many rows as there are tokens", layout)
            return None
        plan = BackwardPlan(layout, weight_basis, input_gradient, padding_mask, "projection" in rule.compress)
        return self._with_chosen_precision(x, base, plan, kept_for_weight, kept_for_input)

    def _adaptive_if_it_pays(self, x: Tensor, base: Any, input_gradient: AdaptiveBasis) -> InputGradient:
        shape = self._shape_of_tokens(x)
        in_features = int(shape[-1])
        out_features = self._shape_of_weight(base).numel() // in_features
        num_tokens = max(_num_tokens(shape), 1)
        shape_of_product = num_tokens, input_gradient.rank, out_features, in_features
        if x.dim() < 3 or heuristics.active().use_adaptive_basis(*shape_of_product):
            return input_gradient
        return ExactProduct(precision=input_gradient.precision)

    def _without_layout(self, x: Tensor, base: Any, input_gradient: InputGradient) -> BackwardPlan | None:
        """The plan for tokens of an unknown layout: the weight gradient is exact."""
        num_tokens = _num_tokens(self._shape_of_tokens(x))
        kept_for_input = input_gradient.num_coefficients_of(num_tokens)
        return self._with_chosen_precision(x, base, BackwardPlan(input_gradient=input_gradient), 0, kept_for_input)

    def _with_chosen_precision(
        self, x: Tensor, base: Any, plan: BackwardPlan, kept_for_weight: int = 0, kept_for_input: int = 0
    ) -> BackwardPlan | None:
        """The plan with a precision chosen for this shape, if it is "auto"."""
        shape = self._shape_of_tokens(x)
        num_tokens = plan.layout.num_tokens if plan.layout else _num_tokens(shape)
        kept_for_weight, kept_for_input = kept_for_weight or num_tokens, kept_for_input or num_tokens
        if plan.precision.name == AUTO:
            features = (self._shape_of_weight(base).numel() // int(shape[-1]), int(shape[-1]))
            dtype = _dtype_of_layer(x)
            on_images = x.dim() == 4 and shape != x.shape
            # A compiled graph has to serve batches of all sizes.
            num_images = _USUAL_BATCH if torch.compiler.is_compiling() else math.prod(shape[:-1]) // num_tokens
            # Where only factors are trained, low-rank gradients are used to save the memory of x, and less for time.
            weighed = dtype if self._trains_whole_weight(base) else torch.float32
            given = (num_images, num_tokens, kept_for_weight, *features, weighed, x.device, on_images)
            if kept_for_weight < num_tokens and not heuristics.active().use_low_rank(*given):
                self._leave_exact(x, plan.layout)
                return None
            name = heuristics.active().fastest_precision(num_images * kept_for_input, *features, dtype, x.device)
            plan = plan.with_precision(replace(plan.precision, name=name))
        if min(kept_for_weight, kept_for_input) == num_tokens and plan.precision.name == "full":
            self._note(x, "nothing is faster than exact backpropagation here", plan.layout)
            return None
        self._note(x, "", plan.layout, kept_for_weight, kept_for_input, plan.precision.name)
        return plan

    def _shape_of_weight(self, base: Any) -> torch.Size:
        """The shape of the weight that the layer computes with."""
        shape: torch.Size = base.weight.shape
        return shape

    def _trains_whole_weight(self, base: Any) -> bool:
        """Whether training this layer means training its whole weight matrix, and not only factors."""
        return True

    def _leave_exact(self, x: Tensor, layout: TokenLayout | None) -> None:
        why = "exact backpropagation is faster for so narrow a layer"
        self._note(x, why, layout)
        faster = [f'"{name}"' for name in heuristics.active().faster_formats(_dtype_of_layer(x), x.device)]
        or_faster = f" (or {', '.join(faster)})" if faster else ""
        self.finder.warn_once(
            why,
            f"{self.layer_name} uses exact backpropagation, as do any layers like it: {why}, so "
            f'grad_input_dtype="auto" chose it. To save memory there all the same, set grad_input_dtype="full"'
            f"{or_faster}.",
        )

    def _warn_of_slow_dtype(self, x: Tensor) -> None:
        """Warn if the whole model, including the forward pass, is far slower than in float32."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return
        dtype = _dtype_of_layer(x)
        if product_dtype(dtype, x.device) != dtype:
            name = str(dtype).removeprefix("torch.")
            self.finder.warn_once(
                f"slow {name}",
                f"{self.layer_name} and the layers like it run in {name}, for which this CPU has no instructions that "
                "PyTorch uses. Matrix products of the whole model take several times as long as in float32. Train in "
                "float32: without autocast, with a model in torch.float32.",
            )

    def _in_full_precision(self, x: Tensor, plan: BackwardPlan | None) -> BackwardPlan | None:
        """The plan for a layer that is run again in the backward pass, so that its product g W cannot be quantized."""
        if plan is None or plan.precision.name == "full" or self.last_backward is None:
            return plan
        ran = self.last_backward = replace(self.last_backward, precision="full")
        if min(ran.kept_for_weight, ran.kept_for_input) == ran.num_tokens:
            self._note(x, "only products of plain linear layers and LoRA's can be rounded", plan.layout)
            return None
        return plan.with_precision(FULL)

    def _layout(self, x: Tensor, record: LayoutRecord, rule: BackwardRule) -> tuple[TokenLayout, Tensor | None]:
        """The layout of the input's tokens, and their padding mask, shape (N, L)."""
        if record.layout is None and not record.is_surprising and rule.grid_size is None:
            raise NothingToGainError("its input has no token axis" if x.dim() == 2 else record.why_unknown, "")
        if rule.grid_size is not None and not record.text and x.dim() > 2:
            return self._given_layout(x, record, rule), None
        if record.layout is None:
            raise LayoutError(record.why_unknown, record.remedy)
        if not record.text:
            _check_given(record.layout, rule)
        self._check_layout(x, record.layout)
        return record.layout, self.finder.padding(self.layer_name, record, x)

    def _as_one_operation(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run a function of x that treats each token by itself; the tracer takes it for a single operation."""
        return self.finder.as_one_operation(x, run, self._channels_axis(x))

    def _given_layout(self, x: Tensor, record: LayoutRecord, rule: BackwardRule) -> TokenLayout:
        """The layout that the configuration gives, checked against the input."""
        shape, grid = self._shape_of_tokens(x), rule.grid_size
        assert grid is not None
        if len(shape) == 4 and tuple(shape[1:3]) != grid:
            raise GridMismatchError(
                f"grid_size={grid}, but the input that arrived is its own grid, {tuple(shape[1:3])}. Correct "
                "grid_size, or leave it out."
            )
        if len(shape) == 4:
            return TokenLayout(grid)
        return given_layout(int(shape[1]), record, grid, rule.num_prefix_tokens, rule.num_suffix_tokens)

    def _check_layout(self, x: Tensor, layout: TokenLayout) -> None:
        """Raise LayoutError if the layer does not support a layout."""

    def _channels_axis(self, x: Tensor) -> int:
        """The axis of the channels in the input."""
        return -1

    def _shape_of_tokens(self, x: Tensor) -> torch.Size:
        """(N, L, C) or (N, H, W, C)"""
        return x.shape

    def _is_token_wise(self, layer: nn.Module, x: Tensor, state: Hashable) -> bool:
        """Whether the backward pass of a layer other than a plain linear one can use few rows; tried once per state."""
        if torch.compiler.is_compiling():
            return False
        if in_transform():
            why = "transforms of torch.func (grad, vjp, vmap) cannot run it again in the backward pass"
            self._fall_back(x, why, "Use lbp_peft.exact_backward(model) to silence this.", cause=why)
            return False
        state = (state, x.dtype, torch.is_autocast_enabled(x.device.type))
        known = self._why_not_token_wise.get(state)
        why = "" if known is None else known
        if known is None:
            why = self._why_not_token_wise[state] = why_not_token_wise(layer, x.shape[-1], x.dtype, x.device)
        if why:
            self._fall_back(x, why, "Leave it out with exclude_modules to silence this.", cause=why)
        return not why

    def _fall_back(
        self, x: Tensor, why: str, remedy: str, cause: str, instead: str = "uses exact backpropagation"
    ) -> None:
        self._note(x, why)
        if why == NOT_TRACED.why_unknown:  # the next forward pass is traced again
            return
        self.finder.warn_once(
            cause,
            f"{self.layer_name} {instead}, as do any layers like it: {why}. {remedy} "
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
            num_tokens = layout.num_tokens if layout else _num_tokens(self._shape_of_tokens(x))
            self.last_backward = BackwardPass(
                num_tokens, layout, kept_for_weight or num_tokens, kept_for_input or num_tokens, why_exact, precision
            )


def _dtype_of_layer(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer works on x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _num_tokens(shape: torch.Size) -> int:
    return math.prod(shape[1:-1]) if len(shape) > 2 else 0


def _known_by(record: LayoutRecord, rule: BackwardRule, ran: BackwardPass) -> str:
    if ran.layout is None:
        return ""
    if rule.grid_size is not None and not record.text:
        return "grid_size"
    return f"{record.steps} operations"


def _check_given(layout: TokenLayout, rule: BackwardRule) -> None:
    """Raise LayoutError where the numbers of tokens outside the grid are not those of the configuration."""
    for side in ("prefix", "suffix"):
        given, found = getattr(rule, f"num_{side}_tokens"), getattr(layout, f"num_{side}_tokens")
        if given not in (None, found):
            raise LayoutError(
                f"num_{side}_tokens={given}, but {found} of its tokens are {'before' if side == 'prefix' else 'after'} "
                "the patches",
                f"Correct num_{side}_tokens, or leave it out.",
            )


def check_image_layout(x: Tensor, layout: TokenLayout) -> None:
    """Raise LayoutError unless images (N, C, H, W) have rows and columns of patches along their last two axes."""
    if x.dim() == 4 and layout != TokenLayout((int(x.shape[2]), int(x.shape[3]))):
        raise LayoutError(
            "its images are unfolded, so that neither of their axes is height or width",
            "Leave it out with exclude_modules to silence this.",
        )
