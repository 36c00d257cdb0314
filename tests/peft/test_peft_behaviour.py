"""What PEFT promises of every method: training, disabling, switching, deleting, unloading, dtypes, copies."""

import copy
import io
import pickle

import pytest
import torch
from models import (
    CASES,
    NO_GRID,
    adapter_parameters,
    disturb,
    forward,
    gradients,
    hooks_of,
    images,
    largest_difference,
    layers_of,
    outputs,
    same_state,
    state_of,
    tiny_vit,
    train,
)
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn

from lbp_peft import LBPWHTConfig, LBPWHTLayer, layout_report

pytestmark = pytest.mark.filterwarnings(NO_GRID, "ignore:Adapter .* was active")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
VIT = CASES[-1]


@every_case
def test_a_new_adapter_changes_no_output(case):
    x = case.inputs()
    expected = outputs(case.base(), x)
    assert torch.equal(outputs(case.adapted(), x), expected)
    assert torch.equal(outputs(case.adapted(modules_to_save=[case.head]), x), expected)


@every_case
@pytest.mark.parametrize("saved", [False, True])
def test_training_moves_the_adapter_and_leaves_the_base(case, saved):
    model = case.adapted(modules_to_save=[case.head] if saved else None)
    adapter = {name: p.clone() for name, p in adapter_parameters(model).items()}
    others = {name: t for name, t in state_of(model).items() if name not in adapter}
    losses = train(model, case.inputs())
    assert losses[-1] < losses[0]
    for name, parameter in adapter_parameters(model).items():
        unseen = name.split(".")[-3] in ("key", "k_proj") and "bias" in name  # softmax does not see the bias of keys
        assert unseen or not torch.equal(parameter, adapter[name]), name
    after = state_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in others.items())


@every_case
def test_only_the_adapter_is_trainable(case):
    model = case.adapted(modules_to_save=[case.head])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapter_parameters(model).keys()
    layers = layers_of(model)
    assert layers and all("lbpwht_weight.default" in dict(layer.named_parameters()) for layer in layers.values())
    for layer in layers.values():
        assert ("default" in layer.lbpwht_bias) == (layer.get_base_layer().bias is not None)


def test_trainable_parameters_are_counted():
    model = VIT.adapted()
    encoder = sum(p.numel() for p in tiny_vit().vit.layers.parameters())
    norms = sum(p.numel() for name, p in tiny_vit().vit.layers.named_parameters() if "norm" in name)
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == encoder - norms
    assert everything == trainable + sum(p.numel() for p in tiny_vit().parameters())


@every_case
@pytest.mark.parametrize("saved", [False, True])
def test_disabling_gives_the_base_model_and_ends(case, saved):
    x = case.inputs()
    expected = outputs(case.base(), x)
    model = case.adapted(modules_to_save=[case.head] if saved else None)
    disturb(model)
    adapted = outputs(model, x)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), expected)
    assert torch.equal(outputs(model, x), adapted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(outputs(model, x), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(outputs(model, x), adapted)


@every_case
def test_disabling_leaves_the_trainable_parameters_as_they_were(case):
    model = case.adapted(modules_to_save=[case.head])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@every_case
def test_unloading_gives_the_base_model_back(case):
    x, plain = case.inputs(), case.base()
    model = case.adapted()
    disturb(model)
    unloaded = model.unload()
    assert type(unloaded) is type(plain)
    assert same_state(state_of(unloaded), state_of(plain))
    assert torch.equal(outputs(unloaded, x), outputs(plain, x))
    assert not layers_of(unloaded) and not hooks_of(unloaded) and not hasattr(unloaded, "peft_config")


def test_unloading_keeps_the_trained_head():
    """As in PEFT, modules_to_save keep the weights of the active adapter."""
    model = VIT.adapted(modules_to_save=["classifier"])
    disturb(model)
    head = state_of(model.base_model.model.classifier.modules_to_save["default"])
    assert same_state(state_of(model.unload().classifier), head)


@every_case
def test_each_adapter_alone_is_as_if_it_were_the_only_one(case):
    x = case.inputs()
    expected = {}
    for seed, name in ((5, "default"), (6, "second")):
        alone = case.adapted(modules_to_save=[case.head])
        disturb(alone, seed=seed)
        expected[name] = outputs(alone, x)
    model = case.adapted(modules_to_save=[case.head])
    model.add_adapter("second", case.config(modules_to_save=[case.head]))
    assert model.active_adapters == ["default"]
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    assert torch.equal(outputs(model, x), expected["default"])
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        assert torch.equal(outputs(model, x), expected[name])


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "fc1"], r".*layers\.1\.mlp\.fc[12]"])
def test_a_second_adapter_is_added_whichever_way_targets_are_named(targets):
    model = VIT.adapted()
    expected = set(layers_of(get_peft_model(tiny_vit(), LBPWHTConfig(target_modules=targets))))
    model.add_adapter("second", LBPWHTConfig(r=6, target_modules=targets))
    assert {n for n, layer in layers_of(model).items() if "second" in layer.lbpwht_weight} == expected


