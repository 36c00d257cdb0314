"""What a PEFT user does with LoRA works with LoRA under LBP-WHT."""

import copy
import json
import pickle

import peft
import pytest
import torch
from accelerate import Accelerator
from models import (
    forward,
    gradients,
    hooks_of,
    images,
    input_gradient,
    largest_difference,
    layers_of,
    outputs,
    run_python,
    same_state,
    state_of,
    tiny_vit,
    train,
    with_transformers_own_adapters,
)
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from lbp_peft import LBPWHTConfig, layout_report
from lbp_peft.tuner.layers.linear import LBPWHTLinear
from lbp_peft.tuner.stacking.layer import LBPWHTStacked

WEIGHTS = "adapter_model.safetensors"
X = images()


def lora_config(**settings):
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["classifier"]}
    return LoraConfig(**defaults | {"init_lora_weights": False} | settings)


def lbp_config(**settings):
    return LBPWHTConfig(**{"r": 3, "train_base_weight": False} | input_gradient(3) | settings)


def on_a_peft_model(config, **settings):
    return get_peft_model(get_peft_model(tiny_vit(), config), lbp_config(**settings))


def from_one_config(config, **settings):
    return get_peft_model(tiny_vit(), lbp_config(stack_on=config, **settings))


def on_transformers_own(config, **settings):
    base = tiny_vit()
    base.add_adapter(config)
    return get_peft_model(base, lbp_config(**settings))


WAYS = [
    on_a_peft_model,
    from_one_config,
    pytest.param(on_transformers_own, marks=with_transformers_own_adapters),
]


def stacked(way=on_a_peft_model, config=None, steps=2, **settings):
    torch.manual_seed(0)
    model = way(config or lora_config(), **settings)
    if steps:
        train(model, X, steps)
    return model


def reloaded(folder, **how):
    return PeftModel.from_pretrained(tiny_vit(), folder, **how)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def is_plain(model):
    kinds = {type(m).__module__.split(".")[0] for m in model.modules()}
    hosts = [m for m in model.modules() if hasattr(type(m), "plain_class")]
    return not kinds & {"peft", "lbp_peft"} and not hosts and not hooks_of(model)


@pytest.mark.parametrize("way", WAYS)
def test_lora_is_trained_and_nothing_else(way):
    model = stacked(way, steps=0)
    lora = get_peft_model(tiny_vit(), lora_config())
    assert {n.removeprefix("base_model.model.") for n in trained_names(model)} == {
        n.removeprefix("base_model.model.") for n in trained_names(lora)
    }
    before = state_of(model)
    losses = train(model, X, steps=5)
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == trained_names(model)
    assert [name for name, why in layout_report(model).exact.items()] == ["vit.layers.0.attention.k_proj"]


@pytest.mark.parametrize("way", WAYS)
def test_lora_is_as_good_as_new_beneath(way):
    """Outputs equal those of LoRA without LBP-WHT, in training to the bit only where its branch is kept."""
    torch.manual_seed(0)
    lora = get_peft_model(tiny_vit(), lora_config())
    for settings in ({}, {"exact_forward": True}):
        model = stacked(way, steps=0, **settings)
        assert torch.equal(outputs(model, X), outputs(lora, X))
        found, expected = forward(model.train(), X), forward(lora.train(), X)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert torch.equal(found, expected) or not settings


