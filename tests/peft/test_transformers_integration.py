"""transformers' own adapter methods, and its Trainer."""

import inspect
import os

import pytest
import torch
from models import (
    disturb,
    gradients,
    images,
    largest_difference,
    layers_of,
    outputs,
    state_of,
    tiny_vit,
    train,
    with_transformers_own_adapters,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification

from lbp_peft import LBPWHTConfig, layout_report

restores_modules_to_save = pytest.mark.skipif(
    "AuxiliaryTrainingWrapper" not in inspect.getsource(ViTForImageClassification.load_adapter),
    reason="this transformers' own load_adapter does not restore modules_to_save",
)


def config(**changes):
    return LBPWHTConfig(**({"r": 3, "modules_to_save": ["classifier"]} | changes))


def with_adapter(**changes):
    model = tiny_vit()
    model.add_adapter(config(**changes))
    return model


def low_rank(model) -> bool:
    ran = layout_report(model).layers
    return len(ran) == 12 and all(r is not None and not r.why_exact and r.layout.grid == (8, 8) for r in ran.values())


@with_transformers_own_adapters
def test_adding_an_adapter_changes_no_output_and_trains_low_rank():
    model, x = with_adapter(), images()
    assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
    found = gradients(model.train(), x)
    assert low_rank(model)
    expected = gradients(get_peft_model(tiny_vit(), config()).train(), x)
    assert largest_difference({f"base_model.model.{n}": g for n, g in found.items()}, expected) == 0
    losses = train(model, x)
    assert losses[-1] < losses[0]


@with_transformers_own_adapters
@restores_modules_to_save
@pytest.mark.parametrize("low_memory", [False, True])
def test_adapters_are_saved_and_loaded(low_memory, tmp_path):
    model, x = with_adapter(), images()
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_vit().save_pretrained(tmp_path / "base")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "adapter"))
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"), low_cpu_mem_usage=low_memory)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "lbpwht" in n)


@with_transformers_own_adapters
@restores_modules_to_save
def test_a_loaded_adapter_is_trained_on(tmp_path):
    model, x = with_adapter(), images()
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = tiny_vit()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert train(loaded, x) == train(model, x)
    assert low_rank(loaded)


@with_transformers_own_adapters
@restores_modules_to_save
def test_from_pretrained_of_an_adapter_folder(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(config())
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "adapter")
    assert len(layers_of(loaded)) == 12
    assert torch.equal(outputs(loaded, images()), outputs(model, images()))


@with_transformers_own_adapters
@restores_modules_to_save
def test_checkpoints_are_interchangeable_with_peft(tmp_path):
    x = images()
    injected = with_adapter()
    disturb(injected)
    injected.save_pretrained(tmp_path / "transformers")
    wrapped = PeftModel.from_pretrained(tiny_vit(), tmp_path / "transformers")
    assert torch.equal(outputs(wrapped, x), outputs(injected, x))
    wrapped.save_pretrained(tmp_path / "peft")
    again = tiny_vit()
    again.load_adapter(str(tmp_path / "peft"), adapter_name="other")
    assert torch.equal(outputs(again, x), outputs(injected, x))


@with_transformers_own_adapters
def test_switching_disabling_and_deleting():
    model, x = with_adapter(), images()
    base = outputs(model, x)
    model.add_adapter(config(), adapter_name="second")
    disturb(model, "default", seed=5)
    disturb(model, "second", seed=6)
    assert model.active_adapters() == ["second"]
    second = outputs(model, x)
    model.set_adapter("default")
    first = outputs(model, x)
    assert not torch.equal(first, second)
    model.disable_adapters()
    assert torch.equal(outputs(model, x), base)
    model.enable_adapters()
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not any("second" in name for name in model.state_dict())


@with_transformers_own_adapters
def test_enabling_brings_the_adapter_back():
    model, x = with_adapter(modules_to_save=None), images()
    disturb(model)
    expected = outputs(model, x)
    model.disable_adapters()
    assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
    model.enable_adapters()
    assert torch.equal(outputs(model, x), expected)


