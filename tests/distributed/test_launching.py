"""The launch configurations work, and all processes that are started form one group."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from common import processes
from common.options import Options
from models import images, tiny_vit
from transformers import Dinov2Config, Dinov2ForImageClassification

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
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


def environment(name):
    """The environment variables that `accelerate launch` gives to the processes that it starts."""
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), "program.py"]
    arguments, config, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    if not name.startswith("zero"):
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as its launch_command does
    return prepare_deepspeed_cmd_env(arguments)[1]


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_nodes"])
def test_fsdp_shards_models_that_all_processes_have(name):
    found = environment(name)
    assert found["ACCELERATE_USE_FSDP"] == "true" and found["FSDP_VERSION"] == "2"
    assert found["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert found["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "ViTLayer" and found["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_takes_the_configuration(stage, monkeypatch):
    from accelerate import DeepSpeedPlugin

    for name, value in environment(f"zero{stage}").items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage and zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "none"
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 1
    assert plugin.gradient_clipping == 0.0


@pytest.mark.parametrize("norm, expected", [(None, 0.0), (0.5, 0.5)])
def test_deepspeed_clips_as_the_options_say(norm, expected, monkeypatch, tmp_path):
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": "auto"})
    accelerator = SimpleNamespace(
        num_processes=1, state=SimpleNamespace(deepspeed_plugin=plugin), device=torch.device("cpu"), print=print
    )
    monkeypatch.setattr(processes, "Accelerator", lambda **_: accelerator)
    processes.make_accelerator(Options(output=str(tmp_path), max_grad_norm=norm))
    assert plugin.deepspeed_config["gradient_clipping"] == expected


STUBS = {
    "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'for argument in "$@"; do echo "$argument"; done >> "$CALLS"; echo >> "$CALLS"',
}


@pytest.mark.parametrize("config", [None, "examples/configs/fsdp2_nodes.yaml"])
def test_the_slurm_script_starts_a_launcher_on_each_machine(config, tmp_path, monkeypatch):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40123", "SLURM_NNODES": "2"}
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")} | job
    here |= {"CONFIG": config} if config else {}
    arguments = ["examples/image_classification.py", "--output", "a folder", "--resume"]
    subprocess.run(["bash", str(CONFIGS / "slurm.sh"), *arguments], check=True, env=here)
    calls = [call.splitlines() for call in (tmp_path / "calls").read_text().split("\n\n") if call]
    expected = ["launch", "--config_file", config or "examples/configs/ddp_nodes.yaml", "--num_machines", "2"]
    expected += ["--num_processes", "16", "--machine_rank", "?", "--main_process_ip", "node7"]
    expected += ["--main_process_port", "20123", *arguments]
    assert calls == [[str(rank) if each == "?" else each for each in expected] for rank in range(2)]


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
        f"count = make_accelerator(Options(output={str(tmp_path)!r})).num_processes\n"
        "print(f'of {count}\\n', end='')\n"  # in one piece, since both write to one stream
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


def test_the_batch_may_be_elsewhere_than_the_model():
    """A batch comes from the loader on the CPU; the model may be on a GPU already."""
    assert processes.freeze_unused(tiny_vit().to("meta"), batch()) == []


def test_nothing_is_frozen_where_all_is_used():
    model = tiny_vit()
    assert processes.freeze_unused(model, batch()) == []
    assert all(p.requires_grad for p in model.parameters())
