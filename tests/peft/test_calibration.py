"""Selections that are calibrated or given by hand, in adapted models."""

import copy
import random

import numpy as np
import pytest
import torch
import yaml
from models import (
    CASES,
    NO_GRID,
    disturb,
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
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lbp_peft
from lbp_peft import LBPWHTConfig, ListedBasis, NotCalibratedError, calibrate, exact_backward

WEIGHTS = "adapter_model.safetensors"
SETTINGS = {"r": 5, "grad_input_dtype": "full"}  # "auto" would leave layers so narrow exact


def batches(count=2, size=32):
    return [{"pixel_values": images(4, size, seed=seed), "labels": torch.arange(4)} for seed in range(count)]


def adapted(selection, base=None, **settings):
    return get_peft_model(base or tiny_vit(), LBPWHTConfig(**(SETTINGS | {"selection": selection} | settings)))


def calibrated(selection, **settings):
    model = adapted(selection, **settings)
    calibrate(model, batches())
    return model


def bases_of(model, adapter="default"):
    return {name: layer.lbpwht_rule[adapter].weight_basis for name, layer in layers_of(model).items()}


def stack(selection, base=None):
    lora = get_peft_model(base or tiny_vit(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"]))
    return get_peft_model(lora, LBPWHTConfig(**SETTINGS, selection=selection, train_base_weight=False))


# Lists of pairs


def test_pairs_are_the_bases_of_both_gradients_in_their_order():
    pairs = [(0, 0), (0, 3), (2, 1), (1, 0)]
    model = adapted(pairs, r=3, grad_input_rank=2, rank_pattern={"fc1": 64})
    rules = {name: layer.lbpwht_rule["default"] for name, layer in layers_of(model).items()}
    for name, rule in rules.items():
        assert rule.weight_basis == ListedBasis(pairs if name.endswith("fc1") else pairs[:3])
        assert rule.input_gradient.basis == ListedBasis(pairs[:2])


def test_pairs_in_the_order_of_lp_l1_give_its_gradients():
    pairs = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]
    found, expected = (gradients(adapted(one).train(), images()) for one in (pairs, "lp_l1"))
    assert largest_difference(found, expected) < 1e-6


def test_a_pattern_sets_selections_by_layer(tmp_path):
    pattern = {"fc1": [(0, 0), (1, 1)], r".*\.1\..*fc2": "lp_linf"}
    adapted("lp_l1", selection_pattern=pattern).save_pretrained(tmp_path)
    for name, basis in bases_of(PeftModel.from_pretrained(tiny_vit(), tmp_path)).items():
        if name.endswith("fc1"):
            assert basis == ListedBasis([(0, 0), (1, 1)])
        else:
            assert basis.selection == ("lp_linf" if ".1." in name and name.endswith("fc2") else "lp_l1")
    with pytest.warns(UserWarning, match="selection_pattern has 'nope', which matches no module"):
        adapted("lp_l1", selection_pattern={"nope": "lp_linf"})


@pytest.mark.parametrize("value", [
    "lp_l2", [], [(0, 8)], [(0, 0), (0, 0)], [(0,)], [(0, "1")], [(0, True)], [0, 1], {"fc1": "lhe"}, None, [(-1, 0)],
    [(8, 0)],
])  # fmt: skip
def test_other_selections_are_refused(value):
    if value == [(0, 8)]:  # the ninth function along a sequence
        LBPWHTConfig(selection=value)
        value = [(1, 8)]
    with pytest.raises(ValueError, match="selection"):
        LBPWHTConfig(selection=value)
    with pytest.raises(ValueError, match=r"selection_pattern\['fc1'\]"):
        LBPWHTConfig(selection_pattern={"fc1": value})


# Before calibration


@pytest.mark.parametrize("selection", ["lhe", "klt"])
def test_training_without_calibration_is_an_error_that_names_the_call(selection):
    model = adapted(selection, modules_to_save=["classifier"])
    x = images()
    assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
    with pytest.raises(NotCalibratedError, match=r"lbp_peft\.calibrate\(model, batches\)"):
        train(model, x, 1)
    with exact_backward(model):
        train(model, x, 1)
    merged = model.merge_and_unload()
    assert isinstance(merged.vit.layers[0].mlp.fc1, nn.Linear)


def test_calibrating_fixed_bases_is_refused():
    with pytest.raises(ValueError, match='set selection="lhe" or "klt"'):
        calibrate(adapted("lp_l1"), batches())
    with pytest.raises(ValueError, match="no LBP-WHT layers"):
        calibrate(tiny_vit(), batches())
    with pytest.raises(ValueError, match="no batches"):
        calibrate(adapted("lhe"), [])


# Calibration


@pytest.mark.parametrize("selection", ["lhe", "klt"])
def test_full_rank_is_exact(selection):
    model = calibrated(selection, r=64).train()
    found = gradients(model, images())
    with exact_backward(model):
        assert largest_difference(found, gradients(model, images())) < 1e-5


@pytest.mark.parametrize("selection", ["lhe", "klt"])
def test_calibrated_gradients_are_nearer_to_the_exact_ones(selection):
    """The loss weighs the patches by a pattern that does not suit Walsh functions of low sequency."""
    generator = torch.Generator().manual_seed(3)
    pattern = torch.randn(65, 1, generator=generator) * torch.randn(32, generator=generator)

    def loss(model, batch):
        hidden = model(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
        return (hidden * pattern).sum()

    seen, others = batches(2)
    model = adapted(selection)
    calibrate(model, [seen], loss)
    found, plain = (lbp_peft.gradient_quality(each, others, loss).cosine for each in (model, adapted("lp_l1")))
    assert found > plain + 0.02


def test_layers_with_the_same_input_share_a_basis():
    report = calibrate(model := adapted("klt"), batches())
    assert len(report.bases) == 12 and not report.left_out and report.num_batches == 2
    # Query, key and value, the attention's output, fc1, fc2. Behind the last attention the patches have no gradient.
    assert len({id(basis) for basis in report.bases.values()}) == 2 * 4
    of = {name.removeprefix("base_model.model.vit.layers."): basis for name, basis in bases_of(model).items()}
    assert of["0.attention.q_proj"] is of["0.attention.k_proj"] is of["0.attention.v_proj"]
    assert "12 layers calibrated by 2 batches" in str(report) and "number of bases: 6" in str(report)


def test_the_model_is_left_as_it_was():
    model = adapted("klt", modules_to_save=["classifier"], base=tiny_vit(hidden_dropout_prob=0.1))
    model.eval()
    model.base_model.model.vit.layers[0].train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    modes, hooks, state = [m.training for m in model.modules()], hooks_of(model), state_of(model)
    random_states = random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    calibrate(model, batches())
    assert random_states == (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert modes == [m.training for m in model.modules()] and hooks == hooks_of(model)
    assert same_state(state_of(model), state)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_calibrating_again_chooses_anew():
    model = calibrated("klt")
    before = bases_of(model)
    calibrate(model, batches())
    assert bases_of(model) == before
    calibrate(model, [{"pixel_values": images(4, seed=9), "labels": torch.arange(4)}])
    assert bases_of(model) != before
    train(model, images(), 1)


def test_batches_may_be_anything_that_loss_fn_takes():
    model = adapted("lhe")
    given = [(b["pixel_values"], b["labels"]) for b in batches()]
    calibrate(model, iter(given), lambda m, b: nn.functional.cross_entropy(m(b[0]).logits, b[1]))
    assert bases_of(model) == bases_of(calibrated("lhe"))
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, given, lambda m, b: m(b[0]).logits.sum() * float("nan"))


def test_another_grid_is_exact_with_one_warning_unless_it_was_calibrated_too():
    base = tiny_vit(image_size=24)  # 6 x 6

    def forward(model, size):
        model.train()
        model(pixel_values=images(2, size), interpolate_pos_encoding=True).logits.sum().backward()
        return lbp_peft.layout_report(model)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(interpolate_pos_encoding=True, **batch[0]).logits, batch[1])

    given = [({"pixel_values": b["pixel_values"]}, b["labels"]) for b in batches(1, 32)]
    model = adapted("klt", base)
    calibrate(model, given, loss)
    assert not forward(model, 32).exact
    with pytest.warns(UserWarning, match=r"calibrated for grids of 8 x 8.* 6 x 6.*lbp_peft\.calibrate") as caught:
        assert len(forward(model, 24).exact) == 12
    assert len(caught) == 1
    calibrate(model, [*given, *(({"pixel_values": images(4, 24)}, b["labels"]) for b in batches(1))], loss)
    assert not forward(model, 24).exact
    lhe = adapted("lhe", tiny_vit(image_size=24))
    calibrate(lhe, given, loss)
    assert not forward(lhe, 24).exact  # its functions exist on every grid


@pytest.mark.filterwarnings(NO_GRID)
def test_layers_that_cannot_be_calibrated_are_left_out_and_exact(tmp_path):
    """One layer of the first model has no token axis; the layers of the second one have no grid."""
    mixer, attention = (next(case for case in CASES if case.name == name) for name in ("mixer", "attention"))
    model = mixer.adapted(selection="klt", grad_input_dtype="full")
    report = calibrate(model, [mixer.inputs()], lambda m, x: m(x).square().sum())
    assert list(report.left_out) == ["pooled"] and "1 not calibrated: its input has no token axis" in str(report)
    model.save_pretrained(tmp_path)
    for one in (model, PeftModel.from_pretrained(mixer.base(), tmp_path, is_trainable=True)):
        train(one, mixer.inputs(), 1)
        assert list(lbp_peft.layout_report(one).exact) == ["pooled"]
    with pytest.raises(ValueError, match="None of the layers can be calibrated"):
        calibrate(attention.adapted(selection="klt"), [attention.inputs()], lambda m, x: m(x).square().sum())


def test_query_key_and_value_still_save_one_projection():
    def saved(model):
        seen = {}

        def pack(tensor):
            seen[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(**batches(1)[0])
        return sum(1 for tensor in seen.values() if tensor.shape == (4, 6, 32))

    assert saved(calibrated("klt")) == saved(adapted("lp_l1")) > 0


def test_checkpointed_layers_are_calibrated_alike():
    model = adapted("klt", modules_to_save=["classifier"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calibrate(model, batches())
    for name, basis in bases_of(calibrated("klt")).items():
        found, expected = (one.state()["grid_8x8"].double() for one in (bases_of(model)[name], basis))
        assert torch.allclose(found.t() @ found, expected.t() @ expected, atol=1e-3)


# What a PEFT user does


@pytest.mark.parametrize("selection", ["lhe", "klt"])
def test_saved_bases_come_back_to_the_bit(selection, tmp_path):
    model = calibrated(selection, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    assert sum(".lbpwht_basis." in key for key in load_file(tmp_path / WEIGHTS)) == 12
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    assert bases_of(loaded) == bases_of(model)
    by_hand = adapted(selection, modules_to_save=["classifier"])
    set_peft_model_state_dict(by_hand, get_peft_model_state_dict(model))
    by_hand.load_adapter(tmp_path, "second")
    assert bases_of(by_hand) == bases_of(by_hand, "second") == bases_of(model)
    copied = copy.deepcopy(loaded)
    losses = [train(each, images(), 2) for each in (model, loaded, by_hand, copied)]
    assert losses[1:] == [losses[0]] * 3
    assert len({id(basis) for basis in bases_of(loaded).values()}) == len(set(bases_of(loaded).values()))


@pytest.mark.parametrize("selection", ["lhe", "klt"])
def test_a_stack_on_lora_is_calibrated_saved_and_loaded(selection, tmp_path):
    model = stack(selection)
    with pytest.raises(NotCalibratedError):
        train(model, images(), 1)
    report = calibrate(model, batches())
    adapted_by_lora = [name for name in report.bases if name.endswith(("q_proj", "v_proj", "fc1"))]
    assert len(adapted_by_lora) == len(report.bases) == 6
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    assert {n: b for n, b in bases_of(loaded).items() if b.state()} == {
        n: b for n, b in bases_of(model).items() if b.state()
    }
    assert train(model, images(), 2) == train(loaded, images(), 2)


def test_an_adapter_saved_before_calibration_loads_and_asks_for_it(tmp_path):
    adapted("klt").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    with pytest.raises(NotCalibratedError):
        train(loaded, images(), 1)


def test_merging_disabling_and_averaging_know_calibrated_adapters():
    model = calibrated("klt", modules_to_save=["classifier"])
    train(model, images(), 1)
    expected = outputs(model, images())
    with model.disable_adapter():
        assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))
    model.add_weighted_adapter(["default"], [1.0], "mean")
    assert bases_of(model, "mean") == bases_of(model)
    assert torch.allclose(outputs(model.merge_and_unload(), images()), expected, atol=1e-6)


def test_a_cast_of_the_model_leaves_the_bases_as_they_are():
    model = calibrated("klt")
    before = bases_of(model)
    model.to(torch.bfloat16).float()
    assert bases_of(copy.deepcopy(model)) == before


# Checkpoints that somebody else wrote


@pytest.mark.parametrize("selection, spoil, why", [
    ("klt", lambda t: {"grid_8x8": t * 2}, "orthonormal"),
    ("klt", lambda t: {"grid_8x8": t * float("nan")}, "orthonormal"),
    ("klt", lambda t: {"grid_8x8": t[:3]}, "has 3 rows instead of 5"),
    ("klt", lambda t: {"grid_8x8": t.half()}, "float32"),
    ("klt", lambda t: {"grid_99999x99999": t}, "has the shape"),
    ("klt", lambda t: {"grid_8x8x8": t}, "names no grid"),
    ("klt", lambda t: {"grid_0x0": t[:, :0]}, "names no grid"),
    ("klt", lambda t: {"grid_1x5000": torch.zeros(5, 5000)}, "more than 4096 tokens"),
    ("klt", lambda t: {f"grid_1x{n}": torch.eye(n)[:5] for n in range(5, 30)}, "25 grid sizes"),
    ("klt", lambda t: {"pairs": t}, "names no grid"),
    ("lhe", lambda t: {"pairs": t + 99}, "There is no pair"),
    ("lhe", lambda t: {"pairs": t[[0, 0]]}, "listed twice"),
    ("lhe", lambda t: {"pairs": t.float()}, "must be int64"),
    ("lhe", lambda t: {"pairs": torch.zeros(9, 2, dtype=torch.int64)}, "must be int64 of shape"),
    ("lhe", lambda t: {"pairs": t[:0]}, "must be int64 of shape"),
    ("lhe", lambda t: {"grid_8x8": t}, "not pairs"),
])  # fmt: skip
def test_bases_that_do_not_fit_are_refused_and_the_model_is_left_alone(selection, spoil, why, tmp_path):
    calibrated(selection).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if ".lbpwht_basis." in key)
    stem, tensor = key.rpartition(".")[0], tensors.pop(key)
    spoilt = {f"{stem}.{name}": one.contiguous() for name, one in spoil(tensor).items()}
    save_file(tensors | spoilt, tmp_path / WEIGHTS, {"format": "pt"})
    base = tiny_vit()
    with pytest.raises(ValueError, match=f"The basis of .* does not fit adapter 'default': .*{why}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers_of(base) and same_state(state_of(base), state_of(tiny_vit()))
    model = calibrated(selection)
    disturb(model)
    before = bases_of(model)
    with pytest.raises(ValueError, match=why):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert bases_of(model) == before


def test_bases_for_layers_that_have_none_are_refused(tmp_path):
    adapted("lp_l1").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(iter(tensors)).rpartition(".")[0] + ".lbpwht_basis.grid_8x8"
    save_file(tensors | {key: torch.eye(64)[:5].contiguous()}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)


# Ranks by a budget


def test_ranks_by_memory_are_no_worse_than_equal_ones_and_can_be_edited():
    model = adapted("lp_l1")
    ranks = lbp_peft.allocate_ranks(model, batches(), memory="1x")
    assert ranks.memory <= ranks.uniform_memory * (1 + 1e-6)
    assert ranks.cosine >= ranks.uniform_cosine
    assert len(ranks.rank_pattern) == 12 and len(set(ranks.rank_pattern.values())) > 1
    assert not ranks.grad_input_rank_pattern
    of = {name.removeprefix("vit.layers."): r for name, r in ranks.rank_pattern.items()}
    assert of["0.attention.q_proj"] == of["0.attention.k_proj"] == of["0.attention.v_proj"]
    read = yaml.safe_load(str(ranks))
    again = adapted("lp_l1", **read)
    rules = {layer.layer_name: layer.lbpwht_rule["default"] for layer in layers_of(again).values()}
    assert {name: rule.weight_basis.r for name, rule in rules.items()} == ranks.rank_pattern


def test_the_measured_cosine_is_that_of_the_gradient():
    model = adapted("lp_l1", r=3)
    given = batches(1)
    ranks = lbp_peft.allocate_ranks(model, given, memory="1x")
    chosen = adapted("lp_l1", r=3, rank_pattern=ranks.rank_pattern)
    quality = lbp_peft.gradient_quality(chosen, given[0]).tensors
    for name, cosine in ranks.cosines.items():
        assert quality[f"base_model.model.{name}.lbpwht_weight.default"].cosine == pytest.approx(cosine, abs=1e-3)


def test_ranks_by_multiply_adds_concern_both_gradients():
    model = adapted("lp_l1", r=6, grad_input_rank=6)
    ranks = lbp_peft.allocate_ranks(model, batches(1), multiply_adds="0.9x")
    assert ranks.multiply_adds <= 0.9 * ranks.uniform_multiply_adds * (1 + 1e-6)
    # Before the first block nothing is trained, so its query, key and value need no input gradient.
    assert len(ranks.rank_pattern) == 12 and len(ranks.grad_input_rank_pattern) == 9
    both = {"rank_pattern": ranks.rank_pattern, "grad_input_rank_pattern": ranks.grad_input_rank_pattern}
    train(adapted("lp_l1", grad_input_rank=6, **both), images(), 1)


def test_ranks_of_calibrated_bases_and_of_a_stack():
    ranks = lbp_peft.allocate_ranks(adapted("klt"), batches(1), memory="1x")
    model = adapted("klt", rank_pattern=ranks.rank_pattern)
    calibrate(model, batches(1))
    for layer in layers_of(model).values():
        assert (
            len(layer.lbpwht_rule["default"].weight_basis.state()["grid_8x8"]) == ranks.rank_pattern[layer.layer_name]
        )
    stacked = lbp_peft.allocate_ranks(stack("lp_l1"), batches(1), memory="1x")
    assert len(stacked.rank_pattern) == 6


def test_budgets_that_make_no_sense_are_refused():
    model = adapted("lp_l1")
    with pytest.raises(ValueError, match="Give a budget"):
        lbp_peft.allocate_ranks(model, batches(1))
    with pytest.raises(ValueError, match="not an iterator"):
        lbp_peft.allocate_ranks(model, iter(batches(1)), memory="1x")
    with pytest.raises(ValueError, match="which the lowest ranks take"):
        lbp_peft.allocate_ranks(model, batches(1), memory=100)
    with pytest.raises(ValueError, match="must be a size"):
        lbp_peft.allocate_ranks(model, batches(1), memory="a lot")
