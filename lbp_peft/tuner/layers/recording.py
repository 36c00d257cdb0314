"""Records how a layer prepared its last backward pass, and warns if it is exact contrary to the user's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import heuristics
from ...bases.grids import TokenLayout
from ...instructions import product_dtype
from ...layout import NOT_TRACED, LayoutFinder, LayoutRecord
from ...ops.plan import BackwardPlan
from .rule import BackwardRule

TOO_NARROW = "exact backpropagation is faster for so narrow a layer"


@dataclass(frozen=True)
class BackwardPass:
    """A record of how a layer prepared its backward pass in its last forward pass in training.

    Attributes:
        num_tokens: L; 0 if the input has no token axis.
        layout: The layout of the tokens, if it is known.
        grad_weight_rows, grad_input_rows: k of the L tokens that each gradient is computed from; L: exact.
        why_exact: The reason why both are exact; "" if at least one is low-rank or in low precision.
        precision: The name of the number format of the product in the input gradient.
        known_by: The source of the layout, such as "followed from patch_embed through 14 operations", or the setting
            that gives it.
    """

    num_tokens: int
    layout: TokenLayout | None
    grad_weight_rows: int
    grad_input_rows: int
    why_exact: str = ""
    precision: str = "full"
    known_by: str = ""


class BackwardRecorder:
    """Records the backward passes of one layer in `last_backward`, and warns once of each cause of an exact one.

    Args:
        finder: Gives the warnings; shared by all layers of the model.
        layer_name: The name of the layer in the model, for messages.
    """

    def __init__(self, finder: LayoutFinder, layer_name: str):
        self.finder = finder
        self.layer_name = layer_name
        self.last_backward: BackwardPass | None = None

    def _shape_of_tokens(self, x: Tensor) -> torch.Size:
        """The shape of the input with the channels last, (N, L, C) or (N, H, W, C)."""
        return x.shape

    def _num_tokens(self, x: Tensor, layout: TokenLayout | None) -> int:
        """L, at least 1: an input without a token axis counts as one token."""
        return layout.num_tokens if layout else max(num_tokens_of(self._shape_of_tokens(x)), 1)

    def _fall_back(
        self, x: Tensor, why: str, remedy: str, *, cause: str = "", instead: str = "uses exact backpropagation"
    ) -> None:
        """Record that the backward pass is exact, or in part as `instead` says, and warn once for each cause.

        Args:
            why: The reason, as the end of a sentence.
            remedy: What the user can do, a sentence.
            cause: What distinguishes this warning from others; "": the reason.
            instead: What the layer does.
        """
        self._note_exact(x, why)
        if why == NOT_TRACED.why_unknown:  # the next forward pass is traced again
            return
        self.finder.warn_once(
            cause or why,
            f"{self.layer_name} {instead}, as do any layers like it: {why}. {remedy} "
            "lbp_peft.layout_report(model) lists all layers.",
        )

    def _note_exact(self, x: Tensor, why: str, layout: TokenLayout | None = None) -> None:
        """Record an exact backward pass and its reason."""
        if not torch.compiler.is_compiling():
            num_tokens = layout.num_tokens if layout else num_tokens_of(self._shape_of_tokens(x))
            self.last_backward = BackwardPass(num_tokens, layout, num_tokens, num_tokens, why)

    def _note_plan(self, x: Tensor, plan: BackwardPlan) -> None:
        """Record a backward pass by a plan."""
        if not torch.compiler.is_compiling():
            num_tokens = self._num_tokens(x, plan.layout)
            weight_rows, input_rows = plan.num_rows(num_tokens)
            self.last_backward = BackwardPass(
                num_tokens, plan.layout, weight_rows, input_rows, precision=plan.precision.name
            )

    def _warn_of_narrow_layers(self, x: Tensor) -> None:
        """Warn of layers for which "auto" chooses exact backpropagation."""
        faster = [f'"{name}"' for name in heuristics.active().faster_formats(dtype_of_layer(x), x.device)]
        or_faster = f" (or {', '.join(faster)})" if faster else ""
        self.finder.warn_once(
            TOO_NARROW,
            f"{self.layer_name} uses exact backpropagation, as do any layers like it: {TOO_NARROW}, so "
            f'grad_input_dtype="auto" chose it. To save memory there all the same, set grad_input_dtype="full"'
            f"{or_faster}.",
        )

    def _warn_of_slow_dtype(self, x: Tensor) -> None:
        """Warn if the whole model, including the forward pass, is far slower than in float32."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return
        dtype = dtype_of_layer(x)
        if product_dtype(dtype, x.device) != dtype:
            name = str(dtype).removeprefix("torch.")
            self.finder.warn_once(
                f"slow {name}",
                f"{self.layer_name} and the layers like it run in {name}, for which this CPU has no instructions that "
                "PyTorch uses. Matrix products of the whole model take several times as long as in float32. Train in "
                "float32: without autocast, with a model in torch.float32.",
            )


def dtype_of_layer(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes for an input x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def num_tokens_of(shape: torch.Size) -> int:
    """L of (N, ..., C); 0 if there is no token axis."""
    return math.prod(shape[1:-1]) if len(shape) > 2 else 0


def source_of_layout(record: LayoutRecord, rule: BackwardRule, backward_pass: BackwardPass) -> str:
    """The value of `BackwardPass.known_by`; "" if no layout is known."""
    if backward_pass.layout is None:
        return ""
    if rule.grid_size is not None and not record.text:
        return "grid_size"
    if not record.origin:
        return "the shape of its input"
    return f"followed from {record.origin} through {record.steps} operation{'' if record.steps == 1 else 's'}"
