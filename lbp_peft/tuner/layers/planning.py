"""Plans the backward pass of a layer: from an adapter's rule, the layer's input and the layout of its tokens."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import heuristics
from ...bases.base import Basis
from ...bases.grids import LayoutError, TokenLayout
from ...bounded import ScratchCache
from ...formats.products import AUTO, FULL
from ...layout import GridMismatchError, LayoutFinder, LayoutRecord, given_layout
from ...ops.adaptive import AdaptiveBasis
from ...ops.plan import BackwardPlan, ExactProduct, InputGradient
from ...transforms import in_transform
from .recording import TOO_NARROW, BackwardPass, BackwardRecorder, dtype_of_layer, num_tokens_of, source_of_layout
from .rule import BackwardRule


class NothingToGainError(LayoutError):
    """The input has shape (N, C), or one token for each image, so that exact backpropagation needs no warning."""


class _ExactDecision(NamedTuple):
    """The decision for exact backpropagation. It is returned, not raised: torch.compile cannot trace the exception.

    Attributes:
        why: The reason.
        layout: The layout of the tokens, if it is known.
        remedy: What the user can do about it; None: no warning is needed.
    """

    why: str
    layout: TokenLayout | None = None
    remedy: str | None = None


class _LayerCall(NamedTuple):
    """A call of a layer: all that the plan of its backward pass depends on.

    Attributes:
        x: The layer's input.
        base: The layer whose weight is multiplied.
        trains_weight: Whether the gradient of a weight is needed.
        rule: The settings of the active adapter.
        record: What is known about the positions of the input's tokens.
    """

    x: Tensor
    base: nn.Module
    trains_weight: bool
    rule: BackwardRule
    record: LayoutRecord


class _StoredPlan(NamedTuple):
    """A plan that a layer keeps for its next calls: making a plan takes longer than a small product."""

    plan: BackwardPlan | None
    backward_pass: BackwardPass | None
    rule: BackwardRule
    record: LayoutRecord


class BackwardPlanner(BackwardRecorder):
    """Plans the backward passes of one layer, and records each decision.

    Subclasses define the shapes of their inputs and weights.

    Args:
        finder: Finds where tokens lie; shared by all layers of the model.
        layer_name: The name of the layer in the model, for messages.
    """

    def __init__(self, finder: LayoutFinder, layer_name: str):
        super().__init__(finder, layer_name)
        self._plans: ScratchCache[Hashable, _StoredPlan] = ScratchCache(16)

    # Differences between types of layers

    def _channels_axis(self, x: Tensor) -> int:
        """The axis of the channels in the input."""
        return -1

    def _shape_of_weight(self, base: Any) -> torch.Size:
        """The shape of the weight that the layer computes with."""
        shape: torch.Size = base.weight.shape
        return shape

    def _trains_whole_weight(self, base: Any) -> bool:
        """Whether the layer trains its whole weight matrix, and not only the factors of a low-rank update."""
        return True

    def _check_layout(self, x: Tensor, layout: TokenLayout) -> None:
        """Raise LayoutError if the layer does not support a layout."""

    # The plan

    def _plan(self, x: Tensor, base: nn.Module, trains_weight: bool, rule: BackwardRule) -> BackwardPlan | None:
        """The plan of the backward pass; None if it has to be exact, or if a low-rank one gains nothing.

        Args:
            x: The layer's input.
            base: The layer whose weight is multiplied.
            trains_weight: Whether the gradient of a weight is needed.
            rule: The settings of the active adapter.
        """
        record = self.finder.record(self.layer_name, x, self._channels_axis(x))
        call = _LayerCall(x, base, trains_weight, rule, record)
        if torch.compiler.is_compiling():
            return self._plan_or_reason(call)
        if record.text or in_transform():  # the plan depends on the attention mask of the pass, or on the transform
            return self._make_plan(call).plan
        key = self._key(call)
        stored = self._plans.get(key)
        if stored is None:
            stored = self._plans[key] = self._make_plan(call)
        elif self.last_backward is not stored.backward_pass:
            self.last_backward = stored.backward_pass
        return stored.plan

    def _key(self, call: _LayerCall) -> Hashable:
        """Everything that the plan of a call depends on, as the key of the plans that are kept.

        Rules and records are immutable. The kept plans hold references to them, so that their ids are not used again.
        """
        x, base = call.x, call.base
        return (
            x.shape, x.dtype, x.device, x.requires_grad, dtype_of_layer(x), self._channels_axis(x), call.trains_weight,
            self._trains_whole_weight(base), self._shape_of_weight(base), id(call.rule), id(call.record),
            heuristics.active(),
        )  # fmt: skip

    def _make_plan(self, call: _LayerCall) -> _StoredPlan:
        """Make a plan, with the warnings and the record that go with it."""
        self._warn_of_slow_dtype(call.x)
        plan = self._plan_or_reason(call)
        if (backward_pass := self.last_backward) is not None:
            self.last_backward = replace(
                backward_pass, known_by=source_of_layout(call.record, call.rule, backward_pass)
            )
        return _StoredPlan(plan, self.last_backward, call.rule, call.record)

    def _plan_or_reason(self, call: _LayerCall) -> BackwardPlan | None:
        """The plan; None after recording why the backward pass is exact."""
        decision = self._decide(call)
        if isinstance(decision, BackwardPlan):
            self._note_plan(call.x, decision)
            return decision
        if decision.remedy is None:
            self._note_exact(call.x, decision.why, decision.layout)
        else:
            self._fall_back(call.x, decision.why, decision.remedy)
        return None

    def _decide(self, call: _LayerCall) -> BackwardPlan | _ExactDecision:
        """The plan, or the reason for exact backpropagation."""
        x, rule = call.x, call.rule
        # Within vmap, requires_grad does not say whether an outer transform differentiates a tensor.
        trains_weight, needs_x_grad = (needed or in_transform() for needed in (call.trains_weight, x.requires_grad))
        weight_basis = rule.weight_basis if trains_weight else None
        # The first layer needs no input gradient. It has the precision of the other layers nevertheless: its input is
        # saved accordingly, and under gradient checkpointing it does compute an input gradient.
        input_gradient = rule.input_gradient if needs_x_grad else ExactProduct(precision=rule.input_gradient.precision)
        if weight_basis is None and (not needs_x_grad or input_gradient.is_exact):
            return _ExactDecision("its weight is not trained and its input gradient is to be exact or is not needed")
        if why := self._why_no_tokens(x):
            return _ExactDecision(why)
        input_gradient = self._adaptive_if_faster(call, input_gradient)
        if weight_basis is None and input_gradient.is_exact:
            return _ExactDecision(TOO_NARROW)
        without_layout = BackwardPlan(input_gradient=input_gradient)
        if weight_basis is None and not input_gradient.uses_layout:
            return self._with_chosen_precision(call, without_layout)
        try:
            plan = self._plan_with_layout(call, weight_basis, input_gradient)
        except NothingToGainError as error:
            return _ExactDecision(error.why)
        except LayoutError as error:
            if input_gradient.needs_layout or not input_gradient.uses_layout or x.dim() < 3:
                return _ExactDecision(error.why, remedy=error.remedy)
            if weight_basis is not None:
                self._fall_back(x, error.why, error.remedy, instead="computes exact weight gradients")
            return self._with_chosen_precision(call, without_layout)
        precision = plan.precision.name if needs_x_grad else "full"
        if precision in ("full", AUTO) and min(self._num_rows(x, plan)) == self._num_tokens(x, plan.layout):
            return _ExactDecision("it would keep as many rows as there are tokens", plan.layout)
        return self._with_chosen_precision(call, plan)

    def _why_no_tokens(self, x: Tensor) -> str:
        """The reason why an input has no tokens to project; "" if it has."""
        if x.dim() < 2:
            return "its input has no token axis"
        if x.dim() > 2 and num_tokens_of(self._shape_of_tokens(x)) <= 1 and math.prod(x.shape[:-1]) == x.shape[0]:
            return "its input has a single token"
        return ""

    def _adaptive_if_faster(self, call: _LayerCall, input_gradient: InputGradient) -> InputGradient:
        """The same input gradient, or an exact product if an adaptive basis would be slower than that."""
        x = call.x
        if not isinstance(input_gradient, AdaptiveBasis) or x.dim() < 3:
            return input_gradient
        out_features, in_features = self._num_features_of(call)
        num_tokens = max(num_tokens_of(self._shape_of_tokens(x)), 1)
        if heuristics.active().use_adaptive_basis(num_tokens, input_gradient.rank, out_features, in_features):
            return input_gradient
        return ExactProduct(precision=input_gradient.precision)

    def _plan_with_layout(
        self, call: _LayerCall, weight_basis: Basis | None, input_gradient: InputGradient
    ) -> BackwardPlan:
        """The plan for tokens whose layout is known, in the precision of the rule.

        Raises:
            LayoutError: it is not known or not supported, or a basis does not exist for it.
        """
        layout, padding_mask = self._layout(call)
        saves_8_bits = "projection" in call.rule.compress
        plan = BackwardPlan(layout, weight_basis, input_gradient, padding_mask, saves_8_bits)
        self._num_rows(call.x, plan)  # raises LayoutError if a basis does not exist for the layout
        return plan

    def _with_chosen_precision(self, call: _LayerCall, plan: BackwardPlan) -> BackwardPlan | _ExactDecision:
        """The plan, with the number format that is fastest for this shape if its precision is "auto"."""
        x = call.x
        if plan.precision.name == AUTO:
            chosen = self._with_fastest_precision(call, plan)
            if isinstance(chosen, _ExactDecision):
                return chosen
            plan = chosen
        if plan.precision.name == "full" and min(self._num_rows(x, plan)) == self._num_tokens(x, plan.layout):
            return _ExactDecision("nothing is faster than exact backpropagation here", plan.layout)
        return plan

    def _with_fastest_precision(self, call: _LayerCall, plan: BackwardPlan) -> BackwardPlan | _ExactDecision:
        """[`_with_chosen_precision`] for a plan whose precision is "auto"."""
        x = call.x
        shape, dtype = self._shape_of_tokens(x), dtype_of_layer(x)
        features = self._num_features_of(call)
        num_tokens = self._num_tokens(x, plan.layout)
        weight_rows, input_rows = self._num_rows(x, plan)
        num_images = heuristics.USUAL_BATCH if torch.compiler.is_compiling() else math.prod(shape[:-1]) // num_tokens
        if weight_rows < num_tokens:
            # If only factors are trained, low-rank gradients save the memory of x rather than time: they are used
            # wherever they would be faster in float32.
            assumed_dtype = dtype if self._trains_whole_weight(call.base) else torch.float32
            on_images = x.dim() == 4 and shape != x.shape
            if not heuristics.active().use_low_rank(
                num_images, num_tokens, weight_rows, *features, assumed_dtype, x.device, on_images
            ):
                self._warn_of_narrow_layers(x)
                return _ExactDecision(TOO_NARROW, plan.layout)
        name = heuristics.active().fastest_precision(num_images * input_rows, *features, dtype, x.device)
        return plan.with_precision(replace(plan.precision, name=name))

    def _num_features_of(self, call: _LayerCall) -> tuple[int, int]:
        """C_out and C_in."""
        in_features = int(self._shape_of_tokens(call.x)[-1])
        return self._shape_of_weight(call.base).numel() // in_features, in_features

    def _num_rows(self, x: Tensor, plan: BackwardPlan) -> tuple[int, int]:
        """k of the L tokens for the gradient of the weight and for that of the input."""
        return plan.num_rows(self._num_tokens(x, plan.layout))

    def _in_full_precision(self, x: Tensor, plan: BackwardPlan | None) -> BackwardPlan | None:
        """The plan in full precision, for a layer that is run again, since its product g W cannot be quantized."""
        if plan is None or plan.precision.name == "full" or self.last_backward is None:
            return plan
        backward_pass = self.last_backward = replace(self.last_backward, precision="full")
        if min(backward_pass.grad_weight_rows, backward_pass.grad_input_rows) == backward_pass.num_tokens:
            self._note_exact(x, "only products of plain linear layers and LoRA's can be rounded", plan.layout)
            return None
        return plan.with_precision(FULL)

    # The layout of the tokens

    def _layout(self, call: _LayerCall) -> tuple[TokenLayout, Tensor | None]:
        """The layout of the input's tokens, and their padding mask (N, L).

        Raises:
            LayoutError: the layout is not known or not supported.
        """
        x, record, rule = call.x, call.record, call.rule
        if record.layout is None and not record.is_surprising and rule.grid_size is None:
            raise NothingToGainError("its input has no token axis" if x.dim() == 2 else record.why_unknown, "")
        if rule.grid_size is not None and not record.text and x.dim() > 2:
            return self._given_layout(call), None
        if record.layout is None:
            raise LayoutError(record.why_unknown, record.remedy)
        if not record.text:
            _check_given(record.layout, rule)
        self._check_layout(x, record.layout)
        return record.layout, self.finder.padding_mask(self.layer_name, record, x)

    def _given_layout(self, call: _LayerCall) -> TokenLayout:
        """The layout that the configuration gives, checked against the input."""
        rule = call.rule
        shape, grid = self._shape_of_tokens(call.x), rule.grid_size
        assert grid is not None
        if len(shape) == 4 and tuple(shape[1:3]) != grid:
            raise GridMismatchError(
                f"grid_size={grid}, but the input that arrived is its own grid, {tuple(shape[1:3])}. Correct "
                "grid_size, or leave it out."
            )
        if len(shape) == 4:
            return TokenLayout(grid)
        return given_layout(int(shape[1]), call.record, grid, rule.num_prefix_tokens, rule.num_suffix_tokens)


def _check_given(layout: TokenLayout, rule: BackwardRule) -> None:
    """Raise LayoutError where the numbers of tokens outside the grid are not those of the configuration."""
    for side in ("prefix", "suffix"):
        configured, actual = getattr(rule, f"num_{side}_tokens"), getattr(layout, f"num_{side}_tokens")
        if configured not in (None, actual):
            raise LayoutError(
                f"num_{side}_tokens={configured}, but {actual} of its tokens are "
                f"{'before' if side == 'prefix' else 'after'} the patches",
                f"Correct num_{side}_tokens, or leave it out.",
            )
