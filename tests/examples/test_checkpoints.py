"""Checkpoints of the examples are complete or absent, are checked before use, and can be resumed from exactly."""

import dataclasses
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from choices import deciding
from common.checkpoints import KEPT, checkpoints, load_checkpoint, remove_checkpoints, save_checkpoint, write_whole
from models import images, same_state, state_of, tiny_vit
from peft import LoraConfig, get_peft_model
from processes import on_processes
from safetensors.torch import load_file

from lbp_peft import LBPWHTConfig

TRIAL = Path(__file__).parents[1] / "soak" / "kill_and_resume.py"


LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
STACK = {"train_base_weight": False, "stack_on": LORA}


class Training:
    """Train a stack, or another method by settings, with dropout, AdamW and a schedule, prepared by accelerate."""

    def __init__(self, seed=0, settings=STACK, scaler=None):
        torch.manual_seed(seed)
        config = LBPWHTConfig(r=3, **settings)
        model = get_peft_model(tiny_vit(hidden_dropout_prob=0.1), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        self.accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        self.accelerator.scaler = scaler
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)

    def steps(self, first, last):
        for step in range(first, last):
            self.accelerator.backward(self.model(images(seed=step)).logits.square().mean())
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, folder, number):
        save_checkpoint(self.accelerator, folder, number, {"updates": number})


def names(folder):
    return [path.name for path in checkpoints(folder)]


def saved(folder, *numbers, settings=STACK):
    """Write checkpoints of a training run; return the state of the run at each of them."""
    training, states = Training(settings=settings), {}
    done = 0
    for number in numbers:
        training.steps(done, number)
        training.save(folder, number)
        states[number], done = state_of(training.model), number
    return training, states


@pytest.fixture(scope="module")
def run_with_two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two checkpoints")
    with deciding(use_low_rank=True, fastest_precision="full"):  # as in each test, see conftest.py
        return *saved(folder, 2, 4), folder


@pytest.fixture
def two_checkpoints(run_with_two_checkpoints, tmp_path):
    """The result of `saved(tmp_path, 2, 4)`. The tests share the run: each starts it where a checkpoint left it."""
    training, states, folder = run_with_two_checkpoints
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return training, states


@pytest.mark.parametrize(
    "settings", [STACK, {"grad_input_dtype": "full"}, {"grad_input_rank": 3}, {"grad_input_dtype": "int8"}]
)
def test_resuming_is_exact(settings, tmp_path):
    training, _ = saved(tmp_path, 4, settings=settings)
    drawn = random.random(), np.random.rand()
    training.steps(4, 8)

    resumed = Training(
        seed=3, settings=settings
    )  # other weights and another random state, until the checkpoint is loaded
    assert load_checkpoint(resumed.accelerator, tmp_path) == {"updates": 4}
    assert (random.random(), np.random.rand()) == drawn
    resumed.steps(4, 8)
    assert same_state(state_of(resumed.model), state_of(training.model))
    assert resumed.scheduler.get_last_lr() == training.scheduler.get_last_lr()
    before = state_of(resumed.model)
    resumed.steps(8, 9)
    assert not same_state(state_of(resumed.model), before)


def test_a_scaler_goes_on_where_it_stood(tmp_path):
    """A step that overflowed does not count in the schedule."""

    def scaled(seed=0):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return Training(seed, scaler=scaler), scaler

    training, scaler = scaled()
    training.steps(0, 2)
    before = state_of(training.model)
    scaler.update(float("inf"))
    training.steps(2, 3)
    assert training.optimizer.step_was_skipped and same_state(state_of(training.model), before)
    assert training.scheduler.scheduler.last_epoch == 2
    scaler.update(2.0**10)
    training.steps(3, 5)
    state = scaler.state_dict()
    assert state["scale"] == 2.0**10 and state["_growth_tracker"] == 2
    training.save(tmp_path, 5)
    training.steps(5, 8)
    assert scaler.get_scale() == 2.0**11

    resumed, other = scaled(seed=3)
    load_checkpoint(resumed.accelerator, tmp_path)
    assert other.state_dict() == state
    resumed.steps(5, 8)
    assert same_state(state_of(resumed.model), state_of(training.model))
    assert other.state_dict() == scaler.state_dict()


