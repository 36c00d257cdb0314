"""Layers that are run again in the backward pass do what they did in the forward pass, whatever happened in between."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from models import gradients, images, input_gradient, largest_difference, tiny_vit
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from plans import plan_of
from test_stacking import C_IN, C_OUT, TARGET, adapted, assert_same, backward, lora, problem
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lbp_peft import BasisSet, LBPWHTConfig, TokenLayout, layout_report
from lbp_peft.ops.activation import compressed_layer
from lbp_peft.ops.layer_state import LayerRecord
from lbp_peft.ops.recompute import low_rank_layer

KINDS = {
    "dora": lora(use_dora=True),
    "loha": peft.LoHaConfig(**TARGET),
    "lokr": peft.LoKrConfig(**TARGET),
    "vera": peft.VeraConfig(**TARGET, r=8),
    "ia3": peft.IA3Config(**TARGET, feedforward_modules=[]),
}


def rescale(model):
    for module in model.modules():
        for name, value in getattr(module, "scaling", {}).items():
            module.scaling[name] = 3.0 * value


def replace_data(model):
    weight = model.base_model.model.lin.base_layer.weight
    weight.data = torch.zeros_like(weight)


CHANGES = {"scaling": rescale, "eval": nn.Module.eval, "data": replace_data}


@pytest.mark.parametrize("grad_input", ["full", 3])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_after_the_forward_pass_does_not_matter(kind, change, grad_input):
    _, model = adapted(KINDS[kind], r=3, **input_gradient(grad_input))
    x, grad = problem()
    _, expected = backward(model, x, grad)
    assert not layout_report(model).exact
    parameters = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    CHANGES[change](model)
    found = torch.autograd.grad(y, [x, *parameters.values()], grad)
    assert_same(dict(zip(["x", *parameters], found, strict=True)), expected)
    if change == "scaling" and kind == "dora":  # the change is one
        assert not torch.equal(model(x), y)


@pytest.mark.parametrize("grad_input", ["full", 3])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_that_change_in_place_are_noticed(kind, grad_input):
    """autograd notices it in plain layers, too."""
    plain, model = adapted(KINDS[kind], r=3, **input_gradient(grad_input))
    x, grad = problem()
    for each in (plain, model):
        y = each(x)
        with torch.no_grad():
            each.base_model.model.lin.base_layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)


class WithGiven:
    """A model that is called with some of its weights replaced."""

    def __init__(self, model, given):
        self.named_parameters, self.model, self.given = model.named_parameters, model, given

    def __call__(self, x):
        return torch.func.functional_call(self.model, self.given, (x,))


@pytest.mark.parametrize("grad_input", ["full", 3])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_may_be_given_by_functional_call(kind, grad_input):
    _, model = adapted(KINDS[kind], r=3, **input_gradient(grad_input))
    changed = copy.deepcopy(model)
    given = {n: 2 * p.detach() + 0.1 for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for name, tensor in given.items():
            changed.get_parameter(name).copy_(tensor)
    x, grad = problem()
    expected_y, expected = backward(changed, x, grad)
    _, own = backward(model, x, grad)
    y, found = backward(WithGiven(model, given), x, grad)
    assert torch.equal(y, expected_y)
    assert_same(found, expected)
    assert not all(torch.equal(own[name], e) for name, e in expected.items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_scaling_that_lasts_for_the_forward_pass_only(use_dora):
    def build():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], use_dora=use_dora, init_lora_weights=False)
        config = LBPWHTConfig(r=3, grad_input_rank=6, train_base_weight=False, stack_on=config)
        return get_peft_model(tiny_vit(), config).train()

    found = []
    for inside in (True, False):
        model = build()
        with rescale_adapter_scale(model, 3.0):
            loss = model(images()).logits.square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert largest_difference(*found) == 0
    assert largest_difference(gradients(build(), images()), found[0]) > 0.1


# Any layer


class Odd(nn.Module):
    """A layer that reads numbers and tensors from all kinds of attributes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(C_IN, C_OUT, bias=False)
        self.tied = nn.Linear(C_IN, C_OUT, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(C_OUT, C_OUT).requires_grad_(False)
        self.register_buffer("shift", torch.randn(C_OUT))
        self.factors = {"a": [2.0, (torch.randn(C_OUT), 3.0)]}
        self.plain = torch.randn(C_OUT)
        self.names = ["a"]
        self.calls = 0
        self.history = []

    def forward(self, x):
        self.calls += 1
        self.history.append(x.shape)
        y = self.first(x) + 0.5 * self.tied(x)
        for name in self.names:
            number, (tensor, other) = self.factors[name]
            y = y * (number + other * tensor)
        return self.frozen(y) * self.plain + self.shift


ODD_CHANGES = {
    "number": lambda layer: layer.factors["a"].__setitem__(0, 5.0),
    "tuple": lambda layer: layer.factors["a"].__setitem__(1, (torch.zeros(C_OUT), 1.0)),
    "dictionary": lambda layer: setattr(layer, "factors", {}),
    "list": lambda layer: layer.names.clear(),
    "tensor": lambda layer: setattr(layer, "plain", torch.zeros(C_OUT)),
    "buffer": lambda layer: setattr(layer, "shift", torch.zeros(C_OUT)),
    "parameter": lambda layer: setattr(layer, "frozen", nn.Linear(C_OUT, C_OUT)),
    "untied": lambda layer: setattr(layer.tied, "weight", nn.Parameter(torch.zeros(C_OUT, C_IN))),
    "no module": lambda layer: delattr(layer, "frozen"),
}


def run(layer, x):
    return low_rank_layer(layer, x, plan=plan_of(TokenLayout((8, 8)), BasisSet(3), BasisSet(6)))


@pytest.mark.parametrize("change", ODD_CHANGES.values(), ids=ODD_CHANGES)
@pytest.mark.parametrize("first", ["plain", "parametrized"])
def test_all_that_a_layer_holds_is_put_back(first, change):
    layer = Odd()
    if first == "parametrized":
        parametrize.register_parametrization(layer.frozen, "weight", nn.Tanh())
    x, grad = torch.randn(2, 64, C_IN, requires_grad=True), torch.randn(2, 64, C_OUT)
    weight = layer.first.weight
    expected = torch.autograd.grad(run(layer, x), (x, weight), grad)
    y = run(layer, x)
    change(layer)
    before = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    found = torch.autograd.grad(y, (x, weight), grad)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    # What the backward pass ran again leaves no trace.
    assert layer.calls == 2 and len(layer.history) == 2
    assert all(value is before[name] for name, value in vars(layer).items() if not name.startswith("_"))


@pytest.mark.parametrize("name", ["shift", "plain"])
def test_tensors_that_change_in_place_are_noticed(name):
    layer = Odd()
    y = run(layer, torch.randn(2, 64, C_IN, requires_grad=True))
    getattr(layer, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_error_in_the_backward_pass_leaves_the_layer_as_it_was():
    layer = Odd()
    y = run(layer, torch.randn(2, 64, C_IN, requires_grad=True))
    layer.names = ["b"]
    attributes = vars(layer)
    layer.first.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert layer.names == ["b"] and vars(layer) is attributes


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    layer = Odd()
    x, grad = torch.randn(2, 64, C_IN, requires_grad=True), torch.randn(2, 64, C_OUT)
    expected = torch.autograd.grad(run(layer, x), (x, layer.first.weight), grad)
    checkpoint(run, layer, x, use_reentrant=reentrant).backward(grad)
    assert torch.equal(x.grad, expected[0]) and torch.equal(layer.first.weight.grad, expected[1])


def test_a_record_keeps_no_tensor():
    layer = nn.Linear(2, 2)
    record = LayerRecord(layer)
    assert record.take_tensors() == [layer.weight, layer.bias] and record.take_tensors() == []


# compress_activations


def norm():
    return nn.LayerNorm(64).requires_grad_(False)


def test_a_compressed_layer_is_run_again_as_it_was():
    layer, x = norm(), torch.randn(2, 9, 64, requires_grad=True)
    grad = torch.randn(2, 9, 64)
    expected = torch.autograd.grad(compressed_layer(layer, x), x, grad)[0]
    y = compressed_layer(layer, x)
    layer.eps, layer.weight = 10.0, nn.Parameter(torch.zeros(64))
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)
    layer = norm()
    y = compressed_layer(layer, x)
    layer.weight.data = torch.zeros(64)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)
    slope = nn.LeakyReLU(0.3)
    y, layer = compressed_layer(slope, x), copy.deepcopy(slope)
    slope.negative_slope = 0.9
    assert torch.equal(*(torch.autograd.grad(each, x, grad)[0] for each in (y, compressed_layer(layer, x))))


def test_a_compressed_layer_with_weights_by_functional_call():
    layer, x, grad = norm(), torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 9, 64)
    given = torch.randn(64)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return compressed_layer(self.layer, x)

    y = torch.func.functional_call(Holder(), {"layer.weight": given}, (x,))
    found = torch.autograd.grad(y, x, grad)[0]
    exact = torch.autograd.grad(F.layer_norm(x, (64,), given), x, grad)[0]
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_a_compressed_layer_whose_weight_changes_in_place_is_noticed():
    layer, x = norm(), torch.randn(2, 9, 64, requires_grad=True)
    y = compressed_layer(layer, x)
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
