"""The default configuration on every vision architecture of transformers, see `tests/support/architectures.py`."""

import pytest
import timm_architectures
import vlm_architectures
from architectures import ARCHITECTURES, LEFT_OUT, mapped_types
from checks import check
from models import ROOT


def test_every_model_type_is_checked_or_left_out_with_a_reason():
    """The lists are those of one version of transformers; a newer one has more types, and an older one lacks some."""
    checked = {architecture.model_type for architecture in ARCHITECTURES}
    assert not checked & set(LEFT_OUT)
    assert all(LEFT_OUT.values())
    assert len(checked & mapped_types()) >= 40
    if unlisted := mapped_types() - checked - set(LEFT_OUT):
        pytest.skip(f"not in tests/support/architectures.py: {', '.join(sorted(unlisted))}")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_the_default_configuration_does_the_right_thing(architecture, tmp_path, monkeypatch):
    if why := architecture.why_not_here():
        pytest.skip(why)
    check(architecture, tmp_path, monkeypatch)


def test_the_tables_in_the_docs_are_of_these_lists():
    """docs/models_table.py makes the tables from these lists."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row[0] not in ("model type", "model", "---")]
    assert [row[0] for row in rows if len(row) == 6] == sorted(architecture.name for architecture in ARCHITECTURES)
    assert [row[0] for row in rows if len(row) == 7] == sorted(a.name for a in vlm_architectures.ARCHITECTURES)
    assert [row for row in rows if len(row) == 2] == [list(item) for item in sorted(LEFT_OUT.items())]
    assert [row[0] for row in rows if len(row) == 5] == sorted(a.name for a in timm_architectures.ARCHITECTURES)