def test_an_already_trained_lora_is_made_cheap(tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(tiny_vit(), lora_config())
    train(lora, X)
    lora.save_pretrained(tmp_path)
    loaded = reloaded(tmp_path, is_trainable=True)
    model = get_peft_model(loaded, lbp_config(modules_to_save=["classifier"]))
    assert torch.equal(outputs(model, X), outputs(lora, X))
    assert trained_names(model) == trained_names(loaded) == trained_names(lora)
    train(model, X)
    assert not torch.equal(outputs(model, X), outputs(lora, X))


def test_a_frozen_lora_stays_frozen(tmp_path):
    get_peft_model(tiny_vit(), lora_config()).save_pretrained(tmp_path)
    model = get_peft_model(reloaded(tmp_path), lbp_config())
    assert not trained_names(model)


def test_the_base_model_path_is_handed_on(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    base = type(tiny_vit()).from_pretrained(tmp_path)
    model = get_peft_model(get_peft_model(base, lora_config()), lbp_config())
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path)


# Saving and loading


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_one_from_pretrained_rebuilds_the_stack(way, trainable, low_memory, tmp_path):
    model = stacked(way)
    model.save_pretrained(tmp_path)
    loaded = reloaded(tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_memory)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert torch.equal(outputs(loaded, X), outputs(model, X))
    assert trained_names(loaded) == (trained_names(model) if trainable else set())
    if trainable:
        assert largest_difference(gradients(loaded.train(), X), gradients(model.train(), X)) == 0
        assert train(loaded, X) == train(model, X)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(outputs(reloaded(tmp_path / "again"), X), outputs(loaded, X))


def test_in_a_fresh_process(tmp_path):
    model = stacked()
    model.save_pretrained(tmp_path / "stack")
    torch.save(outputs(model, X), tmp_path / "logits.pt")
    run_python(
        """
import sys, torch
from peft import PeftModel
from models import images, outputs, tiny_vit, train
import lbp_peft
folder = sys.argv[1]
model = PeftModel.from_pretrained(tiny_vit(), folder + "/stack", is_trainable=True)
assert torch.equal(outputs(model, images()), torch.load(folder + "/logits.pt"))
losses = train(model, images())
assert losses[-1] < losses[0]
""",
        str(tmp_path),
    )


def test_stock_peft_loads_the_lora_part_where_lbp_peft_is_not_installed(tmp_path):
    model = stacked()
    model.stacked_on.save_pretrained(tmp_path / "lora")
    torch.save(outputs(model, X), tmp_path / "logits.pt")
    torch.save(tiny_vit().state_dict(), tmp_path / "base.pt")
    torch.save(vars(tiny_vit().config), tmp_path / "config.pt")
    run_python(
        """
import sys, warnings
sys.modules["lbp_peft"] = None  # importing it fails
warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
import torch
torch.set_num_threads(1)
from peft import PeftModel
from transformers import ViTConfig, ViTForImageClassification
folder = sys.argv[1]
config = ViTConfig(image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=64, num_labels=5)
base = ViTForImageClassification(config)
base.load_state_dict(torch.load(folder + "/base.pt"))
model = PeftModel.from_pretrained(base, folder + "/lora").eval()
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
assert torch.equal(model(x).logits, torch.load(folder + "/logits.pt"))
""",
        str(tmp_path),
    )


def test_the_lora_part_is_what_lora_alone_would_write(tmp_path):
    model = stacked()
    model.stacked_on.save_pretrained(tmp_path / "part")
    get_peft_model(tiny_vit(), lora_config()).save_pretrained(tmp_path / "alone")
    part, alone = (load_file(tmp_path / folder / WEIGHTS) for folder in ("part", "alone"))
    assert part.keys() == alone.keys()
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("part", "alone")]
    assert configs[0]["peft_type"] == "LORA" and configs[0]["target_modules"] == configs[1]["target_modules"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_lora_trains_are_kept(bias, tmp_path):
    """LoRA finds them under their own names, whether LBP-WHT is on top or not."""
    model = stacked(config=lora_config(bias=bias))
    model.save_pretrained(tmp_path / "stack")
    model.stacked_on.save_pretrained(tmp_path / "lora")
    for folder in ("stack", "lora"):
        assert torch.equal(outputs(reloaded(tmp_path / folder), X), outputs(model, X))


@pytest.mark.parametrize("names", [("default", "lbp"), ("first", "default"), ("first", "lbp"), ("default", "default")])
@pytest.mark.parametrize("loaded_as", ["default", "other"])
def test_any_names(names, loaded_as, tmp_path):
    beneath, on_top = names
    torch.manual_seed(0)
    model = get_peft_model(get_peft_model(tiny_vit(), lora_config(), beneath), lbp_config(), on_top)
    train(model, X)
    model.save_pretrained(tmp_path)
    folder = tmp_path if on_top == "default" else tmp_path / on_top
    assert torch.equal(outputs(reloaded(folder, adapter_name=loaded_as), X), outputs(model, X))
    if beneath != on_top:  # LoRA has a folder to itself
        assert torch.equal(
            outputs(reloaded(tmp_path if beneath == "default" else tmp_path / beneath), X), outputs(model, X)
        )


def test_several_adapters_beneath(tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(tiny_vit(), lora_config())
    lora.add_adapter("second", lora_config(r=2, modules_to_save=None, target_modules=["k_proj", "fc1"]))
    lora.base_model.set_adapter(["default", "second"])
    model = get_peft_model(lora, lbp_config())
    assert {n.split(".")[-2] for n in trained_names(model) if "lora" in n} == {"default", "second"}
    train(model, X)
    both = outputs(model, X)
    model.save_pretrained(tmp_path)
    loaded = reloaded(tmp_path, is_trainable=True)
    assert torch.equal(outputs(loaded, X), both)
    assert trained_names(loaded) == trained_names(model)
    for m in (model, loaded):
        m.set_adapter("second")
    assert torch.equal(outputs(loaded, X), outputs(model, X))
    assert not torch.equal(outputs(model, X), both)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]),
        VeraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"], modules_to_save=["classifier"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]),
        lora_config(use_dora=True),
    ],
    ids=["loha", "vera", "ia3", "oft", "dora"],
)
def test_other_methods_beneath(config, tmp_path):
    model = stacked(config=config, steps=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    train(model, X)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reloaded(tmp_path), X), outputs(model, X))
    expected = outputs(model, X)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, X), expected, atol=1e-4, rtol=1e-4)
    assert is_plain(merged)


