"""The configuration, the registry, and which layers are adapted."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from models import disturb, forward, gradients, images, layers_of, outputs, tiny_vit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from lbp_peft import BasisSet, ExactProduct, FixedBasis, LBPWHTConfig, layout_report
from lbp_peft.bases.separable import BOUNDARIES
from lbp_peft.bases.walsh import SELECTIONS
from lbp_peft.calibration import CALIBRATED_SELECTIONS
from lbp_peft.formats.products import AUTO, FULL, Precision
from lbp_peft.formats.registry import FORMATS
from lbp_peft.tuner.compat.registration import check_peft_version, register
from lbp_peft.tuner.validation.settings import GRAD_INPUT_BASES

ROOT = Path(__file__).resolve().parents[2]
ENCODER = {
    f"vit.layers.{i}.{name}"
    for i in (0, 1)
    for name in (*(f"attention.{n}_proj" for n in "qkvo"), "mlp.fc1", "mlp.fc2")
}


def adapted_names(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in layers_of(model)}


def test_settings_survive_json(tmp_path):
    config = LBPWHTConfig(
        r=7, grad_input_rank=5, grad_input_basis="adaptive", grad_input_energy=0.9,
        grad_input_dtype="bf16", hadamard_size=32, block_size=4, selection="lp_linf",
        boundary="reflect", train_base_weight=False, rank_pattern={"fc2": 3},
        grad_input_rank_pattern={"fc1": 2, "fc2": None}, grid_size=[4, 6], num_prefix_tokens=2, num_suffix_tokens=3,
        target_modules=["fc1", "fc2"],
        exclude_modules=["q_proj"], modules_to_save=["classifier"], layers_to_transform=[0], layers_pattern="layers",
    )  # fmt: skip
    assert config.grid_size == (4, 6) and config.target_modules == {"fc1", "fc2"}
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LBPWHTConfig
    # PEFT itself sets inference_mode on saving, and turns sets into lists.
    assert loaded.to_dict() | {"inference_mode": False} == config.to_dict()
    assert LBPWHTConfig.from_pretrained(tmp_path).to_dict() == loaded.to_dict()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["grid_size"] == [4, 6] and written["peft_type"] == "LBPWHT"


@pytest.mark.parametrize("rank, dtype, precision", [
    (None, "full", "full"),
    (None, "auto", "auto"),
    (None, "bf16", "bf16"),
    (None, "fp8", "fp8"),
    (None, "int8", "int8"),
    (6, "auto", "full"),
    (6, "full", "full"),
    (6, "int8", "int8"),
])  # fmt: skip
def test_rank_and_format_of_the_input_gradient_survive_json(tmp_path, rank, dtype, precision):
    config = LBPWHTConfig(grad_input_rank=rank, grad_input_dtype=dtype, hadamard_size=16)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["grad_input_rank"], written["grad_input_dtype"], written["hadamard_size"]) == (rank, dtype, 16)
    for one in (config, PeftConfig.from_pretrained(tmp_path)):
        assert (one.grad_input_rank, one.grad_input_dtype) == (rank, dtype)
        assert (one.input_basis(rank) and one.input_basis(rank).r) == rank
        assert one.input_precision(rank) == Precision(precision, 16)
    assert Precision("full", 16) == FULL


def test_choices_are_literal_types_of_what_is_accepted():
    types = get_type_hints(LBPWHTConfig)  # as transformers' HfArgumentParser reads them
    choices = {
        "grad_input_basis": set(GRAD_INPUT_BASES), "grad_input_dtype": {AUTO, *FORMATS},
        "selection": {*SELECTIONS, *CALIBRATED_SELECTIONS}, "boundary": set(BOUNDARIES),
    }  # fmt: skip
    types["selection"] = get_args(types["selection"])[0]  # the other one is a list of pairs
    for name, values in choices.items():
        assert get_origin(types[name]) is Literal and set(get_args(types[name])) == values
    for field in dataclasses.fields(LBPWHTConfig):
        assert field.name in types


def test_defaults_survive_json(tmp_path):
    LBPWHTConfig().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() | {"inference_mode": False} == LBPWHTConfig().to_dict()


@pytest.mark.parametrize("settings, message", [
    ({"r": 0}, "r must be an int from 1 to block_size\\*\\*2 = 64, got 0"),
    ({"r": 65}, "got 65"),
    ({"r": 17, "block_size": 4}, "= 16, got 17"),
    ({"r": True}, "got True"),
    ({"r": 2.0}, "got 2.0"),
    ({"r": "10"}, "got '10'"),
    ({"r": None}, "got None"),
    ({"block_size": 6}, "power of two.*got 6"),
    ({"block_size": 0}, "power of two.*got 0"),
    ({"block_size": -8}, "power of two"),
    ({"block_size": 8.0}, "power of two"),
    ({"block_size": True, "r": 1}, "power of two"),
    ({"selection": "lp_l2"}, "selection must be one of lp_l1, lp_linf, lhe, klt, or a list of pairs .*, got 'lp_l2'"),
    ({"selection": None}, "selection must be one of"),
    ({"boundary": "zero"}, "boundary must be one of orthogonal, reflect, got 'zero'"),
    ({"grad_input_dtype": "exact"}, "grad_input_dtype must be one of auto, full, bf16, int8, fp8, got 'exact'"),
    ({"grad_input_dtype": None}, "grad_input_dtype must be one of.*got None"),
    ({"grad_input_dtype": 10}, "grad_input_dtype must be one of.*got 10"),
    ({"grad_input_rank": 0}, "grad_input_rank must be None or an int from 1 to block_size.*64, got 0"),
    ({"grad_input_rank": 65}, "grad_input_rank must be None or an int.*got 65"),
    ({"grad_input_rank": 17, "block_size": 4}, "grad_input_rank must be.* = 16, got 17"),
    ({"grad_input_rank": False}, "grad_input_rank must be.*got False"),
    ({"grad_input_rank": "int8"}, "grad_input_rank must be.*got 'int8'"),
    ({"grad_input_rank": 10.0}, "grad_input_rank must be.*got 10.0"),
    ({"grad_input_rank": (10, "int8")}, r"grad_input_rank must be.*got \(10, 'int8'\)"),
    ({"grad_input_rank_pattern": None}, "grad_input_rank_pattern must be a dict of ranks.*got None"),
    ({"grad_input_rank_pattern": {"(": 3}}, "A key of grad_input_rank_pattern is not a valid regular expression"),
    ({"grad_input_rank_pattern": {"(a+)+": 3}}, "A key of grad_input_rank_pattern.*could take forever"),
    ({"grad_input_rank_pattern": {"fc1": 99}}, r"grad_input_rank_pattern\['fc1'\] must be None or an int.*got 99"),
    ({"grad_input_rank_pattern": {"fc1": "int8"}}, r"grad_input_rank_pattern\['fc1'\] must be.*got 'int8'"),
    ({"rank_pattern": {"fc1": None}}, r"rank_pattern\['fc1'\] must be an int.*got None"),
    ({"hadamard_size": 24}, r"hadamard_size must be a power of two \(16 to 128 are useful\), or 0, got 24"),
    ({"hadamard_size": -16}, "hadamard_size"),
    ({"hadamard_size": 16.0}, "hadamard_size"),
    ({"rank_pattern": {"fc1": 99}}, r"rank_pattern\['fc1'\].*got 99"),
    ({"grid_size": (8,)}, "grid_size must be two positive ints"),
    ({"grid_size": 8}, "grid_size"),
    ({"grid_size": (8, 0)}, "grid_size"),
    ({"grid_size": (8, 2.0)}, "grid_size"),
    ({"grid_size": "8x8"}, "grid_size"),
    ({"num_prefix_tokens": -1}, "num_prefix_tokens must be an int of at least 0, got -1"),
    ({"num_prefix_tokens": True}, "num_prefix_tokens"),
    ({"num_prefix_tokens": 1.0}, "num_prefix_tokens"),
    ({"num_suffix_tokens": -1}, "num_suffix_tokens must be an int of at least 0, got -1"),
    ({"num_suffix_tokens": "2"}, "num_suffix_tokens"),
    ({"target_modules": ".*fc1", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
    ({"target_modules": ["fc1"], "layers_pattern": "layers"}, "give layers_to_transform too"),
    ({"block_size": 256}, "power of two up to 128.*got 256"),
    ({"hadamard_size": True}, "hadamard_size must be a power of two.*got True"),
    ({"hadamard_size": None}, "hadamard_size must be a power of two.*got None"),
    ({"rank_pattern": None}, "rank_pattern must be a dict of ranks.*got None"),
    ({"rank_pattern": [3]}, r"rank_pattern must be a dict of ranks.*got \[3\]"),
    ({"rank_pattern": {5: 3}}, "A key of rank_pattern must be a regular expression, got 5"),
    ({"rank_pattern": {"": 3}}, "A key of rank_pattern must be a regular expression, got ''"),
    ({"rank_pattern": {"(": 3}}, r"A key of rank_pattern is not a valid regular expression \(missing \)"),
    ({"rank_pattern": {"fc1": "3"}}, r"rank_pattern\['fc1'\] must be an int.*got '3'"),
    ({"rank_pattern": {"fc1": True}}, r"rank_pattern\['fc1'\] must be an int.*got True"),
    ({"train_base_weight": "no"}, "train_base_weight must be True or False, got 'no'"),
    ({"train_base_weight": 1}, "train_base_weight must be True or False, got 1"),
    ({"train_base_weight": None}, "train_base_weight must be True or False, got None"),
    ({"inference_mode": "no"}, "inference_mode must be True or False, got 'no'"),
    ({"target_modules": 5}, "target_modules must be names of modules, a regular expression or None, got 5"),
    ({"target_modules": []}, "target_modules is empty. None adapts every linear layer"),
    ({"target_modules": ""}, "target_modules must be a regular expression, got ''"),
    ({"target_modules": [5]}, r"target_modules must be names.*got \[5\]"),
    ({"target_modules": [""]}, "target_modules must be names"),
    ({"target_modules": {"fc1": 3}}, "target_modules must be names"),
    ({"target_modules": "fc["}, "target_modules is not a valid regular expression"),
    ({"exclude_modules": 5}, "exclude_modules must be names of modules, a regular expression or None, got 5"),
    ({"exclude_modules": "*fc"}, "exclude_modules is not a valid regular expression"),
    ({"modules_to_save": 5}, "modules_to_save must be names of modules or None, got 5"),
    ({"modules_to_save": ""}, "modules_to_save must be names of modules"),
    ({"modules_to_save": [None]}, "modules_to_save must be names of modules"),
    ({"layers_to_transform": -1}, "layers_to_transform must be the index of a block, counted from 0.*got -1"),
    ({"layers_to_transform": [0, -1]}, r"layers_to_transform must be.*got \[0, -1\]"),
    ({"layers_to_transform": []}, "layers_to_transform must be"),
    ({"layers_to_transform": True}, "layers_to_transform must be.*got True"),
    ({"layers_to_transform": "0"}, "layers_to_transform must be.*got '0'"),
    ({"layers_to_transform": [0.0]}, "layers_to_transform must be"),
    ({"layers_to_transform": 0, "layers_pattern": 5}, "layers_pattern must be the name of a list of blocks.*got 5"),
    ({"layers_to_transform": 0, "layers_pattern": "("}, "layers_pattern is not a valid regular expression"),
    ({"stack_active": ["default"]}, "stack_active says which adapters of stack_on are active: give stack_on too"),
    ({"stack_active": 5, "stack_on": LoraConfig()}, "stack_active must be names of adapters of stack_on, got 5"),
    ({"stack_on": {}}, "stack_on must be a PEFT configuration, or several by adapter name, got {}"),
    ({"stack_on": {"peft_type": "LORA"}}, "stack_on must be a PEFT configuration, or several by adapter name"),
    ({"stack_on": {"a": {"peft_type": ""}}}, r"stack_on\['a'\] has the peft_type '', which PEFT does not know.*LORA"),
    ({"stack_on": {"a": {"peft_type": "LORRA"}}}, "peft_type 'LORRA', which PEFT does not know"),
    ({"stack_on": {"a": {}}}, "peft_type None, which PEFT does not know"),
    ({"stack_on": PeftConfig()}, "peft_type None, which PEFT does not know"),
    ({"stack_on": PeftConfig(peft_type="LORA")}, r"stack_on\['default'\] must be a LoraConfig for the peft_type LORA"),
    ({"selection": ["lp_l1"]}, "selection must be one of"),
    ({"boundary": None}, "boundary must be one of"),
    ({"compress_activations": True}, 'compress_activations must be "all", some of activation, norm, attention, proj'),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a string or None, got 5"),
    ({"peft_version": ["0.21.0"]}, r"peft_version must be a string or None, got \['0.21.0'\]"),
    ({"peft_type": "LORA"}, "The peft_type of an LBPWHTConfig is LBPWHT, got 'LORA'"),
    ({"grid_size": 14}, "grid_size must be two positive ints"),
    ({"num_prefix_tokens": True}, "num_prefix_tokens must be an int of at least 0, got True"),
])  # fmt: skip
def test_values_out_of_range_are_refused_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        LBPWHTConfig(**settings)


def test_what_means_the_same_is_accepted(tmp_path):
    config = LBPWHTConfig(
        r=np.int64(3), grad_input_rank=np.int32(3), hadamard_size=np.int64(16), block_size=np.int64(4),
        rank_pattern={"fc1": np.int64(2)}, grad_input_rank_pattern={"fc1": np.int64(2)},
        grid_size=(np.int64(4), 4), num_prefix_tokens=np.int8(1),
        train_base_weight=np.bool_(False), target_modules=("fc1", "fc2"), modules_to_save="classifier",
        layers_to_transform=range(2), layers_pattern=("layers",), stack_on=LoraConfig(target_modules=["fc1"]),
        stack_active="default", base_model_name_or_path=tmp_path,
    )  # fmt: skip
    assert config == LBPWHTConfig(
        r=3, grad_input_rank=3, hadamard_size=16, block_size=4, rank_pattern={"fc1": 2},
        grad_input_rank_pattern={"fc1": 2}, grid_size=(4, 4),
        num_prefix_tokens=1, train_base_weight=False, target_modules=["fc1", "fc2"], modules_to_save=["classifier"],
        layers_to_transform=[0, 1], layers_pattern=["layers"], stack_on={"default": config.stack_on["default"]},
        stack_active=["default"], base_model_name_or_path=str(tmp_path),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).modules_to_save == ["classifier"]


def test_a_value_changed_afterwards_is_checked_before_the_model_is():
    config, model = LBPWHTConfig(), tiny_vit()
    config.r = 0
    with pytest.raises(ValueError, match="r must be an int"):
        get_peft_model(model, config)
    assert not layers_of(model)


@pytest.mark.parametrize("r", [1, 2, 5, 63, 64])
def test_ranks_need_be_neither_triangular_nor_square(r):
    assert LBPWHTConfig(r=r, grad_input_rank=r, block_size=8).r == r


@pytest.mark.parametrize("targets, expected", [
    (None, ENCODER),
    (["fc1"], {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}),
    (["layers.0.mlp.fc1"], {"vit.layers.0.mlp.fc1"}),
    (r".*layers\.1\.attention\.[qv]_proj", {"vit.layers.1.attention.q_proj", "vit.layers.1.attention.v_proj"}),
    ("all-linear", ENCODER | {"classifier"}),
])  # fmt: skip
def test_targets(targets, expected):
    assert adapted_names(get_peft_model(tiny_vit(), LBPWHTConfig(target_modules=targets))) == expected


@pytest.mark.parametrize("settings, expected", [
    ({"exclude_modules": ["fc1", "fc2"]}, {n for n in ENCODER if "fc" not in n}),
    ({"exclude_modules": r".*layers\.0\..*"}, {n for n in ENCODER if ".0." not in n}),
    ({"target_modules": "all-linear", "exclude_modules": ["classifier"]}, ENCODER),
    ({"target_modules": ["fc1", "fc2"], "layers_to_transform": [1]},
     {"vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"}),
    ({"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"vit.layers.0.mlp.fc1"}),
])  # fmt: skip
def test_targets_are_narrowed_down(settings, expected):
    assert adapted_names(get_peft_model(tiny_vit(), LBPWHTConfig(**settings))) == expected


def test_layers_to_transform_without_targets_is_not_ignored():
    """The setting either narrows the default down or asks for target_modules."""
    try:
        names = adapted_names(get_peft_model(tiny_vit(), LBPWHTConfig(layers_to_transform=[0])))
    except ValueError as error:
        assert "target_modules" in str(error)
    else:
        assert names == {n for n in ENCODER if ".0." in n}


@pytest.mark.parametrize("settings, message", [
    ({"layers_to_transform": [1, 5]}, "layers_to_transform has 5, but the blocks with target modules are 0, 1"),
    ({"layers_to_transform": 2}, "layers_to_transform has 2, but"),
    ({"target_modules": ["fc1"], "layers_to_transform": [0, 7]}, "layers_to_transform has 7, but"),
    ({"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "blocks"}, "none for layers_pattern='blo"),
    ({"modules_to_save": "clasifier"}, "modules_to_save names 'clasifier', but ViTFor.*Did you mean 'classifier'"),
    ({"modules_to_save": ["classifier", "xyz"]}, "modules_to_save names 'xyz'.*consists of vit, classifier"),
    ({"train_base_weight": False, "stack_on": LoraConfig(target_modules=["fc1"], modules_to_save=["head"])},
     "modules_to_save names 'head'"),
])  # fmt: skip
def test_names_and_indices_of_nothing_are_refused(settings, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LBPWHTConfig(**settings))
    untouched(model, {n for n, _ in model.named_parameters()})


def test_names_that_peft_adds_for_a_task_need_not_exist(tmp_path):
    """PEFT adds "classifier" and "score" for sequence classification, and a model has one of them."""
    model = get_peft_model(tiny_vit(), LBPWHTConfig(task_type="SEQ_CLS"))
    assert model.modules_to_save == {"classifier", "score"}
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_vit(), tmp_path).modules_to_save == {"classifier", "score"}


@pytest.mark.parametrize("settings, message", [
    ({"target_modules": ["fc1", "fcc2"]}, "target_modules names fcc2, but ViTFor.*Did you mean 'fc2'"),
    ({"exclude_modules": ["fc1", "fcc2"]}, "exclude_modules names fcc2, but"),
    ({"exclude_modules": ["fcc2"], "modules_to_save": ["classifier"]}, "exclude_modules names fcc2, but"),
    ({"exclude_modules": ["fcc2"]}, "no modules were excluded"),  # PEFT's
    ({"grad_input_rank_pattern": {"fcc2": 3, "fc2": 3}}, "grad_input_rank_pattern has 'fcc2', which matches no"),
    ({"rank_pattern": {"fcc2": 3}}, "rank_pattern keys did not match.*fcc2"),  # PEFT's
])  # fmt: skip
def test_one_warning_names_what_matches_nothing_beside_what_does(settings, message):
    with pytest.warns(RuntimeWarning if "keys did not" in message else UserWarning, match=message) as caught:
        get_peft_model(tiny_vit(), LBPWHTConfig(**settings))
    assert len([w for w in caught if "fcc2" in str(w.message)]) == 1


def test_the_default_leaves_pooler_and_head_alone():
    from transformers import ViTModel

    torch.manual_seed(0)
    model = ViTModel(tiny_vit().config, add_pooling_layer=True)
    names = adapted_names(get_peft_model(model, LBPWHTConfig()))
    assert names == {name.removeprefix("vit.") for name in ENCODER}


def test_a_model_may_itself_be_a_sequence_of_blocks():
    def block():
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    model = get_peft_model(nn.Sequential(block(), block()), LBPWHTConfig(r=3))
    assert adapted_names(model) == {"0.0", "0.2", "1.0", "1.2"}


def test_modules_to_save_are_not_adapted():
    model = get_peft_model(tiny_vit(), LBPWHTConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    assert adapted_names(model) == ENCODER


def test_a_model_without_blocks_must_be_told_its_targets():
    with pytest.raises(ValueError, match=r"No blocks.*target_modules=\[...\]"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), LBPWHTConfig())


def test_targets_that_do_not_exist_are_an_error():
    model = tiny_vit()
    with pytest.raises(ValueError, match="nope"):
        get_peft_model(model, LBPWHTConfig(target_modules=["nope"]))
    assert not layers_of(model)


def test_ranks_may_differ_by_suffix_and_by_expression():
    pattern = {"fc2": 21, r".*layers\.1\.attention\.q_proj": 5, "layers.0.mlp.fc1": 6}
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, rank_pattern=pattern))
    gradients(model.train(), images())
    ranks = {name: ran.grad_weight_rows - 1 for name, ran in layout_report(model).layers.items()}
    assert {name for name, r in ranks.items() if r == 21} == {"vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"}
    assert {name for name, r in ranks.items() if r == 5} == {"vit.layers.1.attention.q_proj"}
    assert {name for name, r in ranks.items() if r == 6} == {"vit.layers.0.mlp.fc1"}
    assert {name for name, r in ranks.items() if r == 3} == ENCODER - {n for n, r in ranks.items() if r != 3}


def test_a_rank_pattern_leaves_the_input_gradient_alone():
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_rank=6, rank_pattern={"fc2": 21}))
    gradients(model.train(), images())
    ran = layout_report(model).layers["vit.layers.1.mlp.fc2"]
    assert (ran.grad_weight_rows, ran.grad_input_rows) == (22, 7)


def test_ranks_of_the_input_gradient_may_differ_by_suffix_and_by_expression():
    """Layers without a rank take the format that "auto" chooses, the others full precision."""
    pattern = {"fc2": 21, r".*layers\.0\..*": None}
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_rank=6, grad_input_rank_pattern=pattern))
    rules = {name.removeprefix("base_model.model."): m.lbpwht_rule["default"] for name, m in layers_of(model).items()}
    for name, rule in rules.items():
        rank = 21 if name.endswith("fc2") else None if ".layers.0." in name else 6
        auto = ExactProduct(precision=Precision("auto"))
        assert rule.input_gradient == (auto if rank is None else FixedBasis(BasisSet(rank)))
        assert rule.weight_basis.r == 3
    gradients(model.train(), images())
    kept = {name: ran.grad_input_rows for name, ran in layout_report(model).layers.items()}
    assert kept["vit.layers.1.mlp.fc2"] == 22 and kept["vit.layers.1.mlp.fc1"] == 7
    assert kept["vit.layers.0.mlp.fc1"] == 65


# Refused targets


def untouched(model, expected_trainable):
    assert not layers_of(model) and not hasattr(model, "peft_config")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected_trainable


@pytest.mark.parametrize("targets, name, kind", [
    (["projection"], "vit.embeddings.patch_embeddings.projection", "Conv2d"),
    (["layernorm_before"], r"vit.layers.0.layernorm_before", "LayerNorm"),
    (["fc1", "attention"], "vit.layers.0.attention", "ViTAttention"),
])  # fmt: skip
def test_layers_of_other_types_are_refused_before_anything_is_changed(targets, name, kind):
    model = tiny_vit()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises((TypeError, ValueError), match=f"{name} is of type {kind}.*torch.nn.Linear"):
        get_peft_model(model, LBPWHTConfig(target_modules=targets))
    untouched(model, trainable)


class Nested(nn.Module):
    """A model like DPT with a head that has another head of the same name inside it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Module()
        self.head.head, self.head.out, self.head.act = nn.Linear(3, 3), nn.Linear(3, 2), nn.ReLU()

    def forward(self, x):
        return self.head.out(self.head.act(self.head.head(self.body(x))))


