"""transformers' Trainer to the last bit, with LBP-WHT and on top of LoRA; mixed precision; compiled training."""

import functools

import pytest
import torch
from models import forward, gradients, images, largest_difference, same_state, state_of, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainingArguments

from lbp_peft import LBPWHTConfig, exact_backward, layout_report

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
    """Eleven, so that the last batch of an epoch is a small one."""

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
    """With dropout, a warm-up, label smoothing and a last batch that is smaller."""
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


@BUILDS
def test_the_trainer_compiles(build, tmp_path):
    torch._dynamo.reset()
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # inductor takes a minute
    plain, compiled = (build(dropout=0.0, layers=1) for _ in range(2))
    trainer(plain, tmp_path / "plain", max_steps=2).train()
    trainer(compiled, tmp_path / "compiled", max_steps=2, **compiling).train()
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
    model = build(dropout=0.0, layers=1, grad_input=3).train()
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
    for each in (found, expected):  # of k_proj's bias there is nothing but rounding
        for name in [n for n in each if "k_proj" in n and "bias" in n]:
            del each[name]
    return sum((found[n] - expected[n]).norm() for n in found) / sum(e.norm() for e in expected.values())


@pytest.mark.parametrize("settings", [{}, {"grad_input": 6}])
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
