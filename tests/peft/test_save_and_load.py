"""Checkpoints: what is written, what is restored, and what is refused."""

import json

import pytest
import torch
from models import (
    CASES,
    NO_GRID,
    adapter_parameters,
    disturb,
    gradients,
    hooks_of,
    images,
    largest_difference,
    layers_of,
    outputs,
    run_python,
    same_state,
    state_of,
    tiny_vit,
    train,
)
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from lbp_peft import LBPWHTConfig, layout_report

pytestmark = pytest.mark.filterwarnings(NO_GRID)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
VIT = CASES[-1]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trained(case=VIT, **changes):
    model = case.adapted(**({"modules_to_save": [case.head]} | changes))
    disturb(model)
    return model


@every_case
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_what_is_saved_is_loaded(case, saved, low_memory, tmp_path):
    x = case.inputs()
    model = trained(case, modules_to_save=[case.head] if saved else None)
    model.save_pretrained(tmp_path)
    assert {CONFIG, WEIGHTS} <= {path.name for path in tmp_path.iterdir()}
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_memory)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert same_state(state_of(loaded), state_of(model))
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_checkpoint_holds_the_adapter_alone(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == get_peft_model_state_dict(model).keys()
    assert len(tensors) == 2 * 12 + 2
    assert all(n.endswith(("lbpwht_weight", "lbpwht_bias", "classifier.weight", "classifier.bias")) for n in tensors)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LBPWHT" and config["r"] == 3 and config["grad_input_rank"] == 6


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    model, x = trained(), images()
    model.save_pretrained(tmp_path / "adapter")
    tiny_vit().save_pretrained(tmp_path / "base")
    save_file({"x": x, "expected": outputs(model, x)}, tmp_path / "outputs.safetensors")
    run_python(
        """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import ViTForImageClassification
import lbp_peft

folder = sys.argv[1]
saved = load_file(f"{folder}/outputs.safetensors")
base = ViTForImageClassification.from_pretrained(f"{folder}/base")
model = PeftModel.from_pretrained(base, f"{folder}/adapter")
with torch.no_grad():
    assert torch.equal(model(saved["x"]).logits, saved["expected"])
    assert torch.equal(model.merge_and_unload()(saved["x"]).logits, saved["expected"])
""",
        str(tmp_path),
    )


def test_a_merged_model_is_saved_and_loaded_as_any_other(tmp_path):
    model, x = trained(), images()
    expected = outputs(model, x)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded, info = type(tiny_vit()).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(loaded, x), expected)


@pytest.mark.parametrize("safe", [True, False])
def test_pickled_checkpoints_work_too(safe, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / (WEIGHTS if safe else "adapter_model.bin")).exists()
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), tmp_path), images()), outputs(model, images()))


@every_case
def test_loading_to_train_on(case, tmp_path):
    x = case.inputs()
    model = trained(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert names == adapter_parameters(loaded).keys()
    assert train(loaded, x) == train(model, x)
    assert same_state(state_of(loaded), state_of(model))
    assert str(layout_report(loaded)) == str(layout_report(model))


def test_only_selected_adapters_are_saved(tmp_path):
    model = trained()
    for name in ("second", "third"):
        model.add_adapter(name, VIT.config(modules_to_save=["classifier"]))
    disturb(model, "second", seed=6)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["second"]
    assert not (tmp_path / WEIGHTS).exists()
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "second")
    assert torch.equal(outputs(loaded, images()), outputs(model, images()))


@every_case
def test_loading_beside_another_adapter(case, tmp_path):
    x = case.inputs()
    first, model = trained(case), case.adapted(seed=0, modules_to_save=[case.head])
    first.save_pretrained(tmp_path)
    disturb(model, seed=8)
    before = outputs(model, x)
    model.load_adapter(tmp_path, "loaded")
    assert torch.equal(outputs(model, x), before)
    model.set_adapter("loaded")
    assert torch.equal(outputs(model, x), outputs(first, x))
    model.set_adapter("default")
    assert torch.equal(outputs(model, x), before)


def test_loading_into_an_adapter_that_is_there(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    expected = outputs(model, images())
    disturb(model, seed=8)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(outputs(model, images()), expected)


@every_case
def test_state_dicts_go_out_and_in(case):
    x = case.inputs()
    model = trained(case)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    assert not any("default" in name for name in state)
    other = case.adapted(modules_to_save=[case.head])
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(outputs(other, x), outputs(model, x))


def test_state_dicts_of_injected_models():
    model, x = trained(modules_to_save=None), images()
    injected = inject_adapter_in_model(VIT.config(), tiny_vit())
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model))
    assert torch.equal(outputs(injected, x), outputs(model, x))
    again = get_peft_model_state_dict(injected)
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in again.items()}
    assert same_state(prefixed, get_peft_model_state_dict(model))


