"""Layers of a text tower that are named as targets: bases are one-dimensional, and padding is left out."""

import shutil
import warnings

import pytest
import torch
import transformers
from models import images, input_gradient, largest_difference
from peft import LoraConfig, get_peft_model
from torch import nn

from lbp_peft import LBPWHTConfig, exact_backward, layout_report

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LENGTH = 24


def clip():
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 60, "max_position_embeddings": LENGTH, "bos_token_id": 57, "eos_token_id": 58}
    config = transformers.CLIPConfig(
        vision_config=SIZE | {"image_size": 32, "patch_size": 4},
        text_config=SIZE | vocabulary | {"pad_token_id": 59},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def words(padding=59, lengths=(11, LENGTH)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 57, (len(lengths), LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = 58
    return {"input_ids": ids.where(mask, padding), "attention_mask": mask.long()}


def adapted(model=None, **settings):
    settings = {"r": 3, "target_modules": ["fc1", "fc2", "q_proj"]} | settings
    return get_peft_model(model or clip(), LBPWHTConfig(**settings)).train()


def gradients(model, **inputs):
    model.zero_grad()
    output = model(pixel_values=images(), **inputs)
    (output.text_embeds @ torch.arange(16.0) + output.image_embeds.sum()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_text_is_left_alone_unless_it_is_named():
    model = adapted(target_modules=None)
    gradients(model, **words())
    assert all("vision_model" in name for name in layout_report(model).layers)


def test_a_report_says_from_which_words_a_layer_was_followed():
    model = adapted()
    gradients(model, **words())
    for name, ran in layout_report(model).layers.items():
        origin = "input_ids" if "text_model" in name else "vision_model.embeddings.patch_embedding"
        assert ran.known_by.startswith(f"followed from {origin} through ")


def test_text_layers_are_one_dimensional():
    model = adapted()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exact backpropagation")
        gradients(model, **words())
    ran = layout_report(model).layers
    assert {r.layout.grid for name, r in ran.items() if "text_model" in name} == {(1, LENGTH)}
    assert {r.grad_weight_rows for name, r in ran.items() if "text_model" in name} == {3}
    assert {r.layout.grid for name, r in ran.items() if "vision_model" in name} == {(8, 8)}


def test_a_grid_given_by_hand_is_that_of_the_images():
    model = adapted(grid_size=(8, 8), num_prefix_tokens=1)
    gradients(model, **words())
    assert {r.layout.grid for r in layout_report(model).layers.values()} == {(1, LENGTH), (8, 8)}


@pytest.mark.parametrize("grad_input", ["full", 3])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_stands_in_the_padding_does_not_matter(grad_input, stacked):
    settings = input_gradient(grad_input)
    if stacked:
        lora = LoraConfig(r=2, target_modules=["fc1", "fc2", "q_proj"], init_lora_weights=False)
        settings |= {"stack_on": lora, "train_base_weight": False, "target_modules": None}
    model = adapted(**settings)
    first, second = (gradients(model, **words(padding)) for padding in (59, 7))
    assert len(first) >= 6 and largest_difference(first, second) < 1e-5

    # The result without the mask, which shows that the mask makes the difference.
    text = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("text_model")))
    finder = next(m.finder for m in text.modules() if hasattr(m, "finder"))
    finder.padding_mask = lambda *_: None
    first, second = (gradients(model, **words(padding)) for padding in (59, 7))
    assert largest_difference(first, second) > 1e-3


def test_at_full_rank_the_gradients_are_exact():
    model = adapted(r=64, grad_input_rank=64)
    low = gradients(model, **words())
    with exact_backward(model):
        assert largest_difference(low, gradients(model, **words())) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_finds_each_mask_again(reentrant):
    def of_two_passes(model):
        model.zero_grad()
        outputs = [model(pixel_values=images(), **words(lengths=lengths)) for lengths in ((11, 9), (5, 6))]
        sum(output.text_embeds.sum() for output in outputs).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = adapted(grad_input_rank=3)
    expected, of_two = gradients(model, **words()), of_two_passes(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert largest_difference(gradients(model, **words()), expected) < 1e-5
    assert largest_difference(of_two_passes(model), of_two) < 1e-5


def test_hooks_go_with_the_adapter():
    model = adapted()
    base = model.unload()
    assert not any(module._forward_pre_hooks for module in base.modules())


class Words(nn.Module):
    """A model that takes the mean over tokens, with or without the padding."""

    def __init__(self, counts):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(16, 16), "fc2": nn.Linear(16, 16)}) for _ in "ab")
        self.counts = counts

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["fc2"](torch.tanh(layer["fc1"](x)))
        return x.mean(1) if self.counts else (x * attention_mask[..., None]).sum(1)


def of_words(counts, compiled, backend="aot_eager", **settings):
    torch._dynamo.reset()
    settings = {"r": 3, "target_modules": ["fc1", "fc2"]} | settings
    model = get_peft_model(Words(counts), LBPWHTConfig(**settings)).train()
    if compiled:
        model.base_model.model.compile(backend=backend, fullgraph=True)
    model(**words()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


STACKED = {"stack_on": LoraConfig(r=2, target_modules=["fc1", "fc2"])}


@pytest.mark.parametrize(
    "backend, settings",
    [(None, {}), (None, {"grad_input_rank": 3}), (None, STACKED), ("eager", {}), ("aot_eager", {"grad_input_rank": 3}),
     ("aot_eager", STACKED)],
)  # fmt: skip
def test_a_loss_that_depends_on_padding_is_refused_compiled_or_not(backend, settings):
    settings = settings | {"train_base_weight": False, "target_modules": None} if "stack_on" in settings else settings
    message = "attention_mask calls padding have a gradient.*Pass no attention_mask.*exclude_modules"
    with pytest.raises(RuntimeError, match=message):
        of_words(True, backend is not None, backend, **settings)
    found = of_words(False, backend is not None, backend, **settings)
    assert found and largest_difference(found, of_words(False, False, **settings)) < 1e-5


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_does_not_drop_the_check():
    with pytest.raises(RuntimeError, match="attention_mask calls padding have a gradient"):
        of_words(True, True, "inductor")
