"""The first steps of training can be exact: in transformers' Trainer, in the examples, and in a loop of one's own."""

import contextlib

import pytest
import torch
from models import forward, images, same_state, state_of, tiny_vit
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from lbp_peft import ExactWarmUpCallback, LBPWHTConfig, exact_backward


class Images(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5}


def low_rank():
    torch.manual_seed(0)
    return get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_rank=3, modules_to_save=["classifier"]))


def trained(folder, steps, callbacks, resume=False, **settings):
    model = low_rank()
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="steps", save_steps=1, lr_scheduler_type="constant", seed=0, **settings,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks).train(resume_from_checkpoint=resume)
    return state_of(model)


class FirstTwo(ExactWarmUpCallback):
    """The same, written out by hand: the reference."""

    def __init__(self):
        self.number, self.block = 0, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.number += 1
        self.block = exact_backward(kwargs["model"]) if self.number <= 2 else contextlib.nullcontext()
        self.block.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.block.__exit__(None, None, None)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}], ids=str
)
def test_the_trainers_first_steps_are_exact_also_when_it_is_resumed(tmp_path, settings):
    expected = trained(tmp_path / "expected", 3, [FirstTwo()], **settings)
    found = trained(tmp_path / "found", 3, [ExactWarmUpCallback(steps=2)], **settings)
    assert same_state(found, expected)
    for steps in (1, 3):
        other = trained(tmp_path / f"{steps}", 3, [ExactWarmUpCallback(steps=steps)], **settings)
        assert not same_state(other, expected)
    trained(tmp_path / "resumed", 1, [ExactWarmUpCallback(steps=2)], **settings)
    resumed = trained(tmp_path / "resumed", 3, [ExactWarmUpCallback(steps=2)], resume=True, **settings)
    assert same_state(resumed, expected)


def test_a_step_that_failed_leaves_nothing_behind(tmp_path):
    callback, model = ExactWarmUpCallback(steps=1), low_rank()
    expected = gradients(model)

    class State:
        global_step = 0

    callback.on_step_begin(None, State, None, model=model)
    assert not same_state(gradients(model), expected)
    State.global_step = 1
    callback.on_step_begin(None, State, None, model=model)
    assert same_state(gradients(model), expected)


def gradients(model):
    model.zero_grad()
    forward(model, images(2)).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_pass_is_exact_although_its_backward_pass_comes_after_the_block(reentrant):
    model = low_rank().train()
    with exact_backward(model):
        expected = gradients(model)
    low = gradients(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with exact_backward(model):
        output = forward(model, images(2))
    model.zero_grad()
    output.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(torch.allclose(found[name], grad, atol=1e-6) for name, grad in expected.items())
    assert not all(torch.allclose(found[name], grad, atol=1e-6) for name, grad in low.items())


@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", True, None])
def test_steps_must_be_a_number(steps):
    with pytest.raises(ValueError, match="steps"):
        ExactWarmUpCallback(steps)


def test_a_model_without_lbp_wht_is_trained_with_one_warning():
    class State:
        global_step = 0

    callback = ExactWarmUpCallback(steps=2)
    with pytest.warns(UserWarning, match="no LBP-WHT layers") as caught:
        for _ in range(2):
            callback.on_step_begin(None, State, None, model=tiny_vit())
            callback.on_step_end(None, State, None)
    assert len(caught) == 1
