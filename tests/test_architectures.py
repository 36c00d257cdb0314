"""The default configuration on every vision architecture of transformers, see `tests/architectures.py`."""

import pytest
from architectures import ARCHITECTURES, LEFT_OUT, mapped_types
from checks import check


def test_every_model_type_is_checked_or_left_out_with_a_reason():
    """Of the transformers that these lists were written for; a newer one brings more, an older one lacks some."""
    checked = {architecture.model_type for architecture in ARCHITECTURES}
    assert not checked & set(LEFT_OUT)
    assert all(LEFT_OUT.values())
    assert len(checked & mapped_types()) >= 40
    if unlisted := mapped_types() - checked - set(LEFT_OUT):
        pytest.skip(f"not in tests/architectures.py: {', '.join(sorted(unlisted))}")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_the_default_configuration_does_the_right_thing(architecture, tmp_path, monkeypatch):
    if why := architecture.why_not_here():
        pytest.skip(why)
    check(architecture, tmp_path, monkeypatch)
