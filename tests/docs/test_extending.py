"""The recipes of docs/extending.md run."""

from __future__ import annotations

import re

import pytest
from models import ROOT

from lbp_peft import layer_types
from lbp_peft.calibration import CALIBRATED_SELECTIONS
from lbp_peft.formats.registry import FORMATS

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def registries(monkeypatch):
    """Remove what the recipes register after the test."""
    monkeypatch.setattr(layer_types, "_LAYER_TYPES", list(layer_types._LAYER_TYPES))
    before, selections = dict(FORMATS), dict(CALIBRATED_SELECTIONS)
    yield
    CALIBRATED_SELECTIONS.clear()
    CALIBRATED_SELECTIONS.update(selections)
    FORMATS.clear()
    FORMATS.update(before)


def test_the_recipes_run(registries):
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("\n## ") + 1 >= 8
    program = "\n".join(blocks)
    exec(compile(program, "docs/extending.md", "exec"), {"__name__": "extending"})
