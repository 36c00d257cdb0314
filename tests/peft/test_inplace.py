"""Outputs of adapted layers may be changed in place, like those of plain layers."""

import copy

import peft
import pytest
import torch
from models import gradients, input_gradient, largest_difference
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lbp_peft import LBPWHTConfig, layout_report
from lbp_peft.ops.activation import compressed_layer
from lbp_peft.ops.attention import AttentionMode, attention


class Net(nn.Module):
    """Blocks of an MLP with a residual connection, whose outputs are changed in place or copied first."""

    def __init__(self, change, kind="linear", images=False):
        super().__init__()
        torch.manual_seed(0)
        self.change, self.images, self.copies = change, images or kind == "conv", False
        self.patch = nn.Conv2d(3, 16, 4, 4)

        def layer(a, b):
            return {"linear": nn.Linear(a, b), "conv": nn.Conv2d(a, b, 1), "conv1d": Conv1D(b, a)}[kind]

        self.last = -1 if kind == "conv" else 0
        block = {"norm": nn.LayerNorm(16), "fc1": layer(16, 32), "act": nn.GELU(), "fc2": layer(32, 16)}
        self.blocks = nn.ModuleList([nn.ModuleDict(copy.deepcopy(block)) for _ in range(2)])
        self.kind = kind

    def forward(self, x):
        t = self.patch(x)
        if self.kind != "conv":
            t = t.movedim(1, -1) if self.images else t.flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = t if self.kind == "conv" else self.changed(block["norm"](t))
            y = self.changed(block["act"](self.changed(block["fc1"](y))))
            t = self.changed(block["fc2"](y), t)
        return t.flatten(1).unflatten(1, (-1, 8)).mean(1)

    def changed(self, y, t=None):
        y = y.clone() if self.copies else y
        return CHANGES[self.change](y, y.detach().flip(0) if t is None else t)


def _add(y, t):
    y += t
    return y


def _add_to_slice(y, t):
    y[:, 0] += t[:, 0]
    y[:, 1:] *= 2
    return y


CHANGES = {
    "add": _add,
    "mul": lambda y, t: y.mul_(t),
    "relu": lambda y, t: nn.ReLU(inplace=True)(y),
    "dropout": lambda y, t: nn.Dropout(0.3, inplace=True)(y),
    "slice": _add_to_slice,
    "two": lambda y, t: torch.relu_(y.add_(t)),
}
METHODS = {
    "lora": LoraConfig(r=2, init_lora_weights=False),
    "dropout": LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.2),
    "dora": LoraConfig(r=2, init_lora_weights=False, use_dora=True),
    "loha": peft.LoHaConfig(r=2, init_weights=False),
    "ia3": peft.IA3Config(feedforward_modules=[]),
}


def adapted(change, method=None, kind="linear", images=False, **settings):
    targets = ["fc1", "fc2"]
    model = Net(change, kind, images)
    settings = {"r": 10} | input_gradient(10) | settings
    if method is None:
        return get_peft_model(model, LBPWHTConfig(target_modules=targets, **settings)).train()
    config = copy.deepcopy(METHODS[method])
    config.target_modules = set(targets)
    model = get_peft_model(model, config)
    return get_peft_model(model, LBPWHTConfig(train_base_weight=False, **settings)).train()


def check(model, autocast=False):
    found = []
    for copies in (False, True):
        next(m for m in model.modules() if isinstance(m, Net)).copies = copies
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients(model, torch.randn(2, 3, 32, 32)))
    assert not layout_report(model).exact
    assert largest_difference(*found) < (0.05 if autocast else 1e-4)


@pytest.mark.parametrize("kind, images", [("linear", False), ("linear", True), ("conv1d", False), ("conv", True)])
@pytest.mark.parametrize("change", CHANGES)
def test_of_a_layer(change, kind, images):
    for grad_input in (10, "full", "int8"):
        check(adapted(change, kind=kind, images=images, **input_gradient(grad_input)))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", CHANGES)
def test_of_a_layer_that_another_method_adapts(change, method, images):
    check(adapted(change, method, images=images))
    check(adapted(change, method, images=images, **input_gradient("full")))


@pytest.mark.parametrize("method", [None, "lora", "dora"])
@pytest.mark.parametrize("change", CHANGES)
def test_of_layers_that_keep_their_inputs_in_8_bits(change, method):
    check(adapted(change, method, compress_activations="all"))


@pytest.mark.parametrize("method", [None, "lora", "dora"])
@pytest.mark.parametrize("change", CHANGES)
def test_under_autocast(change, method):
    check(adapted(change, method, compress_activations="all"), autocast=True)


@pytest.mark.parametrize("method", ["lora", "loha"])
@pytest.mark.parametrize("change", CHANGES)
def test_of_a_convolution_that_another_method_adapts(change, method):
    check(adapted(change, method, kind="conv"))


def test_of_a_compressed_layer_whose_output_is_a_view():
    class Product(nn.Linear):
        pass

    layer, x = Product(8, 8), torch.randn(2, 5, 8, requires_grad=True)
    y = compressed_layer(layer, x)
    y += 1
    y.sum().backward()
    assert x.grad.count_nonzero()


def test_of_attention(decide):
    decide(use_attention_by_products=True)
    tensors = [torch.randn(2, 2, 9, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    found = []
    for copies in (False, True):
        with AttentionMode(attention) as mode:
            y = nn.functional.scaled_dot_product_attention(*tensors)
        assert mode.was_called
        y = y.clone() if copies else y
        y *= 2
        y[:, :, 0] += 1
        found.append(torch.autograd.grad(y.square().sum(), tensors))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_gradients_of_gradients_may_be_changed_in_place():
    model = adapted("add", **input_gradient("full"))
    loss = model(torch.randn(2, 3, 32, 32)).square().sum()
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)
    for gradient in found:
        gradient.mul_(2)
