"""Heads that were initialised at random give one warning where nothing trains them, and none otherwise."""

import warnings

import pytest
import torch
from models import tiny_vit, vit_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, ViTForImageClassification, ViTModel

from lbp_peft import LBPWHTConfig


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Write a checkpoint without a head."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    ViTModel(vit_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write a checkpoint with a head that was trained."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_vit().save_pretrained(folder)
    return folder


def warned(build):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build()
    return [str(w.message) for w in caught if "freshly initialised" in str(w.message)]


def lora(**settings):
    return LoraConfig(target_modules=["q_proj"], **settings)


class FromTimm(nn.Module):
    """A model with a head as timm initialises it, with a bias of zero; PyTorch initialises no other bias to zero."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        nn.init.zeros_(self.head.bias)


def loaded(folder, **settings):
    return ViTForImageClassification.from_pretrained(folder, num_labels=5, **settings)


def with_another_head(folder):
    model = loaded(folder)
    model.classifier = nn.Linear(32, 7)
    return model


@pytest.mark.parametrize("build", [
    loaded, with_another_head, lambda _: ViTForImageClassification(vit_config()),
    lambda folder: loaded(folder, dtype=torch.bfloat16).float(),
], ids=["from a backbone", "head replaced", "from a configuration", "cast"])  # fmt: skip
@pytest.mark.parametrize("settings", [
    {}, {"exclude_modules": ["fc1"]}, {"train_base_weight": False, "stack_on": lora()},
], ids=["alone", "some layers", "stack"])  # fmt: skip
def test_one_warning_names_a_fresh_head_that_is_left_frozen(build, settings, backbone):
    found = warned(lambda: get_peft_model(build(backbone), LBPWHTConfig(**settings)))
    assert len(found) == 1
    assert "classifier is freshly initialised and frozen" in found[0] and "modules_to_save=['classifier']" in found[0]


def test_structure_tells_where_no_name_does():
    assert "head is freshly initialised" in warned(lambda: get_peft_model(FromTimm(), LBPWHTConfig()))[0]


def test_a_head_of_many_layers_is_named_as_one():
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, mlp_ratios=[1] * 4, decoder_hidden_size=8
    )
    build = SegformerForSemanticSegmentation
    (found,) = warned(lambda: get_peft_model(build(config), LBPWHTConfig()))
    assert "decode_head is freshly initialised" in found and "modules_to_save=['decode_head']" in found
    assert not warned(lambda: get_peft_model(build(config), LBPWHTConfig(modules_to_save=["decode_head"])))


@pytest.mark.parametrize("settings", [
    {"modules_to_save": ["classifier"]}, {"modules_to_save": "classifier"}, {"target_modules": "all-linear"},
    {"train_base_weight": False, "stack_on": lora(modules_to_save=["classifier"])}, {"inference_mode": True},
], ids=["saved", "one name", "adapted", "saved beneath", "not to be trained"])  # fmt: skip
def test_no_warning_where_the_head_is_trained_or_nothing_is(settings, backbone):
    assert not warned(lambda: get_peft_model(loaded(backbone), LBPWHTConfig(**settings)))


def test_no_warning_on_adapters_that_save_the_head(backbone):
    model = get_peft_model(loaded(backbone), lora(modules_to_save=["classifier"]))
    assert not warned(lambda: get_peft_model(model, LBPWHTConfig(train_base_weight=False)))
    first = get_peft_model(loaded(backbone), LBPWHTConfig(modules_to_save=["classifier"]))
    assert not warned(lambda: first.add_adapter("second", LBPWHTConfig()))


def weights_loaded_afterwards(backbone, trained):
    model = loaded(backbone)
    model.load_state_dict(tiny_vit().state_dict())
    return model


@pytest.mark.parametrize("build", [
    lambda backbone, trained: ViTForImageClassification.from_pretrained(trained),
    weights_loaded_afterwards,
    lambda backbone, trained: ViTModel.from_pretrained(trained, add_pooling_layer=False),
    lambda backbone, trained: ViTModel.from_pretrained(trained),  # its pooler is fresh, and mostly unused
], ids=["checkpoint", "state dict", "no head", "pooler"])  # fmt: skip
def test_no_warning_for_models_that_are_trained_or_have_no_head(build, backbone, trained):
    assert not warned(lambda: get_peft_model(build(backbone, trained), LBPWHTConfig()))


def test_no_warning_on_loading_for_inference(backbone, tmp_path):
    get_peft_model(tiny_vit(), LBPWHTConfig()).save_pretrained(tmp_path)
    assert not warned(lambda: PeftModel.from_pretrained(loaded(backbone), tmp_path))
    assert warned(lambda: PeftModel.from_pretrained(loaded(backbone), tmp_path, is_trainable=True))
