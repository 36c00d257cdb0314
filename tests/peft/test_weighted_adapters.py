"""Adapters that are linear combinations of others."""

import pytest
import torch
from models import (
    CASES,
    NO_GRID,
    adapter_parameters,
    disturb,
    images,
    layers_of,
    outputs,
    same_state,
    state_of,
    tiny_vit,
    train,
)
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lbp_peft import LBPWHTConfig

pytestmark = pytest.mark.filterwarnings(NO_GRID)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
VIT, X = CASES[-1], images()


def two_adapters(case=VIT, first=None, second=None, base=None):
    saved = {"modules_to_save": [case.head]}
    model = get_peft_model(base or case.base(), case.config(**saved | (first or {})))
    model.add_adapter("second", case.config(**saved | (second or {})))
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    return model


def weights_of(model, adapter):
    return {
        name.replace(f".{adapter}", ""): parameter for name, parameter in adapter_parameters(model, adapter).items()
    }


@every_case
@pytest.mark.parametrize("factors", [(0.3, 0.7), (1, -1), (2.0, 0.5), (0, 0)])
def test_the_sum_of_what_each_changed(case, factors):
    model, fresh = two_adapters(case), weights_of(case.adapted(modules_to_save=[case.head]), "default")
    before = state_of(model)
    model.add_weighted_adapter(["default", "second"], list(factors), "sum")
    changes = [(f, weights_of(model, name)) for f, name in zip(factors, ("default", "second"), strict=True)]
    found = weights_of(model, "sum")
    assert found.keys() == fresh.keys()
    for name, start in fresh.items():
        expected = start.double() + sum(f * (own[name].double() - start.double()) for f, own in changes)
        torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=1e-6)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@every_case
def test_one_adapter_alone_is_copied_to_the_bit(case):
    model, x = two_adapters(case), case.inputs()
    model.add_weighted_adapter(["second"], [1.0], "same")
    model.set_adapter("second")
    expected = outputs(model, x)
    model.set_adapter("same")
    assert torch.equal(outputs(model, x), expected)


