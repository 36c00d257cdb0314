"""A small run of the example program trains, resumes, reloads and reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment_of

PROGRAM = Path(__file__).parents[2] / "examples" / "image_classification.py"
SMALL = [
    "--epochs", "2", "--train_images_per_class", "4", "--batch_size", "10", "--test_images", "20",
    "--timing_rounds", "1",
]  # fmt: skip

pytest.importorskip("sklearn", reason="the example's digits need scikit-learn")


def run(*arguments, output):
    """Run the program as a user does: in a process of its own, from a folder outside the repository."""
    command = [sys.executable, str(PROGRAM), *SMALL, "--output", str(output), *arguments]
    here = environment_of(PROGRAM.parent.parent)
    return subprocess.run(command, capture_output=True, text=True, cwd=output.parent, env=here, timeout=300)


def test_the_default_data_with_two_methods(tmp_path):
    done = run("--methods", "full", "lbp-wht", output=tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table.strip() in done.stdout and "full fine-tuning" in table and "LBP-WHT r=10" in table
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["results"]) == 2
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))
    for noise in ("torchvision", "FutureWarning", ".py:", "warnings.warn"):
        assert noise not in done.stderr


def test_wrong_arguments_are_refused_before_anything_runs(tmp_path):
    done = run("--model", "somewhere", output=tmp_path / "out")
    assert done.returncode == 2 and "--dataset" in done.stderr
    assert not (tmp_path / "out").exists()
