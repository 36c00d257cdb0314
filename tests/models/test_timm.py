"""The default configuration on models straight from timm, see `tests/support/timm_architectures.py`."""

import pytest
from checks import check
from timm_architectures import ARCHITECTURES

pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_the_default_configuration_does_the_right_thing(architecture, tmp_path, monkeypatch):
    check(architecture, tmp_path, monkeypatch)
