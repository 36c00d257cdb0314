"""The configurations to launch with, and that all processes that are started form one group."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from common import processes
from common.options import Options
from models import images, tiny_vit
from transformers import Dinov2Config, Dinov2ForImageClassification

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
EXPECTED = {  # processes, machines, engine
    "one_gpu": (1, 1, "NO"),
    "ddp": (8, 1, "MULTI_GPU"),
    "fsdp2": (8, 1, "FSDP"),
    "ddp_nodes": (32, 4, "MULTI_GPU"),
    "fsdp2_nodes": (32, 4, "FSDP"),
    "zero1": (8, 1, "DEEPSPEED"),
    "zero2": (8, 1, "DEEPSPEED"),
    "zero3": (8, 1, "DEEPSPEED"),
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configuration(file):
    config = load_config_from_file(str(file))
    assert (config.num_processes, config.num_machines, config.distributed_type.value) == EXPECTED[file.stem]
    assert not config.use_cpu
    if file.stem.startswith("fsdp2"):
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_activation_checkpointing"]
    if file.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])


def test_every_configuration_is_there():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(EXPECTED)
    assert all(yaml.safe_load(file.read_text())["main_training_function"] == "main" for file in CONFIGS.glob("*.yaml"))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_takes_the_configuration(stage):
    from accelerate import DeepSpeedPlugin

    config = load_config_from_file(str(CONFIGS / f"zero{stage}.yaml")).deepspeed_config
    assert DeepSpeedPlugin(zero_stage=config["zero_stage"]).zero_stage == stage


def test_the_slurm_script_parses():
    subprocess.run(["bash", "-n", str(CONFIGS / "slurm.sh")], check=True)


def test_processes_that_would_each_run_alone_are_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(SystemExit, match="2 processes were started, but they form groups of 1"):
        processes.make_accelerator(Options(output=str(tmp_path)))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes would share one device")
def test_torchrun_starts_one_group(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(CONFIGS.parent)!r})\n"
        "from common.options import Options\n"
        "from common.processes import make_accelerator\n"
        f"print('of', make_accelerator(Options(output={str(tmp_path)!r})).num_processes)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("of 2") == 2, done.stderr[-2000:]
    assert "2 processes, cpu." in done.stdout


def batch():
    return {"pixel_values": images(1), "labels": torch.tensor([0])}


def test_what_the_loss_never_depends_on_is_frozen():
    config = Dinov2Config(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, drop_path_rate=0.5
    )
    model = Dinov2ForImageClassification(config).train()
    state = torch.get_rng_state()
    assert processes.freeze_unused(model, batch()) == ["dinov2.embeddings.mask_token"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["dinov2.embeddings.mask_token"]
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_frozen_where_all_is_used():
    model = tiny_vit()
    assert processes.freeze_unused(model, batch()) == []
    assert all(p.requires_grad for p in model.parameters())
