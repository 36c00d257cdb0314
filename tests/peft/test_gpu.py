"""Training on a CUDA GPU gives the gradients that the same model gives on the CPU in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import is_surprising
from models import (
    forward,
    gradients,
    images,
    input_gradient,
    largest_difference,
    layers_of,
    outputs,
    tiny_vit,
    train,
)
from peft import LoraConfig, get_peft_model
from transformers import SegformerConfig, SegformerForImageClassification, Swinv2Config, Swinv2ForImageClassification

from lbp_peft import LBPWHTConfig, layout_report

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:.*second time"),
]


def swinv2():
    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=8, num_labels=5,
        drop_path_rate=0.0,
    )  # fmt: skip
    return Swinv2ForImageClassification(config)


def segformer():
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], num_labels=5, drop_path_rate=0.0,
        classifier_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return SegformerForImageClassification(config)


MODELS = {"vit": (tiny_vit, 32), "swinv2": (swinv2, 64), "segformer": (segformer, 64)}


def adapted(build=tiny_vit, lora=False, **settings):
    base = build()
    if lora:
        targets = ["q_proj", "v_proj", "fc1", "fc2"]
        base = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        settings["train_base_weight"] = False
    return get_peft_model(base, LBPWHTConfig(**({"r": 6} | settings)))


def on_both(model, x):
    """Compute the gradients on the GPU in float32, and on the CPU in float64."""
    expected = gradients(copy.deepcopy(model).double(), x.double())
    found = gradients(model.cuda(), x.cuda())
    return {name: grad.cpu().double() for name, grad in found.items()}, expected


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def with_kernels(request, monkeypatch):
    """Run a test with both ways to project on a GPU: PyTorch's products and the Triton kernels."""
    from lbp_peft import kernels

    if request.param:
        pytest.importorskip("triton")
        from lbp_peft.kernels import lift, project, quantize  # noqa: F401  registers the operators
    monkeypatch.setattr(kernels, "IN_USE", request.param)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad_input", ["full", 6])
@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
def test_gradients_equal_those_in_float64(name, grad_input, lora, with_kernels):
    build, size = MODELS[name]
    if lora and name != "vit":
        pytest.skip("names of LoRA's targets are ViT's")
    model = adapted(build, lora, **input_gradient(grad_input))
    found, expected = on_both(model, images(3, size))
    assert largest_difference(found, expected) < 1e-3
    ran = layout_report(model).layers.values()
    assert not all(one.why_exact for one in ran)
    assert not any(is_surprising(one) for one in ran)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("int8", 0.1), ("fp8", 0.3)])
@pytest.mark.parametrize("rotation", [0, 16])
def test_low_precision_stays_near(precision, bound, rotation, with_kernels):
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    model = adapted(lambda: tiny_vit(**wide), grad_input_dtype=precision, hadamard_size=rotation)
    x = images(3)
    expected = gradients(adapted(lambda: tiny_vit(**wide), grad_input_dtype="full").double(), x.double())
    found = gradients(model.cuda(), x.cuda())
    found = {name: grad.cpu().double() for name, grad in found.items()}
    assert largest_difference(found, expected) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"grad_input_rank": 6}, {"compress_activations": "all"}], ids=str)
def test_autocast_stays_near(dtype, settings, with_kernels):
    model, x = adapted(**settings).cuda(), images(3).cuda()
    expected = gradients(model, x)
    with torch.autocast("cuda", dtype):
        found = gradients(model, x)
    keys = [name for name in expected if "k_proj" in name and "bias" in name]  # nothing but rounding
    for each in (found, expected):
        for name in keys:
            del each[name]
    assert largest_difference(found, expected) < 0.15


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["graphs of kernels", "CUDA graphs"])
@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
def test_compiled_steps_equal_eager_ones(mode, lora):
    model, x = adapted(lora=lora).cuda(), images(3).cuda()
    expected = gradients(model, x)
    model.compile(mode=mode)
    for _ in range(3):  # the first calls with CUDA graphs are warm-up and recording
        torch.compiler.cudagraph_mark_step_begin()
        found = gradients(model, x)
    assert largest_difference(found, expected) < 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, x = adapted().cuda(), images(3).cuda()
    expected = gradients(model, x)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if reentrant:
        model.enable_input_require_grads()
    assert largest_difference(gradients(model, x), expected) < 1e-4


def test_training_saves_memory_and_lowers_the_loss():
    """This checks the allocator's own figure, at a size at which activations matter."""
    torch.manual_seed(0)

    def peak(model, x):
        model = model.cuda().train()
        losses = train(model, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(model, x).sum()
        return torch.cuda.max_memory_allocated() - before, losses

    shape = {"image_size": 128, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    x = images(16, 128).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, losses = peak(adapted(lambda: tiny_vit(**shape), r=3, grad_input_dtype="full"), x)
    large, _ = peak(tiny_vit(**shape), x)
    assert small < 0.9 * large
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["auto", "cpu", "disk", "resident", "dropped"])
def test_base_weights_wait_outside_the_gpu_and_come_back(where):
    x, base = images().cuda(), tiny_vit().cuda()
    model = adapted(grad_input_dtype="full", base_weights=where).cuda()
    expected = train(adapted(grad_input_dtype="full", base_weights="resident").cuda(), x, 3)
    assert train(model, x, 3) == pytest.approx(expected, rel=1e-5)
    layers = layers_of(model).values()
    weights = [layer.get_base_layer().weight for layer in layers]
    if where == "dropped":
        assert weights == [None] * len(weights)
    else:
        assert {weight.device.type for weight in weights} == {"cuda" if where == "resident" else "cpu"}
        with model.disable_adapter():
            assert torch.equal(outputs(model, x), outputs(base, x))
        train(model, x, 1)
        adapted_outputs = outputs(model, x)
        model.merge_adapter()
        assert torch.equal(outputs(model, x), adapted_outputs)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, x), adapted_outputs)
        train(model, x, 1)
        model.add_adapter("second", LBPWHTConfig(r=6, grad_input_dtype="full", base_weights=where))
        model.base_model.set_adapter(["default", "second"])
        train(model, x, 1)
    adapted_outputs = outputs(model, x)
    assert torch.equal(outputs(copy.deepcopy(model), x), adapted_outputs)
    assert torch.allclose(outputs(model.cpu(), x.cpu()), adapted_outputs.cpu(), atol=1e-4)
    assert torch.allclose(outputs(model.cuda().merge_and_unload(), x), adapted_outputs, atol=1e-6)
