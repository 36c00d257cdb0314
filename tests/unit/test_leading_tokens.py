"""Layers whose outputs are only read at the leading tokens run their backward pass on these, with equal gradients."""

import pytest
import torch
from comparing import problem, relative
from models import forward, images, tiny_vit
from peft import LoraConfig, get_peft_model

from lbp_peft import AdaptiveBasis, BackwardPlan, BasisSet, Branch, FixedBasis, LBPWHTConfig, TokenLayout
from lbp_peft.formats.products import Precision
from lbp_peft.measure import multiply_adds
from lbp_peft.ops import leading_tokens, linear
from lbp_peft.ops.plan import ExactProduct

GRID, PREFIX = (8, 8), 2
LAYOUT = TokenLayout(GRID, PREFIX)
BASIS = BasisSet(3)
PLANS = {
    "exact dx": BackwardPlan(LAYOUT, BASIS),
    "low-rank dx": BackwardPlan(LAYOUT, BASIS, FixedBasis(BasisSet(6))),
    "adaptive dx": BackwardPlan(LAYOUT, BASIS, AdaptiveBasis(3)),
    "same basis": BackwardPlan(LAYOUT, BASIS, FixedBasis(BASIS)),
    "exact dW": BackwardPlan(LAYOUT, None, FixedBasis(BASIS)),
    "no layout": BackwardPlan(None, None, AdaptiveBasis(3)),
    "reflected": BackwardPlan(LAYOUT, BasisSet(3, boundary="reflect")),
    "8 bits": BackwardPlan(LAYOUT, BASIS, saves_8_bits=True),
}


def gradients(plan, grad, dtype=torch.float64):
    x, weight, bias, _ = problem(GRID, PREFIX, dtype)
    generator = torch.Generator().manual_seed(4)
    down = torch.randn(2, x.shape[2], generator=generator).to(dtype).requires_grad_()
    up = torch.randn(len(weight), 2, generator=generator).to(dtype).requires_grad_()
    own_x = (2 * x.detach()).requires_grad_()
    branches = [Branch(down, up, None, 0.5), Branch(down, up, None, 0.3, own_x)]
    y = linear.low_rank_linear(x, weight, bias, plan=plan, branches=branches)
    return torch.autograd.grad(y, [x, weight, bias, down, up, own_x], grad)


def read_at(tokens, dtype=torch.float64):
    grad = torch.zeros(2, PREFIX + 64, 4, dtype=dtype)
    grad[:, tokens] = torch.randn(2, len(tokens), 4, generator=torch.Generator().manual_seed(6), dtype=dtype)
    return grad


@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_all_tokens(name, monkeypatch):
    plan, grad = PLANS[name], read_at([0] if name == "no layout" else [0, 1])
    used = []
    original = linear.leading_tokens_with_gradient
    monkeypatch.setattr(linear, "leading_tokens_with_gradient", lambda *a: used.append(original(*a)) or used[-1])
    found = gradients(plan, grad)
    monkeypatch.setattr(linear, "leading_tokens_with_gradient", lambda *a: None)
    expected = gradients(plan, grad)
    assert used[0].number == (1 if name == "no layout" else PREFIX)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and relative(one, other) < 1e-12


def test_in_low_precision_the_few_rows_are_exact():
    plan = BackwardPlan(LAYOUT, BASIS, ExactProduct(precision=Precision("int8")))
    grad = read_at([0], torch.float32)
    assert relative(gradients(plan, grad, torch.float32)[0], gradients(PLANS["exact dx"], grad.double())[0]) < 1e-5


@pytest.mark.parametrize("tokens", [[0, 40], [0, 65], [2]])
def test_a_gradient_in_any_other_token_is_seen(tokens):
    grad = read_at(tokens)
    assert leading_tokens.leading_tokens_with_gradient(grad, PLANS["exact dx"]) is None
    grad = read_at([0])
    grad[1, 7, 3] = float("nan")
    assert leading_tokens.leading_tokens_with_gradient(grad, PLANS["exact dx"]) is None


@pytest.mark.parametrize("stacked", [False, True])
def test_the_last_block_of_a_model_that_is_read_at_cls(stacked, monkeypatch):
    """This concerns its MLP, its attention's output and its queries; keys and values are needed in full."""
    model = tiny_vit()
    if stacked:
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])
        )
    model = get_peft_model(model, LBPWHTConfig(r=10, train_base_weight=not stacked, grad_input_dtype="full")).train()
    numbers, found = [], []
    original = linear.leading_tokens_with_gradient
    monkeypatch.setattr(linear, "leading_tokens_with_gradient", lambda *a: numbers.append(original(*a)) or numbers[-1])
    for _ in range(2):
        loss = forward(model, images()).square().sum()
        with multiply_adds() as counted:
            loss.backward()
        found.append((counted.total, [p.grad for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
        if len(found) == 1:
            assert len(numbers) == 12 and sum(one is not None for one in numbers) == 4
            monkeypatch.setattr(linear, "leading_tokens_with_gradient", lambda *a: None)
    (few, grads), (all_of_them, expected) = found
    assert few < all_of_them
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
