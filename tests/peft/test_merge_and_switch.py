"""Adapters are merged into the base weights and unmerged, and switched."""

import pytest
import torch
from models import (
    CASES,
    NO_GRID,
    adapter_parameters,
    disturb,
    hooks_of,
    images,
    layers_of,
    outputs,
    same_state,
    state_of,
    tiny_vit,
    train,
)
from peft import get_peft_model

from lbp_peft import LBPWHTConfig

pytestmark = pytest.mark.filterwarnings(NO_GRID, "ignore:Already", "ignore:All adapters are already merged")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
VIT = CASES[-1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def base_weights(model):
    return {
        f"{name}.{kind}": parameter.clone()
        for name, layer in layers_of(model).items()
        for kind, parameter in layer.get_base_layer().named_parameters()
    }


@every_case
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unload_gives_the_plain_model_with_the_adapted_outputs(case, safe, dtype):
    x, plain = case.inputs().to(dtype), case.base()
    model = get_peft_model(case.base().to(dtype), case.config(modules_to_save=[case.head]))
    disturb(model)
    train(model, x, steps=1)
    expected = outputs(model, x)
    assert not torch.equal(expected, outputs(case.base().to(dtype), x))
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(plain)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in plain.named_modules()]
    assert {p.dtype for n, p in merged.named_parameters() if case.head not in n} == {dtype}
    assert not hooks_of(merged) and not layers_of(merged)
    assert torch.equal(outputs(merged, x), expected)


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_and_unmerging_change_no_output_and_no_bit_of_the_base(case, dtype):
    x = case.inputs().to(dtype)
    model = get_peft_model(case.base().to(dtype), case.config())
    disturb(model)
    expected, base = outputs(model, x), base_weights(model)
    model.merge_adapter(safe_merge=True)
    assert not same_state(base_weights(model), base)
    assert torch.equal(outputs(model, x), expected)
    model.unmerge_adapter()
    assert same_state(base_weights(model), base)
    assert torch.equal(outputs(model, x), expected)


@every_case
def test_disabling_a_merged_adapter_takes_it_out_first(case):
    x = case.inputs()
    model = case.adapted()
    disturb(model)
    expected = outputs(model, x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), outputs(case.base(), x))
    assert torch.equal(outputs(model, x), expected)


def two_adapters(case=VIT, **second):
    model = case.adapted()
    model.add_adapter("second", case.config(**second))
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    return model


@every_case
def test_naming_the_adapter_to_merge(case):
    x = case.inputs()
    model = two_adapters(case)
    model.set_adapter("second")
    expected = outputs(model, x)
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["second"])
    assert model.get_model_status().merged_adapters == ["second"]
    assert torch.equal(outputs(model, x), expected)
    model.unmerge_adapter()
    assert torch.equal(outputs(model.merge_and_unload(adapter_names=["second"]), x), expected)


@every_case
def test_merging_several_is_activating_several(case):
    x = case.inputs()
    model = two_adapters(case)
    model.base_model.set_adapter(["default", "second"])
    expected, base = outputs(model, x), base_weights(model)
    model.merge_adapter()
    assert torch.equal(outputs(model, x), expected)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default", "second"])
    assert torch.equal(outputs(model, x), expected)
    model.unmerge_adapter()
    assert same_state(base_weights(model), base)
    assert torch.equal(outputs(model.merge_and_unload(), x), expected)


def test_merging_one_after_the_other_is_merging_both():
    model, x = two_adapters(), images()
    base = base_weights(model)
    model.base_model.set_adapter(["default", "second"])
    expected = outputs(model, x)
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["second"])
    assert model.get_model_status().merged_adapters == ["default", "second"]
    assert torch.equal(outputs(model, x), expected)
    model.merge_adapter()  # both are merged already: nothing happens
    assert torch.equal(outputs(model, x), expected)
    model.unmerge_adapter()
    assert same_state(base_weights(model), base)