def test_adapters_may_target_different_layers():
    x = VIT.inputs()
    model = VIT.adapted(target_modules=["fc1"])
    model.add_adapter("second", VIT.config(target_modules=["fc1", "q_proj"]))
    disturb(model)
    alone = VIT.adapted(target_modules=["fc1"])
    disturb(alone)
    assert torch.equal(outputs(model, x), outputs(alone, x))
    # The layers that only the inactive adapter has are plain, and nothing of it is trained.
    found = gradients(model.train(), x)
    assert largest_difference(found, gradients(alone.train(), x)) == 0
    model.set_adapter("second")
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    assert {name.split(".")[-3] for name in gradients(model, x)} == {"fc1", "q_proj"}


def test_switching_moves_what_is_trainable():
    model = VIT.adapted(modules_to_save=["classifier"])
    model.add_adapter("second", VIT.config(modules_to_save=["classifier"]))
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == adapter_parameters(model, name).keys()
    model.set_adapter("second", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapter_parameters(model, "default").keys()


def test_a_second_adapter_leaves_the_training_of_the_first_alone():
    model = VIT.adapted()
    model.add_adapter("second", VIT.config())
    second = {name: p.clone() for name, p in adapter_parameters(model, "second").items()}
    train(model, VIT.inputs())
    assert all(torch.equal(p, second[name]) for name, p in adapter_parameters(model, "second").items())


def two_active(case):
    model = case.adapted()
    model.add_adapter("second", case.config())
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    model.base_model.set_adapter(["default", "second"])
    return model


@every_case
def test_adapters_active_together_add_their_changes(case):
    x, model = case.inputs(), two_active(case)
    expected = case.base().double()
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            target = expected.get_submodule(name.removeprefix("base_model.model."))
            for adapter in ("default", "second"):
                base = layer.get_base_layer()
                target.weight += layer.lbpwht_weight[adapter].double() - base.weight.double()
                if base.bias is not None:
                    target.bias += layer.lbpwht_bias[adapter].double() - base.bias.double()
    torch.testing.assert_close(outputs(model, x).double(), outputs(expected, x.double()), rtol=1e-4, atol=1e-5)


def test_adapters_active_together_are_trained_together():
    model = two_active(VIT)
    found = gradients(model.train(), VIT.inputs())
    firsts = {name: g for name, g in found.items() if name.endswith("default")}
    assert firsts and all(torch.equal(found[n.replace("default", "second")], g) for n, g in firsts.items())
    assert not layout_report(model).exact


def test_adapters_with_different_ranks_active_together_are_exact_and_say_so():
    model = VIT.adapted()
    model.add_adapter("second", VIT.config(r=6))
    model.base_model.set_adapter(["default", "second"])
    with pytest.warns(UserWarning, match="default, second ask for different ranks") as caught:
        found = gradients(model.train(), VIT.inputs())
    assert sum("exact backpropagation" in str(w.message) for w in caught) == 1
    assert layout_report(model).exact.keys() == layout_report(model).layers.keys()
    assert len(found) == 2 * 24


@every_case
def test_deleting_an_adapter(case):
    x = case.inputs()
    model = case.adapted(modules_to_save=[case.head])
    model.add_adapter("second", case.config(modules_to_save=[case.head]))
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    before = outputs(model, x)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and not adapter_parameters(model, "second")
    assert all("second" not in layer.lbpwht_rule for layer in layers_of(model).values())
    assert torch.equal(outputs(model, x), before)


def test_deleting_the_active_adapter_activates_another():
    x = VIT.inputs()
    model = VIT.adapted()
    model.add_adapter("second", VIT.config())
    disturb(model, "second", seed=6)
    model.set_adapter("second")
    expected = outputs(model, x)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Adapter default was active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(outputs(model, x), expected)
    losses = train(model, x)
    assert losses[-1] < losses[0]


@every_case
def test_deleting_the_only_adapter_leaves_the_base(case):
    x = case.inputs()
    model = case.adapted(modules_to_save=[case.head])
    disturb(model)
    model.delete_adapter("default")
    assert not model.peft_config and not adapter_parameters(model)
    # PEFT's wrapper itself needs an adapter, but the model inside it still runs.
    inner = model.base_model
    assert torch.equal(outputs(inner, x), outputs(case.base(), x))
    # (Which kernel PyTorch takes may depend on whether the weights are trained.)
    assert torch.equal(forward(inner.train(), x), forward(case.base().requires_grad_(False).train(), x))


def test_deleting_an_unknown_adapter_is_an_error():
    with pytest.raises(ValueError, match="nope does not exist"):
        VIT.adapted().delete_adapter("nope")


def test_activating_an_unknown_adapter_is_an_error():
    with pytest.raises(ValueError, match="nope not found"):
        VIT.adapted().set_adapter("nope")


@pytest.mark.parametrize("compress", [None, "all"])  # which patches modules that are not adapted
@pytest.mark.parametrize("train_base_weight", [True, False])
def test_status_is_reported(train_base_weight, compress):
    settings = {"train_base_weight": train_base_weight, "compress_activations": compress}
    model = VIT.adapted(**settings)
    model.add_adapter("second", VIT.config(**settings))
    status = model.get_model_status()
    assert status.peft_types["default"] == "LBPWHT" and status.adapter_model_type == "LBPWHTModel"
    assert status.num_adapter_layers == 12 and status.enabled is True
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    if train_base_weight:  # PEFT counts adapters by their weights
        assert status.available_adapters == ["default", "second"]
        assert status.requires_grad == {"default": True, "second": False}
    assert len(model.get_layer_status()) == 12
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_models_keep_float32_masters_and_their_outputs(case, dtype, upcast):
    x, plain = case.inputs().to(dtype), case.base().to(dtype)
    expected = outputs(plain, x)
    model = get_peft_model(case.base().to(dtype), case.config(), autocast_adapter_dtype=upcast)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32 if upcast else dtype}
    assert torch.equal(outputs(model, x), expected)
    losses = train(model, x)
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in adapter_parameters(model).values())
    assert losses[-1] < losses[0]
    # After training it equals the plain model with the trained weights rounded to its dtype.
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            target = plain.get_submodule(name.removeprefix("base_model.model."))
            target.weight.copy_(layer.lbpwht_weight["default"])
            if target.bias is not None:
                target.bias.copy_(layer.lbpwht_bias["default"])
    assert torch.equal(outputs(model, x), outputs(plain, x))


