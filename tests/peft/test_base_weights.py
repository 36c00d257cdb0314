"""Offloading of base weights while trained copies of them are in use."""

import copy
import errno
import io
import json
import os
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import models
import pytest
import torch
from models import (
    adapter_parameters,
    disturb,
    forward,
    gradients,
    images,
    largest_difference,
    layers_of,
    outputs,
    same_state,
    state_of,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from transformers import ViTForImageClassification

from lbp_peft import LBPWHTConfig
from lbp_peft.tuner.layers import offloading, storage

WAYS = ["disk", "on a GPU", "dropped"]
KEPT = WAYS[:-1]
DROPPED = 'base_weights="dropped"'


@pytest.fixture(autouse=True)
def weights_are_large_enough(monkeypatch):
    monkeypatch.setattr(offloading, "_LEAST_BYTES", 0)
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)  # a busy disk may take long


def tiny_vit():
    return models.tiny_vit(num_hidden_layers=1)


def config(way="disk", **settings):
    way = "cpu" if way == "on a GPU" else way
    return LBPWHTConfig(**({"r": 3, "grad_input_dtype": "full", "base_weights": way} | settings))


@pytest.fixture
def adapted(monkeypatch):
    """Builds a model whose base weights are offloaded in one of several ways.

    "On a GPU" they move between a device and the CPU's memory. Here the two are the same, and everything else happens
    as it does on a GPU.
    """

    def build(way, base=None, **settings):
        if way == "on a GPU":
            monkeypatch.setattr(offloading, "_is_on_cpu", lambda weight: False)
        return get_peft_model(tiny_vit() if base is None else base, config(way, **settings))

    return build


def offloaded_layers(model):
    return {name for name, layer in layers_of(model).items() if layer.base_weight_is_offloaded}


def trained(model):
    """Train for a step, which puts the base weights away."""
    train(model, images(), 1)
    return model


def base_of(model):
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers_of(model).items()}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_wherever_the_base_weights_wait(way, adapted):
    expected, model = adapted("resident"), adapted(way)
    assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))
    assert train(model, images(), 3) == train(expected, images(), 3)
    found, plain = adapter_parameters(model), adapter_parameters(expected)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in found)
    everything = set(layers_of(model))
    assert offloaded_layers(model) == (everything)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.filterwarnings("ignore:.*uses exact backpropagation")
def test_formats_are_chosen_without_a_base_weight(dtype, adapted):
    losses = [train(adapted(way, grad_input_dtype=dtype), images(), 2) for way in ("resident", "dropped")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("way", KEPT)
def test_base_weights_stay_where_they_are_until_a_backward_pass_has_ended(way, adapted):
    model = adapted(way)
    addresses = {name: layer.get_base_layer().weight.data_ptr() for name, layer in layers_of(model).items()}
    loss = forward(model.train(), images()).square().sum()
    assert addresses == {name: layer.get_base_layer().weight.data_ptr() for name, layer in layers_of(model).items()}
    loss.backward()
    moved = {n for n, layer in layers_of(model).items() if layer.get_base_layer().weight.data_ptr() != addresses[n]}
    assert moved == offloaded_layers(model)


@pytest.mark.parametrize("way", KEPT)
def test_disabling_merging_and_unloading(way, adapted):
    x, base = images(), tiny_vit()
    model = trained(adapted(way))
    expected = outputs(model, x)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), outputs(base, x))
    trained(model)
    expected = outputs(model, x)
    model.merge_adapter()
    assert torch.equal(outputs(model, x), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), outputs(base, x))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(outputs(model, x), expected)
    trained(model)
    assert same_state(state_of(copy.deepcopy(model).unload()), state_of(base))
    expected = outputs(model, x)
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged, x), expected)
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("way", KEPT)
def test_several_adapters(way, adapted):
    x, base = images(), tiny_vit()
    results = []
    for one in (way, "resident"):
        model = trained(adapted(one))
        model.add_adapter("second", config(one))
        found = [outputs(model, x)]
        model.set_adapter("second")
        assert torch.equal(outputs(model, x), outputs(base, x))
        trained(model)
        model.base_model.set_adapter(["default", "second"])
        found.append(outputs(model, x))
        trained(model)  # of the sum of the two
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
        model.set_adapter("mean")
        found += [outputs(model, x), outputs(trained(model), x)]
        model.delete_adapter("mean")
        model.set_adapter("second")
        layer = next(iter(layers_of(model).values()))
        found += [layer.get_delta_weight("second").clone(), outputs(model, x)]
        assert all(torch.equal(v, base.get_submodule(n.removeprefix("base_model.model.")).weight)
                   for n, v in base_of(model).items())  # fmt: skip
        results.append(found)
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize("way, base", [("auto", 0), ("auto", 2**16), ("cpu", 0), ("resident", 0)])
def test_which_base_weights_are_offloaded(way, base, adapted, monkeypatch):
    """By default these are the weights that are large enough for a file; with "cpu", none in a model on the CPU."""
    monkeypatch.setattr(offloading, "_LEAST_BYTES", base)
    model = trained(adapted(way))
    assert offloaded_layers(model) == (set(layers_of(model)) if way == "auto" and base == 0 else set())
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_are_the_same(way, adapted, tmp_path):
    for one in ("resident", way):
        trained(adapted(one)).save_pretrained(tmp_path / one)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / way / name).read_bytes() == (tmp_path / "resident" / name).read_bytes() for name in names)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / way)
    assert loaded.peft_config["default"].base_weights == "auto"
    assert torch.equal(outputs(loaded, images()), outputs(trained(adapted("resident")), images()))
    again = PeftModel.from_pretrained(tiny_vit(), tmp_path / way, config=config(way))  # to train on
    assert torch.equal(outputs(again, images()), outputs(loaded, images()))


