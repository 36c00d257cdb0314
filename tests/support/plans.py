"""Short ways to write plans of backward passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lbp_peft import BackwardPlan, ExactProduct, FixedBasis, TokenLayout
from lbp_peft.formats.products import FULL, Precision


def plan_of(
    layout: TokenLayout | None = None,
    for_weight: Any = None,
    for_input: Any = None,
    padding_mask: Tensor | None = None,
    precision: Precision = FULL,
) -> BackwardPlan:
    """A plan with bases of the weight gradient and of the input gradient; None: exact."""
    exact = ExactProduct(precision=precision)
    input_gradient = exact if for_input is None else FixedBasis(for_input, precision=precision)
    return BackwardPlan(layout, for_weight, input_gradient, padding_mask)