def test_without_a_checkpoint_training_starts_from_the_beginning(tmp_path):
    assert load_checkpoint(Training().accelerator, tmp_path) is None


def test_the_last_ones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000003"] and len(names(tmp_path)) == KEPT
    assert sorted(os.listdir(tmp_path)) == names(tmp_path)
    remove_checkpoints(tmp_path)
    assert not os.listdir(tmp_path)


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


def garble(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, why", [(shorten, "bytes instead of"), (garble, "checksum"), (Path.unlink, "missing")])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    damage, why, name, two_checkpoints, tmp_path, capsys
):
    training, states = two_checkpoints
    damage(tmp_path / "checkpoint-00000004" / name)
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 2}
    assert same_state(state_of(training.model), states[2])
    said = capsys.readouterr().out
    assert f"checkpoint-00000004/{name}" in said and why in said
    # The run is trained again up to this point, and its checkpoint replaces the damaged one.
    training.steps(2, 4)
    training.save(tmp_path, 4)
    assert same_state(state_of(training.model), states[4])
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 4}
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000004"]


@pytest.mark.parametrize("damage", [Path.unlink, shorten])
def test_without_its_manifest_a_checkpoint_is_refused(damage, two_checkpoints, tmp_path, capsys):
    training, _ = two_checkpoints
    damage(tmp_path / "checkpoint-00000004" / "manifest.json")
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 2}
    assert "manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"files": []}', '{"files": {"a": 1}, "processes": 1}', '{"files": {}}']
)
def test_a_manifest_of_another_kind_is_refused(content, two_checkpoints, tmp_path, capsys):
    training, _ = two_checkpoints
    (tmp_path / "checkpoint-00000004" / "manifest.json").write_text(content)
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 2}
    assert "checkpoint-00000004/manifest.json cannot be read" in capsys.readouterr().out


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-00000200", "checkpoint-50", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["checkpoint-50", "checkpoint-00000200", "checkpoint-1000"]


def fail_on_main(folder):
    """Save where the main process cannot write; return the number of processes and the error."""
    accelerator = Accelerator(cpu=True)
    (folder / "checkpoint-00000002").write_text("in the way")  # of the folder
    with pytest.raises((OSError, SystemExit)) as stopped:
        save_checkpoint(accelerator, folder, 2, {})
    return accelerator.num_processes, str(stopped.value)


def test_no_process_waits_for_a_main_one_that_failed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    main, other = on_processes(2, functools.partial(fail_on_main, folder), tmp_path)
    assert main[0] == other[0] == 2
    assert "Not a directory" in main[1] and main[1] in other[1] and "The main process failed" in other[1]


def test_if_none_is_sound_nothing_starts_over_silently(two_checkpoints, tmp_path):
    training, _ = two_checkpoints
    for path in checkpoints(tmp_path):
        garble(path / "model.safetensors")
    before = state_of(training.model)
    with pytest.raises(SystemExit, match="No checkpoint .* is sound"):
        load_checkpoint(training.accelerator, tmp_path)
    assert same_state(state_of(training.model), before)


def test_another_number_of_processes_is_refused(tmp_path):
    training, _ = saved(tmp_path, 2)
    file = tmp_path / "checkpoint-00000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["processes"] == 1
    file.write_text(json.dumps(manifest | {"processes": 2}))
    with pytest.raises(SystemExit, match="written by 2 processes"):
        load_checkpoint(training.accelerator, tmp_path)


