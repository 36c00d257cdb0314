"""DeepSpeed's ZeRO on two processes of the CPU: the same weights as on one process, and adapters saved from shards."""

import functools
import importlib.util

import pytest
import torch
import torch.distributed
from models import largest_difference, tiny_vit
from peft import PeftModel, get_peft_model_state_dict
from processes import on_processes
from trials import BATCH, PROCESSES, Trial, lbp_wht, stacked, train_alone

from lbp_peft import layout_report

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes would share one device"),
]

STEPS = 6
TRIALS = {
    "low-rank weight gradients": Trial("", lbp_wht),
    "the paper's setting": Trial("", functools.partial(lbp_wht, grad_input_rank=3)),
    "on LoRA": Trial("", stacked),
    "AdamW, on LoRA": Trial("", stacked, adam=True),
    "checkpointing": Trial("", lbp_wht, checkpointing=True),
    "base weights on disk": Trial("", functools.partial(lbp_wht, base_weights="disk")),
    "base weights dropped": Trial("", functools.partial(lbp_wht, base_weights="dropped")),
}


def train_sharded(stage, trial, folder):
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=stage)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, mixed_precision="no")
    model = trial.model()
    model, optimizer = accelerator.prepare(model, trial.optimizer(model))
    for step in range(STEPS):
        accelerator.backward(trial.loss(model, step, 0, accelerator.process_index))
        optimizer.step()
        optimizer.zero_grad()
    ran = layout_report(accelerator.unwrap_model(model)).layers.values()
    whole = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=whole)
    accelerator.wait_for_everyone()
    return {
        "processes": accelerator.num_processes,
        "low_rank": sum(not r.why_exact for r in ran),
        "weights": {name: tensor.float() for name, tensor in whole.items()},
    }


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_end_with_the_weights_of_one(stage, name, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    trial, adapter = TRIALS[name], tmp_path / "adapter"
    found, other = on_processes(PROCESSES, functools.partial(train_sharded, stage, trial, adapter), tmp_path)
    assert found["processes"] == other["processes"] == PROCESSES
    assert found["low_rank"] == 12
    alone = train_alone(trial, STEPS)
    assert largest_difference({n: found["weights"][n] for n in alone}, alone) < 1e-5

    loaded = PeftModel.from_pretrained(tiny_vit(), adapter)
    saved, expected = get_peft_model_state_dict(loaded), get_peft_model_state_dict(loaded, found["weights"])
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
