"""Convolutions with kernel 1 have the gradients of the float64 reference, and behave as PEFT's layers do."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from mixers import ConvMLP
from models import gradients, images, largest_difference, layers_of, outputs, train
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from plans import plan_of
from torch import nn

from lbp_peft import BasisSet, LBPWHTConfig, layout_report
from lbp_peft.formats.products import Precision
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv
from lbp_peft.tuner.layers.conv1x1 import LBPWHTPointwiseConv


def bases(rank):
    return None if rank is None else BasisSet(rank)


def problem(grid, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *grid, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(4, 6, 1, 1, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, bias, torch.randn(2, 4, *grid, generator=generator, dtype=torch.float64).to(dtype)


def tokens(image):
    return image.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ranks", [(3, 3), (10, None), (10, 3), (3, 21), (None, 6), (64, 64)])
@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (14, 14), (7, 7), (4, 12), (5, 21), (24, 40)])
@pytest.mark.usefixtures("way")
def test_gradients_are_the_references(grid, ranks, memory_format):
    x, weight, bias, grad = problem(grid)
    inner = x.contiguous(memory_format=memory_format)
    y = low_rank_pointwise_conv(inner, weight, bias, plan=plan_of(None, *map(bases, ranks)))
    assert torch.equal(y, F.conv2d(inner, weight, bias))
    found = torch.autograd.grad(y, (weight, x, bias), grad.contiguous(memory_format=memory_format))
    r, r_input = ranks
    expected_weight, expected_x = reference.orthogonal_gradients(
        tokens(x.detach()), weight.detach().flatten(1), tokens(grad), grid, 0, r or 64, r_input
    )
    torch.testing.assert_close(found[0].flatten(1), expected_weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tokens(found[1]), expected_x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2], grad.sum((0, 2, 3)))


def test_under_autocast_and_in_second_order():
    x, weight, bias, grad = problem((8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_pointwise_conv(x, weight, bias, plan=plan_of(None, BasisSet(10), BasisSet(10)))
        assert torch.equal(y, F.conv2d(x, weight, bias))
    found = torch.autograd.grad(y, (x, weight, bias), grad.bfloat16())
    assert all(g.dtype == torch.float32 for g in found)
    y = low_rank_pointwise_conv(x, weight, bias, plan=plan_of(None, BasisSet(3)))
    (first,) = torch.autograd.grad(y, weight, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("ranks", [(3, None), (3, 3)])
def test_an_empty_batch_has_gradients_of_zero(ranks, precision):
    x, weight, bias, _ = problem((8, 8), torch.float32)
    x = x.detach()[:0].requires_grad_()
    y = low_rank_pointwise_conv(x, weight, bias, plan=plan_of(None, *map(bases, ranks), precision=Precision(precision)))
    found = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert found[0].shape == x.shape and not any(g.count_nonzero() for g in found)


def base():
    torch.manual_seed(0)
    return ConvMLP()


TARGETS = {"target_modules": ["fc1", "fc2"], "modules_to_save": ["head"]}
X = images(2, 32, 48)


def test_the_layer_in_a_model(tmp_path):
    model = get_peft_model(base(), LBPWHTConfig(r=3, grad_input_rank=3, **TARGETS))
    assert torch.equal(outputs(model, X), outputs(base(), X))
    losses = train(model, X, 5)
    assert losses[-1] < losses[0]
    report = layout_report(model)
    assert len(report.layers) == 4 and not report.exact
    assert {ran.layout.grid for ran in report.layers.values()} == {(8, 12)}
    expected = outputs(model, X)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path), X), expected)
    model.merge_adapter()
    assert torch.equal(outputs(model, X), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, X), outputs(base(), X))
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged, X), expected) and type(merged.blocks[0]["fc1"]) is nn.Conv2d


@pytest.mark.parametrize("rank, same", [(64, True), (36, False)])
def test_full_rank_is_exact_backpropagation(rank, same):
    plain = base().train()
    plain(X).square().sum().backward()
    model = get_peft_model(base(), LBPWHTConfig(r=rank, grad_input_rank=rank, **TARGETS)).train()
    model(X).square().sum().backward()
    for name, layer in layers_of(model).items():
        if not same and "blocks.1" in name:  # behind it is the mean over pixels: a constant, which any rank keeps
            continue
        expected = plain.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        difference = (layer.lbpwht_weight["default"].grad - expected).norm() / expected.norm()
        assert difference < 1e-5 if same else 1e-3 < difference < 1, (name, difference)


def test_other_convolutions_are_refused():
    for targets in (["mix"], ["stem"]):
        with pytest.raises(TypeError, match=r"Conv2d \(.*kernel_size=.*kernel 1, stride 1 and one group"):
            get_peft_model(base(), LBPWHTConfig(target_modules=targets))


def test_strided_and_grouped_ones_are_refused():
    for layer in (nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1)):
        with pytest.raises(TypeError, match="does not support"):
            get_peft_model(nn.Sequential(layer, nn.ReLU()), LBPWHTConfig(target_modules=["0"]))


def test_stacked_on_lora_it_makes_the_input_gradient_cheap():
    lora = get_peft_model(base(), LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["head"]))
    model = get_peft_model(lora, LBPWHTConfig(r=3, grad_input_rank=3, train_base_weight=False, target_modules=["fc2"]))
    assert all(isinstance(layer, LBPWHTPointwiseConv) for layer in layers_of(model).values())
    losses = train(model, X, 5)
    assert losses[-1] < losses[0]
    assert not layout_report(model).exact


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["fc1"]), LoHaConfig(r=2, target_modules=["fc1"])])
@pytest.mark.parametrize("rank", [36, 64])
def test_other_methods_on_convolutions_are_made_cheap(config, rank):
    def build():
        model = get_peft_model(base(), copy.deepcopy(config))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        return model.train()

    plain = build()
    model = get_peft_model(build(), LBPWHTConfig(r=rank, grad_input_rank=rank, train_base_weight=False)).train()
    assert torch.equal(model(X), plain(X))
    difference = largest_difference(gradients(model, X), gradients(plain, X))
    assert difference < 1e-5 if rank == 64 else 1e-3 < difference < 1
    report = layout_report(model)
    assert {name.rsplit(".")[-1] for name in report.layers} == {"fc1", "fc2"}
    if rank == 36:
        assert not report.exact and {ran.layout.grid for ran in report.layers.values()} == {(8, 12)}


@pytest.mark.parametrize("needs_input_grad", [False, True])
def test_compiling_leaves_autograd_on(needs_input_grad):
    weight = torch.randn(5, 4, 1, 1, requires_grad=True)
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: low_rank_pointwise_conv(x, weight, None, plan=plan_of(None, BasisSet(3))), backend="aot_eager"
    )
    run(torch.randn(2, 4, 16, 16).requires_grad_(needs_input_grad))
    is_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # for the tests that follow
    assert is_on