@pytest.mark.parametrize("left", ["checkpoint.new", "checkpoint.old"])
def test_what_a_killed_run_left_behind_is_no_checkpoint(left, tmp_path):
    training, _ = saved(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-00000002", tmp_path / left)
    shorten(tmp_path / left / "model.safetensors")
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 2}
    training.save(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-00000002", "checkpoint-00000004"]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    write_whole(file, "before")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "after")
    assert file.read_text() == "before"


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path):
    pytest.importorskip("sklearn", reason="the example's digits need scikit-learn")
    done = subprocess.run(
        [sys.executable, str(TRIAL), "--kills", "2"], capture_output=True, text=True, timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # two processes cannot share a GPU
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "2 processes, 2 kills: the adapters and records are the same" in done.stdout
    assert "lives went on from a checkpoint of another; none was refused" in done.stdout


# The example program's own


def options_for(folder, **changes):
    from common.classification import Classification, ClassificationOptions

    small = {"batch_size": 10, "test_images": 20, "train_images_per_class": 4, "checkpoint_every": 2, "min_crop": 0.8}
    return Classification(), ClassificationOptions(output=str(folder), **(small | changes))


def test_pre_training_that_was_killed_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the example's digits need scikit-learn")
    from common import digits, experiment, training

    known = digits.digits(range(5))
    known.train, known.test = known.train.select(range(40)), known.test.select(range(10))
    example = dataclasses.replace(digits.EMBEDDED, known=lambda: known, epochs=2)
    monkeypatch.setattr("common.classification.Classification.embedded", lambda self: example)
    updates = []
    monkeypatch.setattr(training, "log", lambda accelerator, run, progress, values: updates.append(progress.updates))

    def pretrained(folder, **changes):
        task, options = options_for(folder, **changes)
        accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        options = experiment.pretrain(task, options, accelerator, task.embedded().new().names)
        return load_file(Path(options.model) / "model.safetensors")

    whole = pretrained(tmp_path / "whole")

    def die(*_):
        save_checkpoint(*_)
        if updates[-1] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", die)
        pretrained(tmp_path / "killed")
    updates.clear()
    assert same_state(pretrained(tmp_path / "killed", resume=True), whole)
    assert updates[0] in (4, 5)  # the end of an epoch is logged under the update before
    assert os.listdir(tmp_path / "killed") == ["pretrained"]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5}


@pytest.mark.parametrize("scale", [1.0, float("inf")])
def test_steps_that_overflow_do_not_count_for_the_schedule(scale, tmp_path, monkeypatch):
    from common import training

    rates = []
    monkeypatch.setattr(training, "log", lambda *of: rates.append(of[3]["learning rate"]) if "loss" in of[3] else None)
    task, options = options_for(tmp_path, scheduler="linear", warmup_steps=0, checkpoint_every=None)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    loaders = [torch.utils.data.DataLoader(Rows(), batch_size=2) for _ in range(2)]
    model, before = tiny_vit(), state_of(tiny_vit())
    training.train(accelerator, task, model, loaders, training.Run("", tmp_path, 1, 1e-3), options)
    assert rates == pytest.approx([1e-3] * 4 if scale > 1 else [7.5e-4, 5e-4, 2.5e-4, 0])
    assert same_state(state_of(model), before) == (scale > 1)


def test_of_an_earlier_run_nothing_is_left_to_resume_from(tmp_path):
    from common.experiment import prepare_output

    def prepare(**changes):
        _, options = options_for(tmp_path, **changes)
        prepare_output(options, [SimpleNamespace(folder=name) for name in ("lora", "lbp-wht")])

    folders = [tmp_path / name for name in ("lora/seed-0", "lbp-wht/seed-0", "pretrained", "untrained")]
    others = tmp_path / "full" / "seed-0"  # of a method that is not requested now
    for folder in [*folders, others]:
        folder.mkdir(parents=True)
    prepare(resume=True)
    assert all(folder.exists() for folder in folders)
    with pytest.raises(SystemExit, match="it ran with another epochs"):
        prepare(resume=True, epochs=3)
    prepare(epochs=3)
    assert not any(folder.exists() for folder in folders) and others.exists()


@pytest.mark.parametrize("content", ["", "[1]", '[{"loss": 1}]', "null"])
def test_a_damaged_record_is_trained_again(content, tmp_path, capsys):
    from common.experiment import RECORD, Experiment

    for left in ("checkpoint-00000002", "checkpoint.new"):
        (tmp_path / left).mkdir()
    experiment = SimpleNamespace(options=options_for(tmp_path, resume=True)[1])
    (tmp_path / RECORD).write_text(content)
    assert Experiment.finished(experiment, tmp_path) is None
    assert f"{RECORD} cannot be read" in capsys.readouterr().out
    assert names(tmp_path)
    # An intact checkpoint is used; one that the run had no time to remove is removed.
    (tmp_path / RECORD).write_text('[{"loss": 1.5, "score": 0.5, "seconds": 3}]')
    assert Experiment.finished(experiment, tmp_path) == [{"loss": 1.5, "score": 0.5, "seconds": 3.0}]
    assert os.listdir(tmp_path) == [RECORD]
