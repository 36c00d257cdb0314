"""The callback measures what the Trainer trains, and leaves no trace."""

import pytest
import torch
from models import images, same_state, state_of, tiny_vit
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module

from lbp_peft import LBPWHTCallback, LBPWHTConfig, gradient_quality


class Noisy(Dataset):
    """A data set that draws global random numbers, as augmentation does."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0] + 0.1 * torch.randn(3, 32, 32), "labels": index % 5}


class Normed(nn.Module):
    """A model with batch norm's buffers and dropout around a ViT."""

    def __init__(self, vit):
        super().__init__()
        self.norm, self.vit = nn.BatchNorm2d(3), vit

    def forward(self, pixel_values, labels):
        return self.vit(pixel_values=self.norm(pixel_values), labels=labels)


def trained(tmp_path, callback=None, model=None, **settings):
    torch.manual_seed(0)
    vit = tiny_vit(hidden_dropout_prob=0.1)
    if model is None:
        config = LBPWHTConfig(r=3, grad_input_rank=3, modules_to_save=["classifier"])
        model = Normed(get_peft_model(vit, config))
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    callbacks = [callback] if callback else []
    trainer = Trainer(model, arguments, train_dataset=Noisy(), callbacks=callbacks)
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=str)
def test_training_is_the_same_to_the_last_bit(tmp_path, settings):
    plain, _ = trained(tmp_path, **settings)
    callback = LBPWHTCallback(every=2, min_cosine=0.0)
    watched, trainer = trained(tmp_path, callback, **settings)
    assert same_state(state_of(watched), state_of(plain))
    assert not watched._forward_pre_hooks
    assert [step for step, _ in callback.history] == [1, 3]
    assert all(0 < quality.cosine <= 1 for _, quality in callback.history)
    logged = [entry for entry in trainer.state.log_history if "lbp_wht/gradient_cosine" in entry]
    assert {entry["step"] for entry in logged} >= {1, 3}
    assert all(entry["lbp_wht/peak_memory_mib"] > 10 for entry in logged)


def test_its_values_reach_trackers_which_come_before_it(tmp_path, monkeypatch):
    """The trackers of report_to do so, and the trainer's own logs are the same as without it."""

    class Tracker(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.seen.append((state.global_step, set(logs)))

    tracker, after = Tracker(), LBPWHTCallback(every=1, min_cosine=0.0)
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*trainer_module.DEFAULT_CALLBACKS, tracker])
    trained(tmp_path, after)
    own = {"lbp_wht/gradient_cosine", "lbp_wht/gradient_norm_ratio", "lbp_wht/peak_memory_mib", "epoch"}
    assert [step for step, names in tracker.seen if names == own] == [1, 2, 3]
    assert [step for step, names in tracker.seen if "loss" in names] == [2]


def test_it_warns_once_of_poor_gradients_and_names_the_worst(tmp_path):
    with pytest.warns(UserWarning, match="below 1. The worst is that of") as caught:
        trained(tmp_path, LBPWHTCallback(every=1, min_cosine=1.0))
    assert sum("below 1" in str(one.message) for one in caught) == 1


def test_a_model_without_lbp_wht_is_trained_with_a_warning(tmp_path):
    callback = LBPWHTCallback(every=1)
    with pytest.warns(UserWarning, match="no LBP-WHT layers"):
        trained(tmp_path, callback, model=tiny_vit())
    assert not callback.history


@pytest.mark.parametrize(
    "bad", [{"every": 0}, {"every": 1.5}, {"every": "a"}, {"min_cosine": 1.5}, {"min_cosine": "b"}], ids=str
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LBPWHTCallback(**bad)


def test_the_values_are_those_of_gradient_quality(tmp_path):
    """There is no dropout, and a learning rate of 0 keeps the weights the same."""
    callback = LBPWHTCallback(every=4, min_cosine=0.0)
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_rank=3, modules_to_save=["classifier"]))
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trained(tmp_path, callback, model=model, learning_rate=0.0)
    ((step, quality),) = callback.history
    assert step == 1 and quality.cosine == pytest.approx(gradient_quality(model, seen[0]).cosine, abs=1e-6)