def test_the_state_dict_makes_the_round_trip():
    model, other = stacked(), stacked(steps=0)
    tensors = get_peft_model_state_dict(model)
    assert any("lora_A" in name for name in tensors) and any("classifier" in name for name in tensors)
    set_peft_model_state_dict(other, tensors)
    assert torch.equal(outputs(other, X), outputs(model, X))


def test_a_configuration_may_be_used_again(tmp_path):
    config = lbp_config()
    for folder in ("first", "second"):
        model = get_peft_model(get_peft_model(tiny_vit(), lora_config()), config)
        model.save_pretrained(tmp_path / folder)
        assert torch.equal(outputs(reloaded(tmp_path / folder), X), outputs(model, X))
    assert config.stack_on is None


@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, tmp_path):
    model = stacked()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name.replace("q_proj", "z_proj")] = tensors[name].clone()
    if damage == "missing":
        tensors = {n: t for n, t in tensors.items() if n != name}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit the adapters beneath LBP-WHT.*1 unexpected"):
        reloaded(tmp_path)
    other = stacked(steps=0)
    before = state_of(other)
    with pytest.raises(ValueError, match="does not fit"):
        other.load_adapter(tmp_path, "default")
    assert same_state(state_of(other), before)


def test_a_stack_is_no_further_adapter_of_another_model(tmp_path):
    stacked().save_pretrained(tmp_path)
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3))
    with pytest.raises(ValueError, match="stacked on adapters of its own.*PeftModel.from_pretrained"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]


def test_the_trainer_saves_resumes_and_loads(tmp_path):
    data = [{"pixel_values": x, "labels": torch.tensor(i % 5)} for i, x in enumerate(images(16, seed=4))]

    def trainer(model, steps):
        arguments = TrainingArguments(
            tmp_path / "run", max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data)

    whole = stacked(steps=0)
    trainer(whole, 4).train()
    first, again = stacked(steps=0), stacked(steps=0)
    trainer(first, 4).train()
    trainer(again, 4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(outputs(again, X), outputs(whole, X))
    assert torch.equal(outputs(reloaded(tmp_path / "run" / "checkpoint-4"), X), outputs(whole, X))
    assert not torch.equal(outputs(whole, X), outputs(stacked(steps=0), X))


def test_accelerate_saves_and_loads_the_state(tmp_path):
    model, other = stacked(), stacked(steps=0)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    accelerator._models.clear()
    accelerator.prepare(other)
    accelerator.load_state(tmp_path)
    assert torch.equal(outputs(other, X), outputs(model, X))


# Merging, switching, taking apart


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_merging_folds_lora_into_the_base(way, safe):
    model = stacked(way)
    expected = outputs(model, X)
    merged = model.merge_and_unload(safe_merge=safe)
    assert is_plain(merged) and type(merged) is type(tiny_vit())
    torch.testing.assert_close(outputs(merged, X), expected)
    assert merged.state_dict().keys() == tiny_vit().state_dict().keys()
    assert not torch.equal(merged.vit.layers[0].mlp.fc1.weight, tiny_vit().vit.layers[0].mlp.fc1.weight)
    again = get_peft_model(merged, LBPWHTConfig(r=3))
    assert train(again, X)


@pytest.mark.parametrize("way", WAYS)
def test_unloading_gives_the_plain_base(way):
    base = stacked(way).unload()
    assert is_plain(base)
    assert torch.equal(base.vit.layers[0].mlp.fc1.weight, tiny_vit().vit.layers[0].mlp.fc1.weight)


def test_the_lora_model_may_merge_by_itself():
    model = stacked()
    expected = outputs(model, X)
    merged = model.stacked_on.merge_and_unload()
    torch.testing.assert_close(outputs(merged, X), expected)
    assert not [m for m in merged.modules() if isinstance(m, (LBPWHTLinear, LBPWHTStacked))]


def test_merging_in_place_and_back():
    model = stacked()
    expected = outputs(model, X)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, X), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, X), expected)
    train(model, X)