@pytest.mark.parametrize("way", WAYS)
def test_copies_and_pickles(way, adapted):
    x = images()
    model = trained(adapted(way))
    expected = outputs(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    copies.append(AveragedModel(model).module)
    for one in copies:
        assert torch.equal(outputs(one, x), expected)
        assert same_state(state_of(one), state_of(model))
        trained(one)
        assert offloaded_layers(one) == offloaded_layers(model)
        if way != "dropped":
            with one.disable_adapter():
                assert torch.equal(outputs(one, x), outputs(tiny_vit(), x))
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize("way", WAYS)
def test_conversions_bring_the_base_weights_along(way, adapted):
    x = images()
    model = trained(adapted(way)).to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    trained_model = outputs(model, x.double())
    assert torch.allclose(trained_model, outputs(trained(adapted(way)), x).double(), atol=1e-5)
    train(model, x.double(), 1)
    assert offloaded_layers(model) == offloaded_layers(trained(adapted(way)))
    if way != "dropped":
        with model.disable_adapter():
            assert torch.equal(outputs(model, x.double()), outputs(tiny_vit().double(), x.double()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_copies_in_float32_of_a_base_in_fewer_bits(way, dtype, adapted):
    x = images().to(dtype)
    results = []
    for one in ("resident", way):
        model = adapted(one, tiny_vit().to(dtype))
        assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
        train(model, x, 2, lr=1e-2)
        results.append(outputs(model, x))
        assert results[-1].dtype == dtype
        results.append(outputs(model.merge_and_unload(), x))
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize("way", WAYS)
def test_functional_calls(way, adapted):
    x, model = images(), trained(adapted(way))
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        assert torch.equal(functional_call(model, given, (x,)).logits, outputs(model, x))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_and_accumulation(way, adapted):
    expected, model = trained(adapted("resident")), adapted(way)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    train(model, images(), 1)
    assert largest_difference(gradients(model, images()), gradients(expected, images())) < 1e-6
    assert largest_difference(gradients(model, images(seed=2)), gradients(expected, images(seed=2))) < 1e-6


@pytest.mark.parametrize("way", KEPT)
def test_a_pass_without_the_adapter_in_the_same_graph(way, adapted):
    """The base weights are still needed when the first gradients of the copies have been computed."""
    found = []
    for one in ("resident", way):
        model, x = adapted(one).train(), images().requires_grad_()
        for _ in range(2):
            with model.disable_adapter():
                reference = forward(model, x)
            (forward(model, x) - 2 * reference).square().sum().backward()
        found.append({"images": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert largest_difference(found[1], found[0]) == 0
    assert len(offloaded_layers(model)) == 6


def test_compiled_models(adapted):
    expected, model = adapted("resident"), adapted("disk")
    model.compile(backend="eager")
    assert train(model, images(), 3) == pytest.approx(train(expected, images(), 3), rel=1e-5)
    assert offloaded_layers(model) == set(layers_of(model))


# Nothing is left behind


def open_files():
    return {
        line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "lbp-peft" in line
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which Linux has")
def test_files_have_no_name_and_go_with_the_weights(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    before = open_files()
    model = trained(adapted("disk"))
    new = open_files() - before
    assert len(new) == 6 and all(str(tmp_path) in name and name.endswith("(deleted)") for name in new)
    assert not list(tmp_path.iterdir())
    model.to(torch.float64)
    assert not open_files() - before


def test_writing_to_an_offloaded_weight_changes_no_file(adapted):
    """Whoever changes a weight in place expects that."""
    model = trained(adapted("disk"))
    layer = next(iter(layers_of(model).values()))
    weight = layer.get_base_layer().weight
    expected = weight.detach() + 1
    with torch.no_grad():
        weight += 1
    assert torch.equal(weight, expected)


def refusing(error):
    def refuse(*_, **__):
        raise error

    return refuse


@pytest.mark.parametrize("way", ["auto", "disk"])
@pytest.mark.parametrize("trouble", ["full", "read-only", "in memory", "nearly full", "Windows"])
def test_where_nothing_can_be_written_they_stay_in_memory_with_one_warning(way, trouble, adapted, monkeypatch):
    if trouble == "full":
        monkeypatch.setattr(storage.os, "fsync", refusing(OSError(errno.ENOSPC, "No space left on device")))
    elif trouble == "read-only":
        monkeypatch.setattr(storage.tempfile, "mkstemp", refusing(OSError(errno.EROFS, "Read-only file system")))
    elif trouble == "in memory":
        monkeypatch.setattr(storage, "_is_in_memory", lambda folder: True)
    elif trouble == "nearly full":
        monkeypatch.setattr(storage, "_FREE_SPACE_LEFT", 2**70)
    else:
        monkeypatch.setattr(storage, "_CAN_UNLINK_OPEN_FILES", False)
    model = adapted(way)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, images(), 2)
    told = [str(w.message) for w in caught if "base_weights" in str(w.message)]
    assert len(told) == 1 and "TMPDIR" in told[0] and "stays in memory" in told[0]
    assert not offloaded_layers(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))


# Models that were loaded from a file, which they are mapped from


@pytest.fixture
def loaded(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "base")
    return ViTForImageClassification.from_pretrained(tmp_path / "base").eval()


needs_mappings = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")


@needs_mappings
def test_the_checkpoint_itself_serves_as_the_file(loaded, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "copy_to_file", refusing(AssertionError("a second file")))
    model = trained(adapted("disk", loaded))
    assert offloaded_layers(model) == set(layers_of(model))
    assert {layer._file.path for layer in layers_of(model).values()} == {str(tmp_path / "base" / "model.safetensors")}
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))


@needs_mappings
def test_weights_that_were_changed_since_they_were_loaded_get_a_file_of_their_own(loaded, adapted):
    with torch.no_grad():
        for parameter in loaded.vit.layers[0].mlp.parameters():
            parameter += 0.5
    expected = outputs(loaded, images())
    model = trained(adapted("disk", loaded))
    from_file = {name for name, layer in layers_of(model).items() if layer._file is not None}
    assert len(from_file) == 4 and all("attention" in name for name in from_file)
    assert offloaded_layers(model) == set(layers_of(model))
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), expected)


@needs_mappings
def test_a_checkpoint_that_is_overwritten_is_noticed(loaded, adapted, tmp_path):
    model = trained(adapted("disk", loaded))
    expected = outputs(model, images())
    file = tmp_path / "base" / "model.safetensors"
    with file.open("r+b") as written:
        written.seek(file.stat().st_size // 2)
        written.write(b"other")
    for use in (model.disable_adapter().__enter__, model.unload):
        with pytest.raises(RuntimeError, match=r"base/model.safetensors.*overwritten.*save_pretrained"):
            use()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"base/model.safetensors.*overwritten"):
            other.unload()
    assert torch.equal(outputs(model, images()), expected)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")
    assert torch.equal(outputs(again, images()), expected)
    with pytest.raises(RuntimeError, match=r"base/model.safetensors.*overwritten"):
        model.double().unload()


@needs_mappings
@pytest.mark.parametrize("change", ["deleted", "replaced", "touched"])
def test_a_checkpoint_that_is_deleted_or_replaced_stays_mapped(change, loaded, adapted, tmp_path):
    model = trained(adapted("disk", loaded))
    file = tmp_path / "base" / "model.safetensors"
    if change == "replaced":
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(file)
    elif change == "touched":
        os.utime(file)
    else:
        file.unlink()
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))


