"""The layout report says what people need to know."""

import dataclasses

import pytest
import torch
from models import images, tiny_vit
from peft import get_peft_model

from lbp_peft import LBPWHTConfig, layout_report
from lbp_peft.tuner.report import COLUMNS, _group_names


def adapted(layers=12, **settings):
    return get_peft_model(tiny_vit(num_hidden_layers=layers), LBPWHTConfig(**({"r": 3} | settings))).train()


def called(model):
    model(pixel_values=images(), labels=torch.tensor([0, 1])).loss.backward()
    return layout_report(model)


def test_totals_come_first_and_like_layers_share_a_row():
    lines = str(called(adapted(rank_pattern={"layers.5.mlp.fc1": 6}))).splitlines()
    assert lines[0] == "72 of 72 adapted layers have a low-rank backward pass."
    assert lines[1] == "Tokens kept of their inputs: 291 of 4680 (6 %)."  # 71 layers with 1 + 3 of 65, one with 1 + 6
    values = 1e-6 * (12 * (5 * 4 * 32 + 4 * 64) + 3 * 32)
    assert lines[2].startswith(f"Values kept of their inputs, each counted once: {values:.2f} M of 0.17 M")
    assert lines[3] == "The grids were followed from vit.embeddings.patch_embeddings.projection."
    names = [line.split()[0] for line in lines[6:13]]
    assert names == [
        *(f"vit.layers.{{0..11}}.attention.{name}_proj" for name in "qkvo"),
        "vit.layers.{0..4,6..11}.mlp.fc1",
        "vit.layers.{0..11}.mlp.fc2",
        "vit.layers.5.mlp.fc1",
    ]


def test_verbose_lists_all_layers_and_explains_all_columns():
    report = called(adapted(2))
    text = report.as_text(verbose=True)
    assert all(f"\n{name}" in text for name in report.layers)
    assert all(f"\n{column}: {meaning}" in text for column, meaning in COLUMNS.items())


def test_exact_layers_are_counted_with_the_reason():
    model = adapted(2, r=64)
    text = str(called(model))
    assert text.startswith(
        "0 of 12 adapted layers have a low-rank backward pass.\n12 are exact: it would keep as many rows"
    )


def test_reports_fit_100_columns_and_number_several_reasons():
    report = called(adapted(2, rank_pattern={"fc1": 64}))
    why = "for a reason that takes some words to say, more than there is room for in a row of the table"
    for name in list(report.layers)[:2]:
        report.layers["some.module.with.a.name.so.long.that.it.takes.a.line.of.its.own." + name] = dataclasses.replace(
            report.layers[name], why_exact=why
        )
    for verbose in (False, True):
        text = report.as_text(verbose)
        assert max(map(len, text.splitlines())) <= 100
        assert "2 are exact (1): it would keep" in text and "2 are exact (2): for a reason" in text
        assert text.count("exact (1)") > 1 and text.count(why[:40]) == 1


def test_layers_that_were_not_called_are_counted():
    assert "12 have not been called in training mode yet." in str(layout_report(adapted(2)))


def test_notebooks_get_a_table_and_pandas_a_row_for_each_layer():
    report = called(adapted(2))
    page = report._repr_html_()
    assert page.count("<th ") == len(COLUMNS) - 1 and "vit.layers.{0..1}.mlp.fc{1..2}" in page
    frame = pytest.importorskip("pandas") and report.to_pandas()
    assert list(frame.columns) == list(COLUMNS) and list(frame["layer"]) == list(report.layers)
    assert set(frame["dW from"]) == {"4"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b"], ["a.0.b"]),
        (["a.0.b", "a.1.b", "a.2.b", "a.10.b"], ["a.{0..2,10}.b"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0..1}.b.{0..1}"]),
        (["a.0.b.0", "a.1.b.0", "a.1.b.1"], ["a.0.b.0", "a.1.b.{0..1}"]),
    ],
)
def test_names_are_grouped_by_their_numbers(names, expected):
    assert _group_names(names) == expected