@pytest.mark.parametrize("way", WAYS)
def test_disabling_gives_the_plain_model(way):
    model = stacked(way)
    expected, trainable = outputs(model, X), trained_names(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, X), outputs(tiny_vit(), X))
    assert torch.equal(outputs(model, X), expected)
    assert trained_names(model) == trainable


def test_switching_and_deleting_adapters_beneath():
    model = stacked()
    first = outputs(model, X)
    model.stacked_on.add_adapter("second", lora_config(modules_to_save=None))
    assert set(model.peft_config) == {"default", "second"}
    assert torch.equal(outputs(model, X), first)
    model.set_adapter("second")
    assert {n.split(".")[-2] for n in trained_names(model) if "lora_" in n} == {"second"}
    assert not torch.equal(outputs(model, X), first)
    train(model, X)
    assert all(layer.active_adapters == ["default"] for layer in layers_of(model).values())  # LBP-WHT goes on
    assert len(layout_report(model).exact) == 1
    model.set_adapter("default")
    assert torch.equal(outputs(model, X), first)
    model.delete_adapter("second")
    assert set(model.peft_config) == {"default"} and torch.equal(outputs(model, X), first)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")


def test_each_adapter_beneath_keeps_its_head():
    model = stacked()
    first = outputs(model, X)
    model.stacked_on.add_adapter("second", lora_config())
    model.set_adapter("second")
    train(model, X)
    second = outputs(model, X)
    model.set_adapter("default")
    assert torch.equal(outputs(model, X), first)
    model.set_adapter("second")
    assert torch.equal(outputs(model, X), second)


def test_a_second_rule_on_top():
    model = stacked()
    model.add_adapter("fine", lbp_config(r=21, **input_gradient("full")))
    assert {ran.grad_weight_rows for ran in layout_report(model).layers.values()} == {4, 65}
    model.set_adapter("fine")
    train(model, X)
    assert {ran.grad_weight_rows for ran in layout_report(model).layers.values() if not ran.why_exact} == {22}
    model.delete_adapter("fine")
    train(model, X)


def test_weighted_adapters():
    model = stacked(config=lora_config(modules_to_save=None))
    model.stacked_on.add_adapter("second", lora_config(modules_to_save=None))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    mean = outputs(model, X)
    plain = get_peft_model(tiny_vit(), lora_config(modules_to_save=None))
    plain.add_adapter("second", lora_config(modules_to_save=None))
    for name in ("default", "second"):
        set_peft_model_state_dict(plain, get_peft_model_state_dict(model.stacked_on, adapter_name=name), name)
    plain.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    plain.set_adapter("mean")
    torch.testing.assert_close(outputs(plain, X), mean)
    train(model, X)


def test_weighted_adapters_beneath_need_a_method_that_has_them():
    loha = stacked(config=LoHaConfig(r=2, target_modules=["fc1"]), steps=0)
    with pytest.raises(ValueError, match="default, cannot be combined: LoHaModel has no add_weighted_adapter"):
        loha.add_weighted_adapter(["default"], [1.0], "mean")