# Dropped


def test_what_needs_a_dropped_weight_is_refused_with_the_settings_name(adapted, tmp_path):
    model = trained(adapted("dropped"))
    expected, x = outputs(model, images()), images()
    refused = {
        "disable": lambda: model.disable_adapter().__enter__(),
        "disable, by layers": model.base_model.disable_adapter_layers,
        "unload": model.unload,
        "add": lambda: model.add_adapter("second", config("resident")),
        "combine": lambda: model.add_weighted_adapter(["default"], [1.0], "second"),
        "delete": lambda: model.delete_adapter("default"),
        "difference": lambda: next(iter(layers_of(model).values())).get_delta_weight("default"),
        "none active": lambda: (model.base_model.set_adapter([]), outputs(model, x)),
    }
    for name, use in refused.items():
        with pytest.raises(ValueError, match=DROPPED):
            use()
        model.base_model.set_adapter("default")
        assert torch.equal(outputs(model, x), expected), name
        assert list(model.peft_config) == ["default"]
    model.merge_adapter()
    assert torch.equal(outputs(model, x), expected)
    with pytest.raises(ValueError, match=DROPPED):
        model.unmerge_adapter()
    assert torch.equal(outputs(model, x), expected)
    assert torch.equal(outputs(model.merge_and_unload(), x), expected)


