"""transformers' Trainer trains exactly, with LBP-WHT and on top of LoRA, in mixed precision and compiled."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from common.checkpoints import MANIFEST, Manifests, checkpoints, last_sound, what_is_wrong
from models import forward, gradients, images, largest_difference, same_state, state_of, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback, TrainingArguments

from lbp_peft import CalibrationCallback, LBPWHTConfig, LBPWHTLayer, exact_backward, layout_report

HEAD = {"modules_to_save": ["classifier"]}
STEPS = 6

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def lbp_wht(**settings):
    model = tiny_vit(hidden_dropout_prob=settings.pop("dropout", 0.1), num_hidden_layers=settings.pop("layers", 2))
    return get_peft_model(model, LBPWHTConfig(**({"r": 3} | HEAD | settings)))


def stacked(**settings):
    lora = LoraConfig(r=4, lora_dropout=settings.get("dropout", 0.1), target_modules=["q_proj", "fc1"], **HEAD)
    return lbp_wht(train_base_weight=False, stack_on=lora, **settings)


BUILDS = pytest.mark.parametrize("build", [lbp_wht, stacked])


class Images(torch.utils.data.Dataset):
    """A data set of eleven images, so that the last batch of an epoch is smaller."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def trainer(model, folder, **changes):
    settings = {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "report_to": [],
        "learning_rate": 1e-2, "warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "seed": 0,
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "label_smoothing_factor": 0.1,
        "label_names": ["labels"],
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(settings | changes))
    return Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())


WAYS = {
    "accumulation and checkpointing": {
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "bf16 and best model": {
        "bf16": True, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@BUILDS
def test_a_stopped_run_goes_on_to_the_same_bits(build, way, tmp_path):
    """The run has dropout, a warm-up, label smoothing and a last batch that is smaller."""
    straight = build()
    whole = trainer(straight, tmp_path / "straight", **WAYS[way])
    whole.train()
    before = state_of(build())
    assert not same_state(state_of(straight), before)

    interrupted = trainer(build(), tmp_path / "resumed", **WAYS[way])
    interrupted.add_callback(Stop(4))
    interrupted.train()
    resumed = build()
    run = trainer(resumed, tmp_path / "resumed", **WAYS[way])
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS
    assert same_state(state_of(resumed), state_of(straight))
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (whole, run)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert not layout_report(resumed).exact or build is stacked

    best = run.state.best_model_checkpoint if "best model" in way else tmp_path / "resumed" / f"checkpoint-{STEPS}"
    loaded = PeftModel.from_pretrained(tiny_vit(), best)
    assert same_state(get_peft_model_state_dict(loaded), get_peft_model_state_dict(resumed))


def test_a_resumed_run_has_the_calibrated_bases_of_its_checkpoint(tmp_path):
    """The run calibrates before steps 1 and 4, and is stopped after step 4 of 6."""
    batches = [{"pixel_values": images(3, seed=0), "labels": torch.arange(3)}]

    def run(name, *callbacks, **how):
        model = lbp_wht(selection="klt", grad_input_dtype="full")
        one = trainer(model, tmp_path / name)
        for callback in (CalibrationCallback(batches, every=3), *callbacks):
            one.add_callback(callback)
        one.train(**how)
        bases = {
            name: m.lbpwht_rule["default"].weight_basis
            for name, m in model.named_modules()
            if isinstance(m, LBPWHTLayer)
        }
        return state_of(model), bases

    state, bases = run("straight")
    stopped, _ = run("resumed", Stop(4))
    resumed, found = run("resumed", resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))
    assert found == bases and same_state(resumed, state) and not same_state(stopped, state)
    with pytest.raises(ValueError, match="every must be"):
        CalibrationCallback(batches, every=0)
    with pytest.raises(ValueError, match="run again in each calibration"):
        CalibrationCallback(iter(batches))


def by_hand(model, smoothing):
    """The mean loss of all images, smoothed and not."""
    rows = [Images()[index] for index in range(len(Images()))]
    logits = forward(model, torch.stack([row["pixel_values"] for row in rows])).detach()
    labels = torch.tensor([row["labels"] for row in rows])
    return [F.cross_entropy(logits, labels, label_smoothing=value).item() for value in (smoothing, 0)]


@BUILDS
def test_losses_are_those_of_smoothed_labels(build, tmp_path):
    model = build(dropout=0.0)
    smoothed, plain = by_hand(model, 0.3)
    assert smoothed != pytest.approx(plain, rel=1e-3)
    settings = {"label_smoothing_factor": 0.3, "per_device_train_batch_size": 11, "per_device_eval_batch_size": 4}
    run = trainer(model, tmp_path, max_steps=1, learning_rate=0.1, warmup_steps=0, **settings)
    run.train()
    assert next(log["loss"] for log in run.state.log_history if "loss" in log) == pytest.approx(smoothed, rel=1e-5)
    trained, _ = by_hand(model.eval(), 0.3)
    assert trained != pytest.approx(smoothed, rel=1e-3)
    assert run.evaluate()["eval_loss"] == pytest.approx(trained, rel=1e-5)


@BUILDS
def test_the_best_model_is_loaded_where_it_is_not_the_last(build, tmp_path):
    scores = iter([0.1, 0.9, 0.5])
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "score"}
    model = build()
    run = trainer(model, tmp_path, greater_is_better=True, **best)
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-4"
    found = get_peft_model_state_dict(model)
    saved = [load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, STEPS)]
    assert same_state(found, saved[0]) and not same_state(found, saved[1])


