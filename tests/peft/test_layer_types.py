"""The registry of layer types has all types, and one file is enough to add another."""

import pytest
import reference
import torch
import torch.nn.functional as F
from models import images, largest_difference, layers_of
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lbp_peft import LBPWHTConfig, LBPWHTLinear, exact_backward, layer_types, layout_report, register_layer_type
from lbp_peft.tuner import LBPWHTPointwiseConv, LBPWHTTransposedLinear


@pytest.mark.parametrize("module, expected", [
    (nn.Linear(3, 3), LBPWHTLinear),
    (Conv1D(3, 3), LBPWHTTransposedLinear),
    (nn.Conv1d(3, 3, 1), LBPWHTPointwiseConv),
    (nn.Conv2d(3, 3, 1), LBPWHTPointwiseConv),
    (nn.Conv2d(3, 3, 3), None),
    (nn.Conv3d(3, 3, 1), None),
    (nn.Bilinear(3, 3, 3), None),
    (nn.LayerNorm(3), None),
])  # fmt: skip
def test_each_layer_is_of_one_type_or_none(module, expected):
    matching = [one.adapting_class for one in layer_types._LAYER_TYPES if one.matches(module)]
    assert matching == ([] if expected is None else [expected])
    found = layer_types.layer_type_of(module)
    assert (found and found.adapting_class) == expected


class Halved(nn.Module):
    """A layer type from outside the package, which computes x (W / 2)^T + b."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return F.linear(x, self.weight / 2, self.bias)


class Model(nn.Module):
    """A model that passes an 8 x 8 grid of patches through two blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(Halved(12, 20), nn.GELU(), Halved(20, 12)) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


@pytest.fixture
def registered(monkeypatch):
    """Register a new type, as its file would."""
    monkeypatch.setattr(layer_types, "_LAYER_TYPES", list(layer_types._LAYER_TYPES))

    @register_layer_type("Halved", lambda module: layer_types.runs_forward_of(module, Halved))
    class LBPWHTHalved(LBPWHTLinear):
        def _num_features(self, base):
            return base.weight.shape[1], base.weight.shape[0]

        def _multiply(self, x, weight, bias):
            return F.linear(x, weight / 2, bias)

        def _multiply_low_rank(self, x, weight, bias, plan):
            return super()._multiply_low_rank(x, weight / 2, bias, plan)

        def _parameter_of_weight(self):
            return None  # the matrix is computed again in each call

    return LBPWHTHalved


def gradients(model):
    model.zero_grad()
    model(images().double()).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"r": 64}, {"r": 10}, {"r": 10, "grad_input_rank": 10}])
def test_a_new_type_needs_one_file(registered, settings):
    model = get_peft_model(Model().double(), LBPWHTConfig(**settings, modules_to_save=["head"])).train()
    assert len(layers_of(model)) == 4 and {type(layer) for layer in layers_of(model).values()} == {registered}
    low = gradients(model)
    with exact_backward(model):
        exact = gradients(model)
    assert len(low) == 10
    if settings["r"] == 64:
        assert largest_difference(low, exact) < 1e-12
    else:
        assert not layout_report(model).exact
        assert {name for name in low if torch.equal(low[name], exact[name])} >= {n for n in low if "head" in n}
        assert largest_difference(low, exact) > 1e-3
    merged = model.merge_and_unload()
    assert type(merged.blocks[0][0]) is Halved


def test_the_weight_gradient_of_a_new_type_is_the_projected_one(registered):
    model = get_peft_model(Model().double(), LBPWHTConfig(r=10, grad_input_dtype="full")).train()
    layer = model.base_model.model.blocks[1][2]  # behind it all gradients are exact
    seen = {}

    def note(module, args, y):
        seen["x"] = args[0]
        y.register_hook(lambda grad: seen.update(g=grad))

    layer.register_forward_hook(note)
    found = gradients(model)["base_model.model.blocks.1.2.lbpwht_weight.default"]
    bases = reference.orthogonal_bases((8, 8), 10)
    x_hat, g_hat = (torch.einsum("kl,nlc->nkc", bases, seen[name].detach()) for name in ("x", "g"))
    expected = torch.einsum("nko,nki->oi", g_hat, x_hat) / 2
    assert (found - expected).norm() < 1e-10 * expected.norm()


def test_without_it_the_type_is_refused_and_the_others_are_listed():
    with pytest.raises(TypeError, match=r"Halved, which LBP-WHT does not.*torch.nn.Linear.*Conv2d"):
        get_peft_model(Model(), LBPWHTConfig(target_modules=["blocks.0.0"]))
    with pytest.raises(ValueError, match="No blocks with linear layers"):
        get_peft_model(Model(), LBPWHTConfig())
