"""All operations take the same plan of a backward pass, and it cannot be changed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from torch import nn

from lbp_peft import (
    AdaptiveBasis,
    BackwardPlan,
    BasisSet,
    ExactProduct,
    FixedBasis,
    InputGradient,
    TokenLayout,
    low_rank_linear,
)
from lbp_peft.formats.products import FULL, Precision
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv
from lbp_peft.ops.recompute import low_rank_layer
from lbp_peft.projection import projection

LAYOUT = TokenLayout((8, 8))
PLANS = [
    BackwardPlan(LAYOUT, BasisSet(3)),
    BackwardPlan(LAYOUT, BasisSet(3), FixedBasis(BasisSet(3))),
    BackwardPlan(LAYOUT, BasisSet(6), FixedBasis(BasisSet(3))),
    BackwardPlan(LAYOUT, None, FixedBasis(BasisSet(3))),
    BackwardPlan(LAYOUT, BasisSet(3), AdaptiveBasis(2)),
    BackwardPlan(LAYOUT, None, AdaptiveBasis(3, energy=0.5)),
    BackwardPlan(LAYOUT, BasisSet(3), padding_mask=torch.arange(64).expand(2, 64) >= 60),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_all_operations_run_the_same_plan(plan):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(2, 64, 4, dtype=torch.float64, generator=generator)
    if plan.padding_mask is not None:
        grad = grad.masked_fill(plan.padding_mask[:, :, None], 0)
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    weight, bias = layer.weight, layer.bias
    ys = {
        "linear": low_rank_linear(x, weight, bias, plan=plan),
        "conv": low_rank_pointwise_conv(x.mT, weight[..., None], bias, plan=plan).mT,
        "recompute": low_rank_layer(layer, x, plan=plan),
    }
    found = {name: torch.autograd.grad(y, (x, weight, bias), grad) for name, y in ys.items()}
    for name in ("conv", "recompute"):
        for one, other in zip(found[name], found["linear"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_plan_is_immutable_and_can_be_derived_from():
    plan = BackwardPlan(LAYOUT, BasisSet(3), FixedBasis(BasisSet(3)))
    with pytest.raises(FrozenInstanceError):
        plan.layout = None
    int8 = plan.with_precision(Precision("int8", 16))
    assert int8.precision == Precision("int8", 16) and plan.precision == FULL
    assert int8.input_gradient == FixedBasis(BasisSet(3), precision=Precision("int8", 16))
    assert int8.saved_dtype(torch.float32) == torch.bfloat16 and plan.saved_dtype(torch.float32) == torch.float32
    assert ExactProduct().is_exact and not ExactProduct(precision=Precision("bf16")).is_exact
    assert not plan.input_gradient.is_exact


@pytest.mark.parametrize("changes", [{"weight_basis": BasisSet(3)}, {"input_gradient": FixedBasis(BasisSet(3))}])
def test_bases_need_a_layout(changes):
    x, weight = torch.randn(2, 64, 6), torch.randn(4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="give a layout"):
        low_rank_linear(x, weight, plan=replace(BackwardPlan(), **changes))


def test_an_input_gradient_of_another_kind_takes_one_class():
    """This one keeps only the mean over all tokens."""

    @dataclass(frozen=True)
    class OfMeans(InputGradient):
        uses_layout = True

        def num_coefficients(self, layout):
            return layout.num_outside + 1

        def projection(self, layout, dtype, device, padding_mask):
            return projection(layout, BasisSet(1), dtype, device, padding_mask)

    x = torch.randn(2, 64, 6, dtype=torch.float64, requires_grad=True)
    weight, grad = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 64, 4, dtype=torch.float64)
    y = low_rank_linear(x, weight, plan=BackwardPlan(LAYOUT, None, OfMeans()))
    expected = (grad.mean(1, keepdim=True) @ weight).expand_as(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected)