def test_it_is_neither_active_nor_trained_until_it_is_switched_to():
    model = two_adapters()
    before, trainable = outputs(model, X), {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert model.active_adapters == ["default"] and torch.equal(outputs(model, X), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("mean")
    losses = train(model, X)
    assert losses[-1] < losses[0]


DIFFERENT = {
    "first": {"target_modules": ["fc1"], "layers_to_transform": [0], "modules_to_save": None},
    "second": {"target_modules": r".*q_proj", "r": 6, "exclude_modules": None},
}


@pytest.mark.parametrize("settings", [{}, DIFFERENT], ids=["equal", "different"])
def test_it_is_saved_loaded_merged_and_deleted_as_any_other(settings, tmp_path):
    model = two_adapters(**settings)
    model.add_weighted_adapter(["default", "second"], [-0.5, 2.0], "sum")
    model.set_adapter("sum")
    expected = outputs(model, X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "sum")
    assert torch.equal(outputs(loaded, X), expected)
    assert torch.equal(outputs(loaded.merge_and_unload(), X), expected)
    model.delete_adapter("sum")
    assert list(model.peft_config) == ["default", "second"] and not any(".sum" in n for n in model.state_dict())


def test_layers_that_an_adapter_leaves_alone_it_did_not_change():
    model = two_adapters(**DIFFERENT)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum")
    adapted = {name for name, layer in layers_of(model).items() if "sum" in layer.lbpwht_weight}
    assert {n.removeprefix("base_model.model.vit.layers.") for n in adapted} == {
        "0.mlp.fc1", "0.attention.q_proj", "1.attention.q_proj",
    }  # fmt: skip
    for name in adapted:
        layer = layers_of(model)[name]
        given, factor = ("default", 0.5) if "fc1" in name else ("second", 2.0)
        base, copies = layer.get_base_layer(), (layer.lbpwht_weight, layer.lbpwht_bias)
        for start, own in zip((base.weight, base.bias), copies, strict=True):
            torch.testing.assert_close(own["sum"], start + factor * (own[given] - start))


def test_the_first_adapters_settings_are_the_new_ones():
    model = two_adapters(first={"r": 3, "rank_pattern": {"fc2": 21}}, second={"r": 6, "modules_to_save": None})
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    config = model.peft_config["mean"]
    assert (config.r, config.rank_pattern, config.modules_to_save) == (3, {"fc2": 21}, ["classifier"])
    rules = {name: layer.lbpwht_rule for name, layer in layers_of(model).items()}
    assert all(rule["mean"] == rule["default"] for rule in rules.values())
    assert model.peft_config["second"].r == 6


def test_names_that_end_others_target_no_more_than_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.other = nn.Linear(4, 4), nn.ModuleDict({"lin": nn.Linear(4, 4)})

        def forward(self, x):
            return self.other["lin"](self.lin(x))

    model = get_peft_model(Model(), LBPWHTConfig(target_modules=r"lin"))
    model.add_weighted_adapter(["default"], [1.0], "same")
    assert list(layers_of(model)) == ["base_model.model.lin"]


def test_layers_of_other_kinds_and_buffers_of_modules_to_save():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1d, self.pixels, self.norm = Conv1D(6, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4)

    config = {"target_modules": ["conv1d", "pixels"], "modules_to_save": ["norm"]}
    model = get_peft_model(Model(), LBPWHTConfig(**config))
    model.add_adapter("second", LBPWHTConfig(**config))
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    norms = model.base_model.model.norm.modules_to_save
    for name in ("default", "second"):
        norms[name].running_mean.add_(1)
    model.add_weighted_adapter(["default", "second"], [0.25, 0.75], "mean")
    first, second, found = (weights_of(model, name) for name in ("default", "second", "mean"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    assert torch.equal(norms["mean"].running_mean, torch.ones(4))
    norms["second"].running_mean.add_(1)
    with pytest.raises(ValueError, match="different values for the buffer running_mean of norm"):
        model.add_weighted_adapter(["default", "second"], [0.25, 0.75], "another")
    assert "another" not in model.peft_config


def test_half_precision_models_keep_their_float32_copies():
    model = two_adapters(base=tiny_vit().to(torch.bfloat16))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    for name, tensor in weights_of(model, "mean").items():
        assert tensor.dtype == weights_of(model, "default")[name].dtype
        if "lbpwht_" in name:
            assert tensor.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_while_others_are_merged():
    model, same = two_adapters(), two_adapters()
    model.merge_adapter()
    for m in (model, same):
        m.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert same_state(weights_of(model, "mean"), weights_of(same, "mean"))


@pytest.mark.parametrize("arguments, message", [
    ((["default", "third"], [0.5, 0.5], "mean"), r"'third' does not exist. LBP-WHT adapters are \['default'"),
    ((["default", "second"], [0.5, 0.5], "second"), "an adapter 'second' already"),
    ((["default", "second"], [0.5], "mean"), "two lists of the same length"),
    (([], [], "mean"), "two lists of the same length"),
    (("default", [0.5] * 7, "mean"), "two lists of the same length"),
    ((["default", "second"], [0.5, float("nan")], "mean"), "weights must be finite numbers, got nan"),
    ((["default", "second"], [0.5, "0.5"], "mean"), "weights must be finite numbers, got '0.5'"),
    ((["default", "second"], [0.5, 0.5], "../mean"), "an adapter called '../mean'"),
    ((["default", "second"], [0.5, 0.5], "mean", "svd"), '"linear", got combination_type=.svd'),
    ((["default", "second"], [0.5, 0.5], "copy"), "an adapter called 'copy'"),
    ((["default", "second"], [0.5, 0.5], "mean", "linear", 4), "got combination_type='linear' with svd_rank"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused_and_nothing_is_added(arguments, message):
    model = two_adapters()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "second"] and same_state(state_of(model), before)


@pytest.mark.parametrize("kind", ["cat", "ties", "dare_linear", "magnitude_prune", None, 5])
def test_other_types_of_combination_are_refused(kind):
    with pytest.raises(ValueError, match='combined with combination_type="linear"'):
        two_adapters().add_weighted_adapter(["default"], [1.0], "same", combination_type=kind, density=0.5)


def test_adapters_without_weights_cannot_be_combined():
    model = two_adapters(second={"train_base_weight": False})
    with pytest.raises(ValueError, match="'second' has train_base_weight=False: it has no weights to combine"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")


def test_peft_s_defaults_for_the_other_types_are_accepted():
    model = two_adapters()
    model.add_weighted_adapter(
        adapters=["default"], weights=[1.0], adapter_name="same", combination_type="linear", density=None,
        svd_rank=None, svd_full_matrices=True, majority_sign_method="total",
    )  # fmt: skip
    assert "same" in model.peft_config