def test_small_updates_survive_in_float32_masters():
    """This is their purpose: an update of 1e-3 does not change a weight of 1 in bfloat16."""
    model = get_peft_model(tiny_vit().to(torch.bfloat16), VIT.config())
    layer = next(iter(layers_of(model).values()))
    before = layer.lbpwht_weight["default"].detach().clone()
    assert torch.equal(before, layer.get_base_layer().weight.float())
    train(model, images().to(torch.bfloat16), steps=1, lr=1e-6)
    after = layer.lbpwht_weight["default"]
    assert not torch.equal(after, before) and torch.equal(after.bfloat16(), before.bfloat16())


@every_case
def test_casting_the_adapted_model(case):
    model = case.adapted()
    disturb(model)
    expected = outputs(model, case.inputs())
    assert torch.allclose(outputs(model.double(), case.inputs().double()), expected.double(), atol=1e-5)
    assert outputs(model.bfloat16(), case.inputs().bfloat16()).dtype == torch.bfloat16


@every_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(case, how):
    x = case.inputs()
    model = case.adapted(modules_to_save=[case.head])
    disturb(model)
    train(model, x, steps=1)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    expected = outputs(model, x)
    assert torch.equal(outputs(copied, x), expected)
    assert largest_difference(gradients(copied.train(), x), gradients(model.train(), x)) == 0
    assert str(layout_report(copied)) == str(layout_report(model))
    # Neither the weights nor the hooks of the two have anything to do with each other.
    disturb(copied)
    hooks = hooks_of(model)
    assert not hooks_of(copied.unload())
    assert hooks_of(model) == hooks
    assert torch.equal(outputs(model, x), expected)


