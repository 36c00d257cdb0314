"""Linear layers by other names: transformers' Conv1D, whose weight is transposed, and nn.Conv1d with kernel 1."""

import copy

import pytest
import reference
import torch
from mixers import Mixer
from models import images, largest_difference, layers_of, outputs, train
from peft import LoraConfig, PeftModel, get_peft_model

from lbp_peft import LBPWHTConfig, exact_backward, layout_report

KINDS = ["Conv1D", "Conv1d"]
X = images(2, 32, 48)


def gradients(model):
    model.train().zero_grad()
    model(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_references(kind):
    model = get_peft_model(Mixer(kind).double(), LBPWHTConfig(r=3)).train()  # None, so all of the blocks
    assert len(layers_of(model)) == 4
    layer = next(iter(layers_of(model).values()))
    seen = {}
    layer.register_forward_hook(lambda m, args, y: seen.update(x=args[0].detach(), y=y))
    y = model(X.double())
    seen["y"].register_hook(lambda g: seen.update(grad=g))
    y.square().sum().backward()
    x, grad = seen["x"], seen["grad"]
    if kind == "Conv1d":
        x, grad = x.transpose(1, 2), grad.transpose(1, 2)
    weight = layer.lbpwht_weight["default"]
    matrix = weight.detach().squeeze(-1) if kind == "Conv1d" else weight.detach().t()
    expected, _ = reference.orthogonal_gradients(x, matrix, grad, (8, 12), 0, 3, None)
    found = weight.grad.squeeze(-1) if kind == "Conv1d" else weight.grad.t()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.lbpwht_bias["default"].grad, grad.sum((0, 1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_exact_backpropagation(kind):
    model = get_peft_model(Mixer(kind), LBPWHTConfig(r=64, grad_input_rank=64))
    low = gradients(model)
    with exact_backward(model):
        assert largest_difference(low, gradients(model)) < 1e-5
    other = get_peft_model(Mixer(kind), LBPWHTConfig(r=3, grad_input_rank=3))
    assert largest_difference(gradients(other), low) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_peft_behaviours(kind, tmp_path):
    model = get_peft_model(Mixer(kind), LBPWHTConfig(r=3, grad_input_rank=3, modules_to_save=["head"]))
    assert torch.equal(outputs(model, X), outputs(Mixer(kind), X))
    losses = train(model, X, 5)
    assert losses[-1] < losses[0]
    assert {ran.layout.grid for ran in layout_report(model).layers.values()} == {(8, 12)}
    expected = outputs(model, X)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(Mixer(kind), tmp_path), X), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, X), outputs(Mixer(kind), X))
    model.merge_adapter()
    assert torch.equal(outputs(model, X), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged, X), expected)
    assert type(merged.blocks[0]["fc1"]) is type(Mixer(kind).blocks[0]["fc1"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [3, 64])
def test_under_lora(kind, rank):
    lora = LoraConfig(r=2, target_modules=["fc1", "fc2"], fan_in_fan_out=kind == "Conv1D", init_lora_weights=False)
    plain = get_peft_model(Mixer(kind), lora)
    exact = gradients(copy.deepcopy(plain))
    model = get_peft_model(plain, LBPWHTConfig(r=rank, grad_input_rank=rank, train_base_weight=False))
    assert torch.equal(outputs(model, X), outputs(copy.deepcopy(plain), X))
    found = {name.removeprefix("base_model.model."): gradient for name, gradient in gradients(model).items()}
    exact = {name.removeprefix("base_model.model."): gradient for name, gradient in exact.items()}
    difference = largest_difference(found, exact)
    if rank == 64:
        assert difference < 1e-5
    else:
        assert difference > 1e-2 and not layout_report(model).exact