@with_transformers_own_adapters
def test_weighted_adapters_beneath_need_a_tuner():
    with pytest.raises(ValueError, match="transformers injected them. Put them on with get_peft_model"):
        stacked(on_transformers_own, steps=0).add_weighted_adapter(["default"], [1.0], "mean")


def test_weighted_adapters_on_top():
    torch.manual_seed(0)
    lora = get_peft_model(tiny_vit(), lora_config(target_modules=["q_proj"]))
    model = get_peft_model(lora, LBPWHTConfig(r=3, exclude_modules=["q_proj"]), "lbp")
    model.add_adapter("lbp2", LBPWHTConfig(r=3, exclude_modules=["q_proj"]))
    for name in ("lbp", "lbp2"):
        model.set_adapter(name)
        train(model, X, 1)
    model.add_weighted_adapter(["lbp", "lbp2"], [0.5, 0.5], "mean")
    assert list(model.stacked_on.peft_config) == ["default"]
    copies = next(m for m in model.modules() if isinstance(m, LBPWHTLinear)).lbpwht_weight
    torch.testing.assert_close(copies["mean"], (copies["lbp"] + copies["lbp2"]) / 2)
    with pytest.raises(ValueError, match="'default' does not exist.*'default' is beneath them"):
        model.add_weighted_adapter(["lbp", "default"], [0.5, 0.5], "both")


# What the PeftModel beneath has of its own, since it is not a module of the model on top


@pytest.mark.parametrize("way", WAYS)
def test_training_and_evaluation_mode_reach_everything(way):
    model = stacked(way)
    for mode in (False, True, False):
        model.train(mode)
        assert {m.training for m in model.stacked_on.modules()} == {mode}
    nn.Sequential(model).train()  # by way of what wraps the model, as data-parallel training does
    assert {m.training for m in model.stacked_on.modules()} == {True}


def test_each_image_chooses_its_adapter():
    model = stacked()
    model.stacked_on.add_adapter("second", lora_config())
    model.eval()
    expected = []
    for name in ("default", "second"):
        model.set_adapter(name)
        expected.append(outputs(model, X))
    with model.disable_adapter():
        expected.append(outputs(model, X))
    found = model(X.repeat(3, 1, 1, 1), adapter_names=["default"] * 2 + ["second"] * 2 + ["__base__"] * 2).logits
    torch.testing.assert_close(found, torch.cat(expected))
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(X, adapter_names=["default", "second"])


@pytest.mark.parametrize("config", [None, LoHaConfig(r=2, target_modules=["fc1"])], ids=["alone", "on LoHa"])
def test_choosing_adapters_by_image_is_refused_where_it_would_be_ignored(config):
    model = stacked(config=config, steps=0) if config else get_peft_model(tiny_vit(), LBPWHTConfig(r=3))
    with pytest.raises(ValueError, match="adapter_names: only LoRA chooses an adapter for each image"):
        model.eval()(X, adapter_names=["default", "default"])


def test_disabling_is_known_beneath_with_what_it_has_to_say():
    model = stacked(config=lora_config(bias="all"))
    with pytest.warns(UserWarning, match="bias configured to be 'all' does not produce"), model.disable_adapter():
        assert model.stacked_on._adapters_disabled
    assert not model.stacked_on._adapters_disabled


def test_a_loss_that_the_method_beneath_adds_to_is_kept():
    config = peft.AdaLoraConfig(total_step=10, target_modules=["fc1"])
    model, labels = stacked(config=config, steps=0), torch.tensor([0, 1])
    added = model.base_model(X, labels=labels).loss - model.get_base_model()(X, labels=labels).loss
    tuner = model.stacked_on.base_model
    torch.testing.assert_close(added, tuner(X, labels=labels).loss - tuner.model(X, labels=labels).loss)
    assert added > 0.1


def test_merging_is_refused_where_the_method_beneath_refuses_it():
    model = stacked(steps=0)
    model.get_base_model().quantization_method = "gptq"
    with pytest.raises(ValueError, match="gptq"):
        model.merge_adapter()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(how):
    model = stacked()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = outputs(model, X)
    assert torch.equal(outputs(twin, X), expected)
    assert largest_difference(gradients(twin.train(), X), gradients(model.train(), X)) == 0
    train(twin, X)
    assert torch.equal(outputs(model, X), expected)
    assert not torch.equal(outputs(twin, X), expected)
    assert twin.stacked_on is not model.stacked_on
    torch.testing.assert_close(outputs(twin.merge_and_unload(), X), outputs(twin, X))