def test_dropping_takes_no_memory_for_a_copy(adapted):
    base = tiny_vit()
    addresses = {n: m.weight.data_ptr() for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    model = adapted("dropped", base)
    found = {n.removeprefix("base_model.model."): layer.weight.data_ptr() for n, layer in layers_of(model).items()}
    assert found == {name: addresses[name] for name in found}
    assert not [name for name in model.state_dict() if name.endswith("base_layer.weight")]


def tied(base):
    base.vit.layers[0].attention.k_proj.weight = base.vit.layers[0].attention.q_proj.weight


def computed(base):
    nn.utils.parametrizations.weight_norm(base.vit.layers[0].mlp.fc1)


def replaced(base):
    layer = base.vit.layers[0].mlp.fc1
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


@pytest.mark.parametrize(
    "make, why", [(tied, "another module uses"), (computed, "computed again"), (replaced, "forward method")]
)
def test_layers_that_cannot_lose_their_weight_are_refused(make, why, adapted):
    base = tiny_vit()
    make(base)
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=rf"{DROPPED} cannot be used for vit\.layers.*{why}"):
        adapted("dropped", base)
    assert [name for name, _ in base.named_modules()] == before


def test_a_second_adapter_cannot_drop_what_the_first_needs(adapted):
    model = adapted("disk")
    with pytest.raises(ValueError, match=f"{DROPPED} cannot be used .* has an adapter already"):
        model.add_adapter("second", config("dropped"))
    assert list(model.peft_config) == ["default"]
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))


@pytest.mark.parametrize("make", [tied, computed, replaced])
@pytest.mark.filterwarnings("ignore:.*uses exact backpropagation", "ignore:Model has .*tie_word")
def test_weights_that_are_used_elsewhere_stay(make, adapted):
    results = []
    for way in ("resident", "disk"):
        base = tiny_vit()
        make(base)
        model = trained(adapted(way, base))
        results.append(outputs(model, images()))
        with model.disable_adapter():
            results.append(outputs(model, images()))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert len(offloaded_layers(model)) == {tied: 4, computed: 5, replaced: 6}[make]


# The configuration


@pytest.mark.parametrize("value", ["gpu", None, True, ["disk"]])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="base_weights must be one of auto, resident, cpu, disk, dropped"):
        LBPWHTConfig(base_weights=value)


@pytest.mark.parametrize("value", ["disk", "cpu", "dropped"])
def test_without_trained_copies_base_weights_are_in_use(value):
    with pytest.raises(ValueError, match="train_base_weight=False they are in use"):
        LBPWHTConfig(base_weights=value, train_base_weight=False)


def test_it_is_not_saved(tmp_path):
    config("disk").save_pretrained(tmp_path)
    assert "base_weights" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert LBPWHTConfig.from_pretrained(tmp_path).base_weights == "auto"


def test_small_weights_and_stacks_are_left_alone(adapted, monkeypatch):
    monkeypatch.undo()
    assert not offloaded_layers(trained(adapted("auto")))
    lora = LoraConfig(r=2, target_modules=["fc1", "fc2"])
    stacked = get_peft_model(get_peft_model(tiny_vit(), lora), LBPWHTConfig(r=3, train_base_weight=False))
    assert not any(getattr(layer, "base_weight_is_offloaded", False) for layer in layers_of(trained(stacked)).values())


@pytest.mark.parametrize("way", KEPT)
def test_lora_on_top(way, adapted):
    """LoRA is put on a layer whose base weight is offloaded, and is merged into the trained copy."""
    model = trained(adapted(way))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_top = get_peft_model(
            model.base_model.model, LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
        )
        expected = outputs(on_top, images())
        on_top.merge_adapter()
        assert torch.allclose(outputs(on_top, images()), expected, atol=1e-5)
        on_top.unmerge_adapter()
    assert torch.allclose(outputs(on_top, images()), expected, atol=1e-5)


def test_state_dicts_are_complete(adapted):
    model, expected = trained(adapted("disk")), trained(adapted("resident"))
    assert same_state(state_of(model), state_of(expected))
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(expected).keys()
    other = adapted("disk")
    disturb(other)
    trained(other).load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, images()), outputs(model, images()))


def test_a_trained_model_can_be_passed_to_another_process(adapted):
    model = trained(adapted("disk"))
    assert offloaded_layers(model)
    ForkingPickler.dumps(model)
