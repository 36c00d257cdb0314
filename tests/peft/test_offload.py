"""accelerate keeps the weights of these models on the CPU or on disk, and loads them to a device for each call."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import disturb, forward, gradients, images, largest_difference, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model

from lbp_peft import LBPWHTConfig, layout_report

CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj", "fc1"]
LORA = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False}
CONFIGS = {
    "alone": lambda: LBPWHTConfig(r=6, grad_input_dtype="full", target_modules=TARGETS),
    "int8": lambda: LBPWHTConfig(r=6, grad_input_dtype="int8", target_modules=TARGETS),
    "frozen": lambda: LBPWHTConfig(r=6, grad_input_rank=6, target_modules=TARGETS, train_base_weight=False),
    "LoRA": lambda: LBPWHTConfig(r=6, grad_input_rank=6, train_base_weight=False, stack_on=LoraConfig(**LORA)),
    "DoRA": lambda: LBPWHTConfig(
        r=6, grad_input_rank=6, train_base_weight=False, stack_on=LoraConfig(**LORA, use_dora=True)
    ),
}


def to_disk(model, folder):
    disk_offload(model, str(folder), execution_device=CPU)


def to_cpu(model, folder):
    cpu_offload(model, execution_device=CPU)


def dispatch(model, folder):
    parts = {name: "cpu" for name, _ in model.named_children()}
    dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


WAYS = pytest.mark.parametrize("offload", [to_cpu, to_disk, dispatch])


def adapted(name, base):
    torch.manual_seed(3)
    return get_peft_model(base, CONFIGS[name]())


def is_meta(model, part):
    return [p.is_meta for n, p in model.named_parameters() if part in n]


@WAYS
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("first", ["offload", "adapt"])
@torch.no_grad()
def test_inference(name, first, offload, tmp_path):
    if name in ("LoRA", "DoRA") and first == "offload":
        pytest.skip("PEFT's LoRA itself comes to lie on the meta device")
    if name == "DoRA" and offload is not dispatch:
        pytest.skip("PEFT's DoRA itself does not work offloaded")
    expected = forward(adapted(name, tiny_vit()).eval(), images())
    base = tiny_vit().eval()
    if first == "offload":
        offload(base, tmp_path)
    model = adapted(name, base).eval()
    if first == "adapt":
        offload(model, tmp_path)
    for _ in range(2):
        assert torch.equal(forward(model, images()), expected)
    assert any(is_meta(model, "")) == (offload is not dispatch)


@WAYS
@pytest.mark.parametrize("name", ["alone", "int8", "frozen"])
def test_training_on_an_offloaded_base(name, offload, tmp_path):
    expected = adapted(name, tiny_vit()).train()
    base = tiny_vit()
    offload(base, tmp_path)
    model = adapted(name, base).train()
    x, same = images().requires_grad_(), images().requires_grad_()
    found, plain = (gradients(m, z) | {"images": z.grad} for m, z in ((model, x), (expected, same)))
    assert len(found) > 1 or name == "frozen"
    assert largest_difference(found, plain) < 1e-6
    found, plain = (  # offloading adds operations on the way to a layer
        [replace(ran, known_by="") for ran in layout_report(m).layers.values()] for m in (model, expected)
    )
    assert found == plain
    assert all(is_meta(model, "q_proj.base_layer")) == (offload is not dispatch)
    assert not any(is_meta(model, "lbpwht_"))


@pytest.mark.parametrize("name, offload", [("LoRA", to_cpu), ("LoRA", to_disk), ("LoRA", dispatch), ("DoRA", dispatch)])
def test_stacked_layers_that_are_offloaded_later(name, offload, tmp_path):
    """LoRA's own gradients go to temporary copies of accelerate, so the gradients of the images are compared."""
    expected, model = adapted(name, tiny_vit()).train(), adapted(name, tiny_vit()).train()
    offload(model, tmp_path)
    found = []
    for one in (model, expected):
        x = images().requires_grad_()
        forward(one, x).square().sum().backward()
        found.append({"images": x.grad})
    assert largest_difference(*found) < 1e-5


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_training_offloaded_adapters_is_refused(offload, tmp_path):
    model = adapted("alone", tiny_vit()).train()
    offload(model, tmp_path)
    refused = "offloaded the trained weights .* Offload the base model before get_peft_model"
    with pytest.raises(RuntimeError, match=refused):
        forward(model, images())


def test_a_lora_of_another_dtype_that_is_offloaded_later():
    """Such a layer would be run again in the backward pass, with parameters that accelerate would put back."""
    model = adapted("LoRA", tiny_vit().bfloat16()).train()
    to_cpu(model, None)
    x = images().bfloat16().requires_grad_()
    with pytest.warns(UserWarning, match="uses exact backpropagation.* hooks"):
        forward(model, x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_lora_on_an_offloaded_base_is_not_trained_on_the_meta_device():
    base = tiny_vit()
    to_cpu(base, None)
    model = adapted("LoRA", base).train()
    with pytest.raises(RuntimeError, match="no values .*, since the base model was offloaded before"):
        forward(model, images())


@torch.no_grad()
def test_a_replaced_forward_method_of_an_offloaded_layer_is_refused():
    base = tiny_vit().eval()
    layer = base.vit.layers[0].attention.q_proj
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    to_cpu(base, None)
    model = adapted("alone", base).eval()
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.q_proj is offloaded by accelerate"):
        forward(model, images())


@torch.no_grad()
def test_merging_into_an_offloaded_base():
    expected = adapted("alone", tiny_vit()).eval()
    base = tiny_vit().eval()
    to_cpu(base, None)
    plain = forward(base, images())
    model = adapted("alone", base).eval()
    for one in (expected, model):
        disturb(one)
    logits = forward(expected, images())
    assert torch.equal(forward(model, images()), logits)
    model.merge_adapter()
    assert torch.equal(forward(model, images()), logits)
    with model.disable_adapter():
        assert torch.equal(forward(model, images()), plain)
    assert torch.equal(forward(model, images()), logits)
    model.unmerge_adapter()
    assert torch.equal(forward(model, images()), logits)
    assert torch.equal(forward(model.merge_and_unload(), images()), logits)


@torch.no_grad()
def test_checkpoints_of_an_adapter_on_an_offloaded_base(tmp_path):
    base = tiny_vit().eval()
    to_cpu(base, None)
    model = adapted("alone", base).eval()
    disturb(model)
    model.save_pretrained(tmp_path)
    for offloaded in (False, True):
        other = tiny_vit().eval()
        if offloaded:
            to_cpu(other, None)
        loaded = PeftModel.from_pretrained(other, tmp_path).eval()
        assert torch.equal(forward(loaded, images()), forward(model, images()))


@torch.no_grad()
def test_hooks_of_accelerate_can_be_removed_again():
    model = adapted("alone", tiny_vit()).eval()
    disturb(model)
    expected = forward(model, images())
    to_cpu(model, None)
    forward(model, images())
    remove_hook_from_submodules(model)
    assert not any(is_meta(model, ""))
    assert torch.equal(forward(model, images()), expected)
    assert torch.equal(forward(copy.deepcopy(model), images()), expected)