def test_print_shows_both():
    text = repr(stacked(steps=0))
    assert "lora.Linear(" in text and "(low_rank_backward): lbpwht.LBPWHTStacked(default)" in text
    assert "lbpwht.LBPWHTLinear(" in text


def test_lbp_beside_lora_trains_the_layers_that_lora_leaves():
    torch.manual_seed(0)
    lora = get_peft_model(tiny_vit(), lora_config(target_modules=["q_proj"]))
    model = get_peft_model(lora, LBPWHTConfig(r=3, exclude_modules=["q_proj"]))
    assert any("lbpwht_weight" in n for n in trained_names(model)) and any("lora_A" in n for n in trained_names(model))
    before = state_of(model)
    train(model, X)
    changed = {n for n, t in state_of(model).items() if not torch.equal(t, before[n])}
    assert trained_names(model) - changed <= {n for n in changed ^ trained_names(model) if "k_proj.lbpwht_bias" in n}
    assert changed <= trained_names(model)


def test_what_the_config_refuses():
    with pytest.raises(ValueError, match="configuration of another method"):
        LBPWHTConfig(stack_on=LBPWHTConfig())
    with pytest.raises(ValueError, match="configuration of another method"):
        LBPWHTConfig(stack_on=peft.PromptTuningConfig(num_virtual_tokens=2))
    for wrong in ("lora", {"default": "lora"}, ["lora"]):
        with pytest.raises(ValueError, match="stack_on must be a PEFT configuration, or several by adapter name"):
            LBPWHTConfig(stack_on=wrong)
    with pytest.raises(ValueError, match="stack_active names other"):
        LBPWHTConfig(stack_on=lora_config(), stack_active=["other"])
    base = tiny_vit()
    with pytest.raises(ValueError, match="train_base_weight=False"):
        get_peft_model(base, LBPWHTConfig(stack_on=lora_config()))
    assert is_plain(base) and torch.equal(outputs(base, X), outputs(tiny_vit(), X))
    lora = get_peft_model(tiny_vit(), lora_config())
    before = outputs(lora, X)
    with pytest.raises(ValueError, match="train_base_weight=False"):
        get_peft_model(lora, LBPWHTConfig())
    assert torch.equal(outputs(lora, X), before) and train(get_peft_model(lora, lbp_config()), X)
    with pytest.raises(ValueError, match="leave it out"):
        get_peft_model(get_peft_model(tiny_vit(), lora_config()), lbp_config(stack_on=lora_config()))


def test_what_cannot_be_stacked_on_says_what_to_do():
    with pytest.raises(TypeError, match="add_adapter"):
        get_peft_model(get_peft_model(tiny_vit(), lora_config(modules_to_save=None), mixed=True), lbp_config())
    with pytest.raises(TypeError, match="add_adapter"):
        get_peft_model(get_peft_model(tiny_vit(), LBPWHTConfig()), LBPWHTConfig())


# The other order


@pytest.mark.parametrize("train_base_weight", [True, False])
def test_lora_on_top_is_correct_and_says_which_order_is_better(train_base_weight):
    lbp = get_peft_model(tiny_vit(), LBPWHTConfig(r=64, train_base_weight=train_base_weight))
    if train_base_weight:
        train(lbp, X)
    inner = outputs(lbp, X)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"on top of LBP-WHT.*Put the other adapter on first") as caught:
        model = get_peft_model(lbp, lora_config(modules_to_save=None))
    assert sum("on top of LBP-WHT" in str(w.message) for w in caught) == 1
    x_before = outputs(model, X)
    assert not torch.equal(x_before, inner)
    train(model, X)
    expected = outputs(model, X)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, X), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, X), expected)
    merged = model.get_base_model().merge_and_unload()
    assert is_plain(merged)
    torch.testing.assert_close(outputs(merged, X), expected)


