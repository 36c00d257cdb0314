"""Checkpoints of the examples: whole or not there, checked before use, and exact to resume from."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common.checkpoints import KEPT, checkpoints, load_checkpoint, remove_checkpoints, save_checkpoint, write_whole
from models import images, same_state, state_of, tiny_vit
from peft import LoraConfig, get_peft_model

from lbp_peft import LBPWHTConfig

TRIAL = Path(__file__).parent / "soak" / "kill_and_resume.py"


class Training:
    """A stack with dropout, AdamW and a schedule, prepared by accelerate."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
        config = LBPWHTConfig(r=3, train_base_weight=False, stack_on=lora)
        model = get_peft_model(tiny_vit(hidden_dropout_prob=0.1), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        self.accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)

    def steps(self, first, last):
        for step in range(first, last):
            self.accelerator.backward(self.model(images(seed=step)).logits.square().mean())
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, folder, number):
        save_checkpoint(self.accelerator, folder, number, {"updates": number})


def names(folder):
    return [path.name for path in checkpoints(folder)]


def saved(folder, *numbers):
    """Checkpoints of a training run, and how it stood at each of them."""
    training, states = Training(), {}
    done = 0
    for number in numbers:
        training.steps(done, number)
        training.save(folder, number)
        states[number], done = state_of(training.model), number
    return training, states


def test_resuming_is_exact(tmp_path):
    training, _ = saved(tmp_path, 4)
    drawn = random.random(), np.random.rand()
    training.steps(4, 8)

    resumed = Training(seed=3)  # other weights and another random state, until the checkpoint is loaded
    assert load_checkpoint(resumed.accelerator, tmp_path) == {"updates": 4}
    assert (random.random(), np.random.rand()) == drawn
    resumed.steps(4, 8)
    assert same_state(state_of(resumed.model), state_of(training.model))
    assert resumed.scheduler.get_last_lr() == training.scheduler.get_last_lr()
    before = state_of(resumed.model)
    resumed.steps(8, 9)
    assert not same_state(state_of(resumed.model), before)


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
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(damage, why, name, tmp_path, capsys):
    training, states = saved(tmp_path, 2, 4)
    damage(tmp_path / "checkpoint-00000004" / name)
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 2}
    assert same_state(state_of(training.model), states[2])
    said = capsys.readouterr().out
    assert f"checkpoint-00000004/{name}" in said and why in said
    # Trained again so far, it takes the place of the damaged one.
    training.steps(2, 4)
    training.save(tmp_path, 4)
    assert same_state(state_of(training.model), states[4])
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 4}
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000004"]


@pytest.mark.parametrize("damage", [Path.unlink, shorten])
def test_without_its_manifest_a_checkpoint_is_refused(damage, tmp_path, capsys):
    training, _ = saved(tmp_path, 2, 4)
    damage(tmp_path / "checkpoint-00000004" / "manifest.json")
    assert load_checkpoint(training.accelerator, tmp_path) == {"updates": 2}
    assert "manifest.json" in capsys.readouterr().out


def test_if_none_is_sound_nothing_starts_over_silently(tmp_path):
    training, _ = saved(tmp_path, 2, 4)
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
        [sys.executable, str(TRIAL), "--kills", "2"], capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "2 processes, 2 kills: the adapters and records are the same" in done.stdout
