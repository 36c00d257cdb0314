"""Query, key and value of one attention module are projected once; nothing else shares a projection."""

import pytest
import torch
from models import gradients, images, input_gradient, largest_difference, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn

from lbp_peft import LBPWHTConfig
from lbp_peft.projection import SeparableProjection


@pytest.fixture
def projected(monkeypatch, decide):
    """The tensors that forward passes project, in order."""
    seen, project = [], SeparableProjection.project

    def noted(self, tokens):
        if torch._C._current_graph_task_id() == -1:
            seen.append(tokens)
        return project(self, tokens)

    decide(use_dense_projection=False)
    monkeypatch.setattr(SeparableProjection, "project", noted)
    return seen


def adapted(base=tiny_vit, **settings):
    return get_peft_model(base(), LBPWHTConfig(**({"r": 3} | input_gradient(3) | settings))).train()


LORA = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], init_lora_weights=False)


@pytest.mark.parametrize("settings", [{}, {"stack_on": LORA, "train_base_weight": False}])
def test_a_block_projects_four_inputs_of_six_layers(settings, projected):
    model = adapted(**settings)
    found = gradients(model, images())
    assert len(projected) == 2 * 4
    # The same gradients where each layer projects its own.
    for module in model.modules():
        if hasattr(module, "low_rank_backward") and not isinstance(module.low_rank_backward, nn.Module):
            delattr(module, "low_rank_backward")
            module.__class__ = type(module).plain_class
    projected.clear()
    assert largest_difference(gradients(model, images()), found) == 0
    assert len(projected) == 2 * 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing_too(reentrant, projected):
    model = adapted()
    expected = gradients(model, images())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert largest_difference(gradients(model, images()), expected) < 1e-6


class Attention(nn.Module):
    """A product of three layers with the same input, which fails on request."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers(nn.Linear(12, 12) for _ in range(3))
        self.fails = False

    def forward(self, x):
        q, k, v = (layer(x) for layer in self.layers)
        if self.fails:
            raise KeyError
        return q * k + v


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Attention(nn.ModuleList) for _ in range(1))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def of_blocks(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_layers_in_a_list_belong_to_the_module_around_it(projected):
    model = adapted(Blocks, grid_size=(8, 8), num_prefix_tokens=0)
    of_blocks(model, torch.randn(2, 64, 12))
    assert len(projected) == 1


def test_one_input_changed_past_its_version_counter_between_two_passes(projected):
    """A buffer into which batches are copied through NumPy is such an input."""
    model = adapted(Blocks, grid_size=(8, 8), num_prefix_tokens=0)
    buffer, new = torch.randn(2, 64, 12), torch.randn(2, 64, 12)
    kept = model(buffer)  # the graph stays alive
    buffer.numpy()[...] = new.numpy()
    found = of_blocks(model, buffer)
    assert kept.requires_grad
    assert largest_difference(found, of_blocks(model, new.clone())) == 0


def test_a_pass_that_fails_leaves_nothing_behind(projected):
    model = adapted(Blocks, grid_size=(8, 8), num_prefix_tokens=0)
    x, new = torch.randn(2, 64, 12), torch.randn(2, 64, 12)
    block = model.base_model.model.blocks[0]
    block.fails = True
    with pytest.raises(KeyError):
        model(x)
    block.fails = False
    x.data.copy_(new)
    assert largest_difference(of_blocks(model, x), of_blocks(model, new)) == 0
