"""The command lbp-peft."""

import importlib.util
import json
import re
import sys

import pytest
import torch
import yaml
from common.options import Options
from models import ROOT, vit_config
from PIL import Image
from transformers import SegformerConfig

import lbp_peft
from lbp_peft.cli import COMMANDS, inputs, main
from lbp_peft.cli.inputs import InputOptions, load_inputs
from lbp_peft.loading.options import Parser
from lbp_peft.recommendation import CANDIDATES, runners, search


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    config = vit_config(num_labels=2)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    for label, colour in (("cat", "red"), ("dog", "blue")):
        folder = tmp_path / "data" / "train" / label
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def quick(monkeypatch):
    """Try few candidates, in this process."""

    def refuse(job):
        raise runners.WorkerError("it is tried here")

    monkeypatch.setattr(search, "ProcessRunner", refuse)
    monkeypatch.setitem(search.recommend.__kwdefaults__, "candidates", CANDIDATES[:1])


def run(*arguments):
    main(list(map(str, arguments)))


def test_help_lists_the_commands_and_version_what_it_runs_on(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    run("version")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"lbp-peft {lbp_peft.__version__}" and f"torch {torch.__version__}" in lines
    with pytest.raises(SystemExit):
        run("version", "extra")
    assert "unrecognized arguments: extra" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recommend", "report"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    text = capsys.readouterr().out
    assert "test_images" not in text  # which has no effect here
    assert stop.value.code == 0 and "--random_images" in text and max(map(len, text.splitlines())) <= 100


def test_it_is_installed_and_needs_nothing_of_the_examples():
    assert 'lbp-peft = "lbp_peft.cli:main"' in (ROOT / "pyproject.toml").read_text()
    for file in (ROOT / "lbp_peft").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (common|benchmarks|examples)\b", file.read_text(), re.M), file


def test_recommend_writes_what_the_examples_read(model, data, quick, tmp_path, capsys):
    run("recommend", "--model", model, "--dataset", data, "--batch-size", 4, "--minutes", 0.02, "--min-cosine", 0,
        "--skip-broken", "--output", tmp_path / "out")  # fmt: skip
    text = capsys.readouterr().out
    assert "Recommended: " in text and "holds no weights" in text
    assert "The weights are random, so the cosines say little about yours." in text
    record = json.loads((tmp_path / "out" / "recommendation.json").read_text())
    assert record["recommended"] in text and (tmp_path / "out" / "recommendation.png").exists()
    settings = yaml.safe_load((tmp_path / "out" / "recommendation.yaml").read_text())
    assert settings["batch_size"] == 4 and settings["dataset"] == str(data)
    assert settings["skip_broken"] and "image_column" not in settings
    parser = Parser(Options)
    assert parser.options(parser.flags_of(tmp_path / "out" / "recommendation.yaml")).model == str(model)


def test_report_shows_layouts_and_the_quality_of_gradients(model, capsys):
    run("report", "--model", model, "--random-images", 32, "--settings", "r=3", "grad_input_dtype=full", "--verbose")
    text = capsys.readouterr().out
    assert text.count("vit.layers.0.mlp.fc1") >= 1 and "gradient cosine" in text and "12 of 12 adapted layers" in text


def test_without_timm_its_names_are_looked_for_on_the_hub_and_the_user_is_told(monkeypatch, capsys):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    assert not inputs._is_of_timm("resnet18") and "timm, which has models by such names" in capsys.readouterr().out
    assert not inputs._is_of_timm("facebook/dinov2-base") and not capsys.readouterr().out


def test_a_setting_that_does_not_exist_is_named(model, capsys):
    with pytest.raises(SystemExit):
        run("report", "--model", model, "--random-images", 32, "--settings", "grad_input_rnak=3")
    assert "no setting grad_input_rnak: did you mean grad_input_rank?" in capsys.readouterr().err


def test_label_maps_make_it_a_segmentation_and_one_is_enough(tmp_path):
    config = SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16)
    config.save_pretrained(tmp_path / "model")
    for kind, mode, size in (("images", "RGB", (40, 30)), ("masks", "L", (40, 30))):
        (tmp_path / "data" / kind).mkdir(parents=True)
        image = Image.new(mode, size, 1)
        image.paste(9, (0, 0, 20, 20))  # in maps, of no class
        image.save(tmp_path / "data" / kind / "1.png")
    options = InputOptions(
        model=str(tmp_path / "model"), dataset=str(tmp_path / "data"), image_size=[64], batch_size=2, device="cpu",
        ignore_index=9,
    )  # fmt: skip
    loaded = load_inputs(options)
    assert loaded.task == "segmentation" and loaded.batches[0]["labels"].shape == (2, 64, 64)
    assert torch.isfinite(loaded.model(**loaded.batches[0]).loss)