@pytest.mark.parametrize("names, remedy", [
    (["head"], r"Name the parts of head instead: \['head.head', 'head.out'\]"),
    (["ad"], r"Name the parts of head instead"),  # the ends of names, as PEFT has it
    (["body", "head", "head.out"], r"Name the parts of head instead"),
])  # fmt: skip
@pytest.mark.parametrize("beneath", [False, True])
def test_modules_to_save_inside_one_another_are_refused(names, remedy, beneath):
    model = Nested()
    settings = {"target_modules": ["body"], "modules_to_save": names}
    if beneath:
        settings = {"stack_on": LoraConfig(**settings), "train_base_weight": False}
    with pytest.raises(ValueError, match=f"matches head and, inside it, head.head,.*{remedy}"):
        get_peft_model(model, LBPWHTConfig(**settings))
    untouched(model, {n for n, _ in model.named_parameters()})


def test_modules_to_save_that_hold_one_another_by_two_names_are_refused():
    model = Nested()
    model.top = model.head
    del model.head
    config = LBPWHTConfig(target_modules=["body"], modules_to_save=["top", "out"])
    with pytest.raises(ValueError, match="matches top and, inside it, top.out,.*Leave top.out out"):
        get_peft_model(model, config)


def test_the_parts_of_a_module_are_trained_and_saved(tmp_path):
    """The message above recommends that."""
    model, x = Nested(), torch.randn(4, 3)
    base = copy.deepcopy(model)
    saved = ["head.head", "head.out"]
    model = get_peft_model(model, LBPWHTConfig(target_modules=["body"], modules_to_save=saved))
    model(x).sum().backward()
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in trained if "head" in n} == {
        f"{name}.modules_to_save.default.{part}" for name in saved for part in ("weight", "bias")
    }
    disturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


