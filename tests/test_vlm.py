"""The default configuration on vision-language and encoder-decoder models, see `tests/vlm_architectures.py`."""

import re

import pytest
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
from torch import nn
from vlm_architectures import ARCHITECTURES, TOWERS

from lbp_peft import verify_layout

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
        check_gradients_at_full_rank(base, batch, monkeypatch)
    if max(value.dim() for value in batch.values() if value.is_floating_point()) >= 4:
        check = verify_layout(model, batch)
        assert check.ok, check


def check_targets(architecture, base, model):
    """All linear layers of the tower's blocks are adapted, and nothing is trained but them."""
    linears = {name for name, module in base.named_modules() if type(module) is nn.Linear}
    in_tower = {name for name in linears if re.match(TOWERS[architecture.model_type], name)}
    assert in_tower
    assert {name.removeprefix(PREFIX) for name in layers_of(model)} == in_tower
    trained = {name.removeprefix(PREFIX) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".lbpwht")[0] for name in trained} == in_tower
