"""Models straight from timm: true grids, equal outputs, checkpoints."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from lbp_peft import LBPWHTConfig, exact_backward, layout_report

timm = pytest.importorskip("timm", reason="timm is not installed")

STAGES = (4, 8, 16, 32)
SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}
# name: (settings, image size, strides of the stages, prefix tokens, other grids: windows, subsampled tokens)
CASES = {
    "vit_tiny_patch16_224": ({"img_size": 96, "depth": 2}, 96, [16], {1}, set()),
    "deit_tiny_distilled_patch16_224": ({"img_size": 96, "depth": 2}, 96, [16], {2}, set()),
    "deit3_small_patch16_224": ({"img_size": 96, "depth": 2}, 96, [16], {1}, set()),
    "eva02_tiny_patch14_224": ({"img_size": 112, "depth": 2}, 112, [14], {1}, set()),
    "beit_base_patch16_224": ({"img_size": 96, "depth": 2, "embed_dim": 64, "num_heads": 2}, 96, [16], {1}, set()),
    "vit_medium_patch16_reg4_gap_256": ({"img_size": 96, "depth": 2}, 96, [16], {4}, set()),
    "swin_tiny_patch4_window7_224": (SWIN, 224, STAGES, {0}, {(7, 7)}),
    "swinv2_tiny_window8_256": (SWIN, 256, STAGES, {0}, {(8, 8)}),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32)}, 96, STAGES, {0}, set()),
    "convnextv2_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32)}, 96, STAGES, {0}, set()),
    "efficientformer_l1": ({}, 224, STAGES, {0}, set()),
    "mobilevit_xxs": ({}, 128, (2, *STAGES), {0}, {(2, 2)}),
    "pvt_v2_b0": ({}, 128, STAGES, {0}, set()),
    "poolformer_s12": ({}, 96, STAGES, {0}, set()),
    "edgenext_xx_small": ({}, 128, STAGES, {0}, set()),
    "davit_tiny": (
        {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (1, 2, 2, 2)}, 224, STAGES, {0}, {(7, 7)}
    ),
    "fastvit_t8": ({}, 128, STAGES, {0}, set()),
    "repvit_m1": ({}, 128, STAGES, {0}, set()),
    "samvit_base_patch16": (
        {"img_size": 128, "depth": 2, "embed_dim": 64, "num_heads": 2, "global_attn_indexes": [1]}, 128, [16], {0},
        {(14, 14)},
    ),
    "resnet50": ({}, 64, (4, *STAGES), {0}, set()),
}  # fmt: skip
# Layers whose tokens are on no grid, with one warning that says so.
PARTLY = {
    "efficientformerv2_s0": ({}, 224, "49 x 49 tokens are no patch grid"),  # talking heads, on attention maps
    "mobilevitv2_050": ({}, 128, "neither axis of its tokens is height or width"),
    "mixer_s32_224": ({}, 224, "512 tokens fit no patch grid"),  # mixes over the patches
    "hiera_tiny_224": ({}, 224, "unrolls its patches"),
}


def build(name, settings, size):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3, **settings).train()
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def logits(model, x):
    torch.manual_seed(2)
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", CASES)
def test_the_default_configuration_does_the_right_thing(name, tmp_path):
    settings, size, strides, prefixes, others = CASES[name]
    base, x = build(name, settings, size)
    model = get_peft_model(copy.deepcopy(base), LBPWHTConfig(r=3, grad_input=3)).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exact backpropagation")
        y = logits(model, x)
    torch.testing.assert_close(y, logits(base, x), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    true = {(size // stride, size // stride) for stride in strides} | others
    found = [ran.layout for ran in layout_report(model).layers.values() if ran is not None and ran.layout]
    assert found and {layout.grid for layout in found} <= true
    assert {layout.num_prefix_tokens for layout in found} == prefixes

    full = get_peft_model(copy.deepcopy(base), LBPWHTConfig(r=64, grad_input=64)).train()
    gradients = []
    for exact in (False, True):
        full.zero_grad()
        if exact:
            with exact_backward(full):
                y = logits(full, x)
        else:
            y = logits(full, x)
        (y - 1).square().sum().backward()
        gradients.append([p.grad.clone() for p in full.parameters() if p.grad is not None])
    difference = sum((a - b).square().sum() for a, b in zip(*gradients, strict=True))
    assert (difference / sum(b.square().sum() for b in gradients[1])).sqrt() < 1e-5

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for buffer_name, buffer in model.named_buffers():  # batch norms' statistics are no adapter's to keep
        loaded.get_buffer(buffer_name).copy_(buffer)
    torch.testing.assert_close(logits(loaded, x), logits(model.eval(), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTLY)
def test_tokens_without_a_grid_are_exact_with_one_warning(name):
    settings, size, why = PARTLY[name]
    base, x = build(name, settings, size)
    model = get_peft_model(base, LBPWHTConfig(r=3, grad_input=3)).train()
    with pytest.warns(UserWarning, match=f"exact backpropagation.*{why}") as caught:
        logits(model, x).square().sum().backward()
    assert sum(why in str(w.message) for w in caught) == 1
