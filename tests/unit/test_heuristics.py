"""Heuristics can be replaced as a whole."""

from __future__ import annotations

import pytest
from choices import deciding
from models import gradients, images, layers_of, tiny_vit
from peft import get_peft_model

from lbp_peft import LBPWHTConfig, heuristics
from lbp_peft.heuristics import Heuristics


def test_other_heuristics_are_used_within_a_block_only():
    before = heuristics.active()
    mine = Heuristics()
    with pytest.raises(KeyError), heuristics.using(mine) as used:
        assert heuristics.active() is mine is used
        raise KeyError
    assert heuristics.active() is before


@pytest.mark.own_choice
@pytest.mark.filterwarnings("ignore:.*uses exact backpropagation")
@pytest.mark.parametrize("low_rank", [True, False])
def test_they_decide_for_auto(low_rank):
    with deciding(use_low_rank=low_rank, fastest_precision="int8"):
        model = get_peft_model(tiny_vit(), LBPWHTConfig(r=10)).train()
        gradients(model, images())
    precisions = {layer.last_backward.precision for layer in layers_of(model).values()}
    assert precisions == {"int8" if low_rank else "full"}
    assert all((layer.last_backward.why_exact == "") == low_rank for layer in layers_of(model).values())