class Int8Linear(nn.Linear):
    """A stand-in for a quantized layer, with an integer weight and a product of its own."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        scaled = (self.weight.detach() * 200).round().clamp(-127, 127)
        self.weight = nn.Parameter(scaled.to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 200, self.bias)


def quantized_vit():
    model = tiny_vit()
    for layer in model.vit.layers:
        layer.mlp.fc1 = Int8Linear(32, 64)
    return model


@pytest.mark.parametrize("targets", [["fc1", "fc2"], r".*\.fc[12]", "all-linear"])
def test_quantized_layers_cannot_be_trained(targets):
    model = quantized_vit()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"fc1 is quantized \(Int8Linear\).*train_base_weight=False"):
        get_peft_model(model, LBPWHTConfig(target_modules=targets))
    untouched(model, trainable)


@pytest.mark.parametrize("targets", [["fc1", "fc2"], "all-linear"])
def test_quantized_layers_may_be_passed_through(targets):
    base = quantized_vit()
    expected = outputs(base, images())
    config = LBPWHTConfig(
        target_modules=targets, train_base_weight=False, grad_input_rank=3, modules_to_save=["layernorm_before"]
    )
    model = get_peft_model(base, config)
    assert torch.equal(forward(model.train(), images()), expected)
    gradients(model, images())
    assert not {name for name in layout_report(model).exact if "classifier" not in name}


def test_layers_that_another_method_trains_are_not_trained_too():
    model = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj is trained by another PEFT method.*lora.*train_base_weight=False"):
        get_peft_model(model, LBPWHTConfig())
    assert not layers_of(model)


# Registry


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "0.22.1", "1.0", "0.3.0"])
def test_untested_peft_versions_are_refused(version):
    with pytest.raises(ImportError, match=rf"peft >=0.21.0,<0.22, found {version}.*pip install"):
        check_peft_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.99"])
def test_tested_peft_versions_pass(version):
    check_peft_version(version)


def test_registering_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    register()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING


RELOAD = """
import importlib, lbp_peft, lbp_peft.tuner, lbp_peft.tuner.compat.registration
import lbp_peft as again
importlib.reload(lbp_peft.tuner.compat.registration)
importlib.reload(lbp_peft.tuner)
importlib.reload(lbp_peft)
lbp_peft.tuner.compat.registration.add_peft_type()
lbp_peft.tuner.compat.registration.register()
"""

OTHER = """
from aenum import extend_enum
from peft import PeftType
from peft.tuners.lora import LoraConfig, LoraModel
from peft.utils import register_peft_method
from dataclasses import dataclass