@with_transformers_own_adapters
def test_deleting_the_last_adapter_and_adding_another():
    model, x = with_adapter(), images()
    disturb(model)
    model.delete_adapter("default")
    assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
    model.add_adapter(config(r=6))
    assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
    gradients(model.train(), x)
    assert low_rank(model)
    assert {ran.grad_weight_rows for ran in layout_report(model).layers.values()} == {7}


@with_transformers_own_adapters
def test_state_of_the_adapter():
    model = with_adapter()
    state = model.get_adapter_state_dict()
    assert len(state) == 26 and all("lbpwht_" in name or "classifier" in name for name in state)


@with_transformers_own_adapters
def test_an_incomplete_checkpoint_is_not_loaded_silently(tmp_path, caplog):
    model = with_adapter(modules_to_save=None)
    disturb(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("lbpwht_bias"))
    del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = tiny_vit()
    # transformers loads by a path of its own, which reports what is missing instead of refusing.
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        loaded.load_adapter(str(tmp_path))
    except ValueError as error:
        assert "lbpwht_bias" in str(error)
    else:
        assert "lbpwht_bias" in caplog.text
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(verbosity)
    assert all(torch.isfinite(t).all() for t in state_of(loaded).values())


# Trainer


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5}


def trainer(model, folder, evaluated=None, **changes):
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": [],
        "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True, "seed": 0, "remove_unused_columns": False,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(str(folder), **(settings | changes)), train_dataset=Images(), eval_dataset=evaluated
    )


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2


def test_the_trainer_saves_resumes_and_loads(tmp_path):
    straight = get_peft_model(tiny_vit(), config())
    trainer(straight, tmp_path / "straight").train()
    assert low_rank(straight)

    interrupted = trainer(get_peft_model(tiny_vit(), config()), tmp_path / "resumed")
    interrupted.add_callback(Stop())
    interrupted.train()
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(checkpoint))
    assert not {"model.safetensors", "pytorch_model.bin"} & set(os.listdir(checkpoint))

    resumed = get_peft_model(tiny_vit(), config())
    run = trainer(resumed, tmp_path / "resumed")
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 4
    for name, parameter in straight.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert not torch.equal(outputs(resumed, images()), outputs(tiny_vit(), images()))

    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "resumed" / "checkpoint-4")
    assert torch.equal(outputs(loaded, images()), outputs(resumed, images()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainer_with_gradient_checkpointing_and_accumulation(reentrant, tmp_path):
    plain = get_peft_model(tiny_vit(), config())
    trainer(plain, tmp_path / "plain", gradient_accumulation_steps=2, max_steps=2).train()
    model = get_peft_model(tiny_vit(), config())
    run = trainer(
        model, tmp_path / "checkpointed", gradient_accumulation_steps=2, max_steps=2, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    if reentrant:
        model.enable_input_require_grads()
    run.train()
    assert low_rank(model)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_the_trainer_loads_the_best_model_at_the_end(tmp_path):
    model = get_peft_model(tiny_vit(), config())
    run = trainer(
        model, tmp_path, Images(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="loss", label_names=["labels"],
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    loaded = PeftModel.from_pretrained(tiny_vit(), best)
    assert torch.equal(outputs(loaded, images()), outputs(model, images()))


def stack():
    return config(train_base_weight=False, modules_to_save=None, stack_on=LoraConfig(target_modules=["q_proj"]))


REMEDY = r"a stack, LBP-WHT on LORA .*PeftModel\.from_pretrained.*get_peft_model.*stacked_on\.save_pretrained"


def test_load_adapter_says_how_to_load_a_stack(tmp_path):
    get_peft_model(tiny_vit(), stack()).save_pretrained(tmp_path / "stack")
    with pytest.raises(ValueError, match=REMEDY):
        tiny_vit().load_adapter(str(tmp_path / "stack"))


@with_transformers_own_adapters
def test_add_adapter_says_how_to_make_a_stack():
    with pytest.raises(ValueError, match=REMEDY):
        tiny_vit().add_adapter(stack())


@restores_modules_to_save
def test_what_peft_saved_is_loaded_and_trained_on(tmp_path):
    """This also works with transformers 5.24, whose other methods for adapters refuse this peft."""
    model, x = get_peft_model(tiny_vit(), config()), images()
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = tiny_vit()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert train(loaded, x) == train(model, x)
    assert low_rank(loaded)
