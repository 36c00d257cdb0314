"""The two short example programs, quickstart.py and trainer.py, run on a part of the digits."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
datasets = pytest.importorskip("sklearn.datasets", reason="the examples' digits need scikit-learn")


@pytest.fixture
def few_digits(monkeypatch):
    """Have load_digits() return 450 of its 1797 images."""
    data = datasets.load_digits()
    data.images, data.target = data.images[:450], data.target[:450]
    monkeypatch.setattr(datasets, "load_digits", lambda: data)
    return data


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, few_digits):
    """Run a program as a script in an empty folder, and return what it printed."""

    def program(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return program


@pytest.mark.parametrize(("name", "lines"), [("quickstart.py", 80), ("trainer.py", 100)])
def test_the_programs_fit_on_a_screen(name, lines):
    assert len((EXAMPLES / name).read_text().splitlines()) <= lines


def test_quickstart_learns_and_the_saved_adapter_predicts_the_same(run):
    trained, saved = re.findall(r"accuracy.*: ([\d.]+)%", run("quickstart.py"))
    assert trained == saved and float(trained) > 40  # chance is 20 %


@pytest.mark.parametrize("flags", [[], ["--lora"]])
def test_trainer_trains_and_saves_an_adapter(run, tmp_path, flags):
    printed = run("trainer.py", "--epochs", "0.1", "--output", "out", *flags)
    assert "Test accuracy" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("flags", [["--dataset", "nowhere"], ["--model", "./nowhere"]])
def test_trainer_refuses_what_is_not_there(run, flags):
    with pytest.raises(SystemExit) as stopped:
        run("trainer.py", *flags)
    assert stopped.value.code