def test_switching_while_merged_unmerges():
    model, x = two_adapters(), images()
    base, expected = base_weights(model), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = outputs(model, x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    assert same_state(base_weights(model), base)
    assert torch.equal(outputs(model, x), expected["default"])


def test_an_adapter_added_while_another_is_merged_starts_at_the_true_base():
    model, x = VIT.adapted(), images()
    disturb(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", VIT.config())
    model.set_adapter("second")
    assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))


def test_a_merged_adapter_cannot_be_deleted():
    model = two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("second")
    model.unmerge_adapter()
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_broken_weights_and_changes_nothing(value):
    model = VIT.adapted(target_modules=["fc1"], layers_to_transform=[0])
    base = base_weights(model)
    (layer,) = layers_of(model).values()
    layer.lbpwht_weight["default"].data[0, 0] = value
    with pytest.raises(ValueError, match=r"NaNs detected.*layers\.0\.mlp\.fc1.*default"):
        model.merge_adapter(safe_merge=True)
    assert same_state(base_weights(model), base) and not layer.merged
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    model.merge_adapter(safe_merge=False)  # without being asked, as in PEFT
    assert layer.merged


def test_a_safe_merge_looks_at_the_bias_too():
    model = VIT.adapted()
    next(iter(layers_of(model).values())).lbpwht_bias["default"].data[3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_moving_a_merged_model_to_another_dtype():
    model, x = VIT.adapted(), images()
    disturb(model)
    model.merge_adapter()
    model.double()
    merged = outputs(model, x.double())
    model.unmerge_adapter()
    assert torch.allclose(outputs(model, x.double()), merged, atol=1e-6)
    with model.disable_adapter():
        assert torch.allclose(outputs(model, x.double()), outputs(tiny_vit().double(), x.double()), atol=1e-6)


@pytest.mark.parametrize("train_base_weight", [True, False])
def test_a_merged_model_in_training_mode_runs_plainly(train_base_weight):
    model, x = VIT.adapted(train_base_weight=train_base_weight), images()
    disturb(model)
    expected = outputs(model, x)
    model.merge_adapter()
    assert torch.equal(model.train()(x).logits, expected)


def test_layers_without_the_adapter_are_left_out_of_the_merge():
    model = VIT.adapted(target_modules=["fc1"])
    model.add_adapter("second", LBPWHTConfig(target_modules=["q_proj"]))
    disturb(model, "default")
    disturb(model, "second")
    before = base_weights(model)
    model.merge_adapter(adapter_names=["second"])
    changed = {name for name, tensor in base_weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all("q_proj" in name for name in changed)


def test_the_base_is_trained_by_no_merge():
    """Merged weights are values, not functions of the adapter's parameters."""
    model = VIT.adapted()
    disturb(model)
    model.merge_adapter()
    for layer in layers_of(model).values():
        assert layer.get_base_layer().weight.is_leaf and not layer.get_base_layer().weight.requires_grad
        assert layer.get_base_layer().weight.data_ptr() != layer.lbpwht_weight["default"].data_ptr()
    merged = base_weights(model)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
    assert same_state(base_weights(model), merged)


@every_case
def test_merging_without_weights_of_its_own_changes_nothing(case):
    x = case.inputs()
    model = case.adapted(train_base_weight=False)
    model.merge_adapter()
    assert torch.equal(outputs(model, x), outputs(case.base(), x))
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert same_state(state_of(merged), state_of(case.base())) and not hooks_of(merged)


@pytest.mark.parametrize("saved", [["projection"], ["patch_embeddings"], ["vit.embeddings", "classifier"]])
@pytest.mark.parametrize("second", [False, True])
def test_trained_modules_of_any_kind_are_merged_with_the_rest(saved, second):
    """They need not have a weight of their own, and their copies must not keep the hooks of the original."""
    model, x = VIT.adapted(modules_to_save=saved), images()
    if second:
        model.add_adapter("second", VIT.config(modules_to_save=saved))
        model.set_adapter("second")
    disturb(model, model.active_adapter)
    train(model, x, steps=1)
    expected = outputs(model, x)
    merged = model.merge_and_unload()
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in tiny_vit().named_modules()]
    assert not hooks_of(merged)
    assert torch.equal(outputs(merged, x), expected)