extend_enum(PeftType, "OTHER", "OTHER")

@dataclass
class OtherConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.OTHER

class OtherModel(LoraModel):
    prefix = "other_"

register_peft_method(name="other", config_cls=OtherConfig, model_cls=OtherModel)
"""

USE = """
import torch
from torch import nn
from peft import PeftType, get_peft_model
from lbp_peft import LBPWHTConfig, LBPWHTLinear
model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LBPWHTConfig(target_modules=["0"]))
model(torch.ones(2, 3)).sum().backward()
assert isinstance(model.base_model.model[0], LBPWHTLinear)
assert model.peft_config["default"].peft_type == PeftType.LBPWHT == "LBPWHT"
"""

# Importing the package loads none of these, which take more time and memory than the rest of it.
IS_LIGHT = """
import sys
assert not {"datasets", "pandas", "matplotlib"} & sys.modules.keys()
"""

USE_OTHER = """
assert get_peft_model(nn.Sequential(nn.Linear(3, 3)), OtherConfig(target_modules=["0"])).peft_type == PeftType.OTHER
"""


@pytest.mark.parametrize("script", [
    pytest.param(OTHER + RELOAD + USE + USE_OTHER, id="after another extension"),
    pytest.param("import lbp_peft\n" + IS_LIGHT + OTHER + RELOAD + USE + USE_OTHER, id="before another extension"),
])  # fmt: skip
def test_the_registry_is_shared_peacefully(script):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_another_method_of_the_same_name_is_refused(monkeypatch):
    from peft import LoraConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LBPWHT, LoraConfig)
    with pytest.raises(ImportError, match="LoraConfig.*LBPWHT.*only one"):
        register()


def test_names_are_found_beneath_a_base_model_prefix_only():
    """A head that consists of blocks is still a head."""
    model = tiny_vit()
    model.classifier = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2)])
    disturb(get_peft_model(model, LBPWHTConfig()))
    assert adapted_names(model) == ENCODER