def test_one_image_of_each_class_is_enough(model, tmp_path):
    """Nothing is tested, so no image is held out, and splits for testing do not matter."""
    for place, name in (("train/cat", "1"), ("train/dog", "2"), ("test/bird", "3")):
        (tmp_path / "few" / place).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "few" / place / f"{name}.png")
    loaded = load_inputs(InputOptions(model=str(model), dataset=str(tmp_path / "few"), batch_size=4, device="cpu"))
    assert sorted(set(loaded.batches[0]["labels"].tolist())) == [1, 2] and len(loaded.batches[0]["labels"]) == 4


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="the package is found before the folder")
def test_a_folder_called_timm_is_not_the_package(monkeypatch, tmp_path, capsys):
    (tmp_path / "timm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not inputs._is_of_timm("resnet18") and "timm, which has models by such names" in capsys.readouterr().out


def test_names_of_timm_are_models():
    pytest.importorskip("timm")
    options = InputOptions(
        model="test_vit", random_weights=True, random_images=[160], batch_size=2, mixed_precision="no", device="cpu"
    )
    loaded = load_inputs(options)
    assert torch.isfinite(loaded.loss_fn(loaded.model, loaded.batches[0]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./nowhere", "--random-images", 32], "--model ./nowhere: there is no such folder"),
        (["--model", "{model}", "--dataset", "./nowhere"], "--dataset ./nowhere: there is no such folder"),
        (["--model", "{empty}", "--random-images", 32], "this checkpoint cannot be loaded"),
        (["--model", "{model}", "--dataset", "{broken}"], "none of the images can be used"),
        (["--model", "{model}", "--random-images", 2], "cannot be trained"),
        (["--model", "{model}", "--random-images", 32, "--device", "nothing"], "--device nothing"),
    ],
)
def test_mistakes_end_in_one_line(model, data, quick, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    for label in ("cat", "dog"):
        folder = tmp_path / "broken" / "train" / label
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"no image")
        (folder / "1.png").write_bytes(b"nor this")
    places = {name: tmp_path / name for name in ("model", "empty", "broken")}
    flags = [str(flag).format(**places) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run("recommend", *flags, "--minutes", 0.02, "--output", tmp_path / "out")
    assert message in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "much"], "memory must be a size"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--dataset", "x", "--random-images", "32"], "exactly one of"),
        (["--random_image", "32"], "did you mean --random_images?"),
        ([], "give --model"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    model = ["--model", "x"] if flags else []
    with pytest.raises(SystemExit) as stop:
        run("recommend", *model, *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_budget_that_nothing_meets_shows_the_table_and_the_least(model, quick, tmp_path, capsys):
    with pytest.raises(SystemExit, match="The least is .* MiB, with "):
        run("recommend", "--model", model, "--random-images", 32, "--minutes", 0.02, "--memory", "1KB",
            "--output", tmp_path / "out")  # fmt: skip
    assert "full fine-tuning" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.startswith(("lbp_peft.cli.", "lbp_peft.loading."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"needs the package datasets: pip install .lbp-peft\[cli\]"):
        run("report", "--help")