def test_a_copy_finds_grids_of_its_own():
    model = VIT.adapted()
    gradients(model.train(), images())
    copied = copy.deepcopy(model)
    copied(images(height=64, width=32), interpolate_pos_encoding=True)
    assert {ran.layout.grid for ran in layout_report(copied).layers.values()} == {(16, 8)}
    assert {ran.layout.grid for ran in layout_report(model).layers.values()} == {(8, 8)}
    model(images())
    assert not layout_report(model).exact


def test_repr_shows_the_method():
    text = repr(VIT.adapted())
    assert "lbpwht.LBPWHTLinear(" in text and "base_layer" in text


def test_bases_are_in_no_state_and_no_parameter():
    model = VIT.adapted()
    gradients(model.train(), VIT.inputs())
    known = {f"base_model.model.{n}" for n in tiny_vit().state_dict()}
    added = {n for n in model.state_dict() if n.replace(".base_layer", "") not in known}
    assert added == adapter_parameters(model).keys()
    assert not list(model.buffers())


def test_the_forward_pass_multiplies_once():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            outputs(model, VIT.inputs())
        return counter.get_total_flops()

    model = VIT.adapted()
    disturb(model)
    assert flops(model) == flops(tiny_vit())
    assert flops(two_active(VIT)) == flops(tiny_vit())


def test_conversion_to_lora_works_without_biases():
    base = nn.Sequential(nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 8, bias=False))
    model = get_peft_model(base, LBPWHTConfig(target_modules=["0", "2"]))
    disturb(model)
    x = torch.randn(4, 12)
    expected = outputs(model, x)
    config, state = convert_to_lora(model, rank=8)  # nearly the full rank of the first layer, that of the second
    lora = get_peft_model(model.unload(), config)
    unadapted = outputs(lora, x)
    set_peft_model_state_dict(lora, state)
    assert (outputs(lora, x) - expected).norm() < 0.3 * (unadapted - expected).norm()


def test_conversion_to_lora_is_refused_where_a_bias_was_trained():
    with pytest.raises((TypeError, ValueError)):
        convert_to_lora(VIT.adapted(), rank=4)
    assert all(not layer.supports_lora_conversion() for layer in layers_of(VIT.adapted()).values())


def test_adapters_on_several_models_do_not_meet():
    first, second = VIT.adapted(), VIT.adapted(seed=3)
    first.train(), second.train()
    first(images())
    second(images(height=64), interpolate_pos_encoding=True)
    assert {ran.layout.grid for ran in layout_report(first).layers.values()} == {(8, 8)}
    assert {ran.layout.grid for ran in layout_report(second).layers.values()} == {(16, 16)}


def test_a_model_may_be_adapted_again_after_unloading():
    model = VIT.adapted().unload()
    model = get_peft_model(model, VIT.config())
    gradients(model.train(), VIT.inputs())
    assert hooks_of(model) == hooks_of(VIT.adapted()) and not layout_report(model).exact
    assert isinstance(model.base_model.model.vit.layers[0].mlp.fc1, LBPWHTLayer)


@pytest.mark.parametrize("name", ["copy", "keys", "training", "a.b", ""])
def test_names_that_no_dictionary_of_parameters_takes_are_refused_beforehand(name):
    base = tiny_vit()
    with pytest.raises(ValueError, match=f"An adapter cannot be called '{name}'"):
        get_peft_model(base, LBPWHTConfig(), name)
    assert not layers_of(base)