@pytest.mark.parametrize("saved", [False, True])
def test_an_adapter_without_weights_is_saved_and_loaded(saved, tmp_path):
    model = trained(modules_to_save=["classifier"] if saved else None, train_base_weight=False)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == (2 if saved else 0)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    assert torch.equal(outputs(loaded, images()), outputs(model, images()))
    assert len(layers_of(loaded)) == 12 and loaded.peft_config["default"].train_base_weight is False
    for low_memory in (True, False):
        other = PeftModel.from_pretrained(tiny_vit(), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(outputs(other, images()), outputs(model, images()))


def test_settings_come_back_from_a_checkpoint(tmp_path):
    """Training continues with the same bases in the same layers."""
    settings = {"r": 7, "grad_input_rank": 4, "block_size": 4, "selection": "lp_linf", "rank_pattern": {"mlp.fc2": 2}}
    model = trained(grid_size=(8, 8), num_prefix_tokens=1, **settings)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LBPWHTConfig)
    assert config.grid_size == (8, 8) and config.num_prefix_tokens == 1
    assert {name: getattr(config, name) for name in settings} == settings
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    x = images()
    assert largest_difference(gradients(loaded.train(), x), gradients(model.train(), x)) == 0
    assert {n: layer.lbpwht_rule for n, layer in layers_of(loaded).items()} == {
        n: layer.lbpwht_rule for n, layer in layers_of(model).items()
    }


def test_pushing_to_the_hub_sends_the_adapter(monkeypatch):
    from huggingface_hub import HfApi

    sent = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(
        HfApi, "create_commit", lambda self, operations, **_: sent.extend(o.path_in_repo for o in operations)
    )
    trained().push_to_hub("someone/some-adapter")
    assert sorted(sent) == ["README.md", CONFIG, WEIGHTS]


# What is refused


def spoilt(folder, how):
    """Save an adapter and edit its checkpoint; return the name of a tensor that the message must give."""
    trained().save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    if how == "missing":
        name = next(n for n in tensors if n.endswith("lbpwht_bias"))
        del tensors[name]
    elif how == "extra":
        name = "base_model.model.vit.layers.7.mlp.fc1.lbpwht_weight"
        tensors[name] = torch.zeros(2, 2)
    else:
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["fc1"], modules_to_save=["classifier"]))
        tensors = {n: t.clone() for n, t in get_peft_model_state_dict(lora).items()}
        name = next(n for n in tensors if "lora_" in n)
    save_file(tensors, folder / WEIGHTS)
    return name.removeprefix("base_model.model.")


spoilings = pytest.mark.parametrize("how", ["missing", "extra", "lora"])


@spoilings
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_checkpoint_that_does_not_fit_leaves_the_base_model_as_it_was(how, low_memory, tmp_path):
    name = spoilt(tmp_path, how)
    base = tiny_vit()
    with pytest.raises(ValueError, match="does not fit") as caught:
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    if how == "lora":
        assert "another PEFT method" in str(caught.value) and "26 missing" not in str(caught.value)
    else:
        assert name in str(caught.value)
    assert not layers_of(base) and not hooks_of(base)
    assert same_state(state_of(base), state_of(tiny_vit()))
    assert torch.equal(outputs(base, images()), outputs(tiny_vit(), images()))
    assert all(p.device.type == "cpu" for p in base.parameters())
    # The model can be adapted as if nothing had happened.
    assert train(get_peft_model(base, VIT.config()), images()) == train(VIT.adapted(), images())


@spoilings
def test_a_checkpoint_that_does_not_fit_leaves_other_adapters_alone(how, tmp_path):
    spoilt(tmp_path, how)
    model = VIT.adapted(modules_to_save=["classifier"])
    disturb(model, seed=8)
    before, state = outputs(model, images()), state_of(model)
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path, "broken")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert same_state(state_of(model), state)
    assert torch.equal(outputs(model, images()), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapter_parameters(model).keys()
    losses = train(model, images())
    assert losses[-1] < losses[0]


@spoilings
@pytest.mark.parametrize("train_base_weight", [True, False])
def test_a_trained_adapter_outlives_a_bad_state_dict(how, train_base_weight, tmp_path):
    spoilt(tmp_path, how)
    model = trained(train_base_weight=train_base_weight)
    if not train_base_weight and how == "missing":
        pytest.skip("it has no tensors that could be missing")
    before, state = outputs(model, images()), state_of(model)
    with pytest.raises(ValueError, match="does not fit"):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert list(model.peft_config) == ["default"] and len(layers_of(model)) == 12
    assert same_state(state_of(model), state)
    assert torch.equal(outputs(model, images()), before)


def test_an_adapter_trained_in_its_head_alone_outlives_a_bad_state_dict(tmp_path):
    """Its layers still hold the base weights, but it has been trained."""
    spoilt(tmp_path, "missing")
    model = VIT.adapted(modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    before = outputs(model, images())
    with pytest.raises(ValueError, match="does not fit"):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert len(layers_of(model)) == 12
    assert torch.equal(outputs(model, images()), before)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    tensors = {n: t for n, t in load_file(tmp_path / WEIGHTS).items() if "classifier" not in n}
    save_file(tensors, tmp_path / WEIGHTS)
    # PEFT itself looks these up, before the method is asked.
    with pytest.raises((ValueError, KeyError), match="classifier"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)


def test_tensors_of_another_shape_are_refused_by_name(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch.*lbpwht_weight"):
        PeftModel.from_pretrained(tiny_vit(intermediate_size=48), tmp_path)