def test_lora_on_top_has_exact_gradients_at_full_rank():
    lbp = get_peft_model(tiny_vit(), LBPWHTConfig(r=64))
    train(lbp, X)
    base = copy.deepcopy(lbp).merge_and_unload()
    models = []
    for beneath in (lbp, base):
        torch.manual_seed(0)
        models.append(get_peft_model(beneath, lora_config(modules_to_save=None)).train())
    found, expected = ({n.split("vit.", 1)[1]: g for n, g in gradients(m, X).items() if "lora_" in n} for m in models)
    assert largest_difference(found, expected) < 1e-4


def test_unloading_lora_from_the_top_leaves_the_lbp_weights():
    lbp = get_peft_model(tiny_vit(), LBPWHTConfig(r=3))
    train(lbp, X)
    inner = outputs(lbp, X)
    model = get_peft_model(lbp, lora_config(modules_to_save=None))
    train(model, X)
    with model.disable_adapter():
        assert torch.equal(outputs(model, X), outputs(tiny_vit(), X))
    assert not torch.equal(outputs(model, X), inner)


def test_nothing_is_merged_into_a_sum():
    lbp = get_peft_model(tiny_vit(), LBPWHTConfig(r=3))
    lbp.add_adapter("second", LBPWHTConfig(r=3))
    lbp.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="sum of 2 LBP-WHT adapters"):
        get_peft_model(lbp, lora_config(modules_to_save=None))


# Mixed models


def mixed(order, lbp=None):
    torch.manual_seed(0)
    configs = {"lora": lora_config(modules_to_save=None), "lbp": lbp or lbp_config()}
    first, second = order
    model = get_peft_model(tiny_vit(), configs[first], first, mixed=True)
    model.add_adapter(second, configs[second])
    model.set_adapter(["lora", "lbp"])
    return model


def test_a_mixed_model_takes_lbp_as_one_more_adapter():
    model = mixed(["lora", "lbp"])
    losses = train(model, X, 5)
    assert losses[-1] < 0.9 * losses[0]
    assert len(layout_report(model).exact) == 1
    twin = stacked(config=lora_config(modules_to_save=None), steps=0)
    twin_losses = train(twin, X, 5)
    assert losses == twin_losses
    expected = outputs(model, X)
    with model.disable_adapter():
        assert torch.equal(outputs(model, X), outputs(tiny_vit(), X))
    merged = model.merge_and_unload()
    assert is_plain(merged)
    torch.testing.assert_close(outputs(merged, X), expected)


def test_switching_lbp_off_in_a_mixed_model():
    model = mixed(["lora", "lbp"]).train()
    low_rank = gradients(model, X)
    model.set_adapter("lora")
    exact = gradients(model, X)
    lora = get_peft_model(tiny_vit(), lora_config(modules_to_save=None))
    lora.load_state_dict({k.replace(".lora.", ".default."): t for k, t in model.state_dict().items()}, strict=False)
    expected = gradients(lora.train(), X)
    names = {n.rsplit("vit", 1)[1].replace(".lora.", ".default."): g for n, g in exact.items()}
    assert largest_difference(names, {n.rsplit("vit", 1)[1]: g for n, g in expected.items()}) < 1e-6
    assert largest_difference(low_rank, exact) > 1e-2
    model.delete_adapter("lbp")
    assert largest_difference(gradients(model, X), exact) == 0


@pytest.mark.parametrize("train_base_weight", [True, False])
def test_lbp_first_in_a_mixed_model(train_base_weight):
    with pytest.warns(UserWarning, match="Put the other adapter on first"):
        model = mixed(["lbp", "lora"], lbp_config(train_base_weight=train_base_weight))
    losses = train(model, X, 5)
    assert losses[-1] < losses[0]
    expected = outputs(model, X)
    merged = model.merge_and_unload()
    assert is_plain(merged)
    torch.testing.assert_close(outputs(merged, X), expected)


@with_transformers_own_adapters
def test_transformers_takes_both_of_its_own():
    torch.manual_seed(0)
    model = tiny_vit()
    model.add_adapter(lora_config(modules_to_save=None))
    model.add_adapter(lbp_config(), "lbp")
    model.set_adapter(["default", "lbp"])
    losses = train(model, X)
    assert losses[-1] < losses[0]
    assert {ran.grad_input_rows for ran in layout_report(model).layers.values()} == {4, 65}
