"""The default configuration on vision-language and encoder-decoder models, see `tests/support/vlm_architectures.py`."""

import re

import pytest
import torch
from checks import (
    R,
    Record,
    adapted,
    check_gradients_at_full_rank,
    check_layouts,
    check_low_rank_gradients,
    check_outputs,
    report_of,
)
from models import layers_of
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, FuyuForCausalLM, Qwen2AudioForConditionalGeneration
from vlm_architectures import ARCHITECTURES, TOWERS

from lbp_peft import LBPWHTConfig, verify_layout
from lbp_peft.encoder import encoder_linears

PREFIX = "base_model.model."


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_the_vision_tower_alone_is_adapted_and_its_tokens_are_found(architecture, monkeypatch):
    if why := architecture.why_not_here():
        pytest.skip(why)
    base, batch = architecture.build(), architecture.batch()
    model = adapted(base, r=R)
    check_targets(architecture, base, model)
    record = Record(base, list(layers_of(model)))
    check_outputs(model, base, batch)
    check_layouts(architecture, model, record)
    check_low_rank_gradients(architecture, model, base, batch, record)
    if any(ran is not None and not ran.why_exact for ran in report_of(model).values()):
        check_gradients_at_full_rank(base, batch, monkeypatch, list(record.layers))
    if max(value.dim() for value in batch.values() if value.is_floating_point()) >= 4:
        check = verify_layout(model, batch)
        assert check.ok and not check.left_out, check


def check_targets(architecture, base, model):
    """Check that all linear layers of the tower's blocks are adapted, and that nothing else is trained."""
    linears = {name for name, module in base.named_modules() if type(module) is nn.Linear}
    in_tower = {name for name in linears if re.match(TOWERS[architecture.model_type], name)}
    assert in_tower
    assert {name.removeprefix(PREFIX) for name in layers_of(model)} == in_tower
    trained = {name.removeprefix(PREFIX) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".lbpwht")[0] for name in trained} == in_tower


def test_a_model_without_a_vision_tower_has_to_be_told_its_layers():
    """Fuyu passes patches directly to its language model."""
    config = CONFIG_MAPPING["fuyu"](hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with torch.device("meta"):
        model = FuyuForCausalLM(config)
    with pytest.raises(ValueError, match=r"target_modules"):
        get_peft_model(model, LBPWHTConfig())


def test_the_encoder_of_sound_alone_is_adapted():
    config = CONFIG_MAPPING["qwen2_audio"](
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
        },
        text_config={"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 100},
    )
    with torch.device("meta"):
        names = encoder_linears(Qwen2AudioForConditionalGeneration(config))
    assert names and all("audio_tower.layers." in name for name in names)


@pytest.mark.parametrize("in_tower", [True, False])
def test_blocks_that_cache_keys_are_a_language_model_unless_they_are_given_images_alone(in_tower):
    assert bool(encoder_linears(OfBoth(in_tower))) == in_tower


class CachingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, past_key_values=None):
        return self.fc(x)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.layers = nn.ModuleList(CachingBlock() for _ in range(2))


class OfBoth(nn.Module):
    """A model that embeds patches and words; its blocks are in a vision tower or receive both."""

    def __init__(self, in_tower):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.tower = Tower()
        if not in_tower:
            self.layers, self.tower.layers = self.tower.layers, None

    def forward(self, pixel_values, input_ids):
        raise NotImplementedError


def test_mergers_to_another_width_are_no_blocks():
    """In Qwen3-VL they are a list in the vision tower."""
    tower = Tower()
    tower.mergers = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
    )
    assert encoder_linears(tower) == ["layers.0.fc", "layers.1.fc"]