def shorten(checkpoint):
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def unfinished(checkpoint):
    """Leave a checkpoint as a run does that is killed while it saves."""
    shorten(checkpoint)
    (checkpoint / MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage, why", [(shorten, "adapter_model.safetensors has"), (unfinished, "manifest.json cannot")]
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(damage, why, tmp_path, capsys):
    straight, resumed = stacked(), stacked()
    trainer(straight, tmp_path / "straight").train()
    folder = tmp_path / "resumed"

    def start(model):
        run = trainer(model, folder)
        run.add_callback(Manifests())
        return run

    run = start(stacked())
    assert last_sound(PartialState(), folder) is None
    run.add_callback(Stop(4))
    run.train()
    assert last_sound(PartialState(), folder) == folder / "checkpoint-4"
    damage(folder / "checkpoint-4")
    run = start(resumed)
    sound = last_sound(PartialState(), folder)
    assert sound == folder / "checkpoint-2"
    assert f"checkpoint-4/{why}" in capsys.readouterr().out
    run.train(resume_from_checkpoint=sound)
    assert run.state.global_step == STEPS
    assert same_state(state_of(resumed), state_of(straight))
    assert not any(what_is_wrong(path) for path in checkpoints(folder)) and len(checkpoints(folder)) == 3


@BUILDS
def test_the_trainer_compiles(build, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # inductor takes a minute
    plain, compiled = (build(dropout=0.0, layers=1) for _ in range(2))
    trainer(plain, tmp_path / "plain", max_steps=2).train()
    assert not counters["stats"]["unique_graphs"]
    trainer(compiled, tmp_path / "compiled", max_steps=2, **compiling).train()
    assert counters["stats"]["unique_graphs"] > 0
    found, expected = ({n: p.detach() for n, p in m.named_parameters()} for m in (compiled, plain))
    assert largest_difference(found, expected) < 1e-3
    saved = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=1), tmp_path / "compiled" / "checkpoint-2")
    torch.testing.assert_close(forward(saved.eval(), images()), forward(compiled.eval(), images()))


# Compiled by hand


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@BUILDS
def test_batches_of_many_sizes_are_compiled_once(build):
    torch._dynamo.reset()
    counter = Counter()
    model = build(dropout=0.0, layers=1, grad_input_rank=3).train()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5):
        x = images(batch)
        expected = gradients(model, x)
        model.zero_grad()
        torch._dynamo.mark_dynamic(x, 0)
        logits = forward(compiled, x)
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
        (logits - goal).square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert largest_difference(found, expected) < 1e-4
    assert counter.graphs == 1


# Mixed precision


def error(model, x, expected, autocast):
    with autocast:
        found = gradients(model, x)
    for each in (found, expected):  # the gradient of k_proj's bias consists of rounding errors
        for name in [n for n in each if "k_proj" in n and "bias" in n]:
            del each[name]
    return sum((found[n] - expected[n]).norm() for n in found) / sum(e.norm() for e in expected.values())


@pytest.mark.parametrize("settings", [{}, {"grad_input_rank": 6}])
@BUILDS
def test_bf16_autocast_rounds_no_more_than_without_the_adapter(build, settings):
    """Both are compared with themselves in float32."""
    x = images(4)
    model = build(dropout=0.0, **settings).train()
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    low_rank = error(model, x, gradients(model, x), autocast())
    with exact_backward(model):
        exact = error(model, x, gradients(model, x), autocast())
    assert 0 < low_rank < 1.5 * exact
    assert exact < 0.1


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BUILDS
def test_mixed_precision_on_a_gpu(build, dtype):
    x = images(4).cuda()
    model = build(dropout=0.0).cuda().train()
    autocast = functools.partial(torch.autocast, "cuda", dtype)
    low_rank = error(model, x, gradients(model, x), autocast())
    with exact_backward(model):
        exact = error(model, x, gradients(model, x), autocast())
    assert 0 < low_rank < 1.5 * exact


@needs_gpu
@BUILDS
def test_the_trainer_scales_the_loss_in_fp16(build, tmp_path):
    straight, resumed = build(), build()
    trainer(straight, tmp_path / "straight", fp16=True, use_cpu=False).train()
    interrupted = trainer(build(), tmp_path / "resumed", fp16=True, use_cpu=False)
    interrupted.add_callback(Stop(4))
    interrupted.train()
    trainer(resumed, tmp_path / "resumed", fp16=True, use_cpu=False).train(resume_from_checkpoint=True)
    found, expected = ({n: p.detach() for n, p in m.named_parameters()} for m in (resumed, straight))
    assert largest_difference(found, expected) < 1e-2
    assert all(p.isfinite().all() for p in found.values())
