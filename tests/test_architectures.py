"""The default configuration on many architectures: true grids, equal outputs, exact gradients at full rank.

The grids expected here follow from the architectures: image size over the strides of their stages.
"""

import copy
import re
import warnings

import pytest
import torch
from models import largest_difference, layers_of
from peft import PeftModel, get_peft_model
from transformers import (
    AutoBackbone,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lbp_peft import LBPWHTConfig, exact_backward, layout_report

FLAT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 2]}
SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 64, "patch_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TWO_TOWERS = {"vision_config": FLAT, "text_config": TEXT}

# name: (settings, image, {part of a layer's name: (grid, prefix tokens); None where there is none})
# The last part that occurs in the name of a layer counts.
LINEAR = {"": ((8, 8), 0)}
WITH_CLS = {"": ((8, 8), 1)}
FOUR_STAGES = {"": None, r"\.0\.": ((16, 24), 0), r"\.1\.": ((8, 12), 0), r"\.2\.": ((4, 6), 0), r"\.3\.": ((2, 3), 0)}
FLAT_MODELS = {
    "beit": (WITH_CLS, {"use_relative_position_bias": True}),
    "data2vec-vision": (WITH_CLS, {}),
    "dinov2": (WITH_CLS, {}),
    "dinov2_with_registers": ({"": ((8, 8), 5)}, {"num_register_tokens": 4}),
    "ijepa": (LINEAR, {}),
    "vit": (WITH_CLS, {}),
    "vit_msn": (WITH_CLS, {}),
}
CASES = {name: (FLAT | more, (64, 64), grids) for name, (grids, more) in FLAT_MODELS.items()}
CASES |= {
    "vit, not square": ("vit", FLAT | {"image_size": [64, 96]}, (64, 96), {"": ((8, 12), 1)}),
    "clip": (TWO_TOWERS, (64, 64), WITH_CLS),
    "siglip": (TWO_TOWERS, (64, 64), LINEAR),
    "deit": (FLAT, (64, 64), {"": ((8, 8), 2)}),
    "swin": (SWIN, (64, 64), {
        r"layers\.0": ((16, 16), 0), r"layers\.1": ((8, 8), 0), "downsample": ((8, 8), 0), "attention": ((4, 4), 0)}),
    "swin, not square": ("swin", SWIN, (64, 96), {
        r"layers\.0": ((16, 24), 0), r"layers\.1": ((8, 12), 0), "downsample": ((8, 12), 0), "attention": ((4, 4), 0)}),
    "swinv2": (SWIN, (64, 96), {
        r"layers\.0": ((16, 24), 0), r"layers\.1": ((8, 12), 0), "downsample": ((8, 12), 0), "attention": ((4, 4), 0)}),
    "donut-swin": (SWIN, (64, 64), {
        r"layers\.0": ((16, 16), 0), r"layers\.1": ((8, 8), 0), "downsample": ((8, 8), 0), "attention": ((4, 4), 0)}),
    "segformer": (PYRAMID, (64, 96), {
        r"block\.0": ((16, 24), 0), r"block\.1": ((8, 12), 0), r"block\.2": ((4, 6), 0), r"block\.3": ((2, 3), 0),
        r"self\.(key|value)|attention\.self\.[kv]": ((2, 3), 0)}),
    "pvt": (PYRAMID | {"image_size": 64, "drop_path_rate": 0.0}, (64, 64), {
        r"block\.0": ((16, 16), 0), r"block\.1": ((8, 8), 0), r"block\.2": ((4, 4), 0),
        r"(key|value|[kv]_proj)": ((2, 2), 0), r"block\.3": ((2, 2), 1)}),
    "pvt_v2": (PYRAMID, (64, 96), {
        r"layers\.0": ((16, 24), 0), r"layers\.1": ((8, 12), 0), r"layers\.2": ((4, 6), 0), r"layers\.3": ((2, 3), 0),
        r"(key|value|[kv]_proj)": ((2, 3), 0)}),
    "convnext": (STAGES, (64, 96), FOUR_STAGES),
    "convnextv2": (STAGES, (64, 96), FOUR_STAGES),
    "poolformer": (STAGES | {"drop_path_rate": 0.0}, (64, 96), FOUR_STAGES),
    "focalnet": ({"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 64,
                  "patch_size": 4, "drop_path_rate": 0.0}, (64, 96), {
        r"stages\.0": ((16, 24), 0), r"stages\.1": ((8, 12), 0)}),
    "swiftformer": ({"embed_dims": [16, 16, 32, 32], "depths": [2, 2, 2, 2], "drop_path_rate": 0.0}, (64, 64), {
        r"network\.0": ((16, 16), 0), r"network\.2": ((8, 8), 0), r"network\.4": ((4, 4), 0),
        r"network\.6": ((2, 2), 0)}),
    "mobilenet_v1": ({}, (64, 96), {}),
    "mobilenet_v2": ({}, (64, 96), {}),
    "resnet": (STAGES | {"embedding_size": 16}, (64, 96), {}),
    "regnet": (STAGES | {"embedding_size": 16, "groups_width": 8}, (64, 96), {}),
    "mobilevit": ({"image_size": 128, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
                  (128, 128), {r"layer\.2\.transformer": ((8, 8), 0), r"layer\.3\.transformer": ((4, 4), 0),
                               r"layer\.4\.transformer": ((2, 2), 0)}),
}  # fmt: skip
BACKBONES = {
    "dinov3_convnext": (STAGES, (64, 96), FOUR_STAGES),
    "dinov3_vit": (FLAT, (64, 96), {"": ((8, 12), 1)}),
    "hgnet_v2": ({}, (64, 64), {}),
    "maskformer-swin": (SWIN, (64, 64), {
        r"layers\.0": ((16, 16), 0), r"layers\.1": ((8, 8), 0), "downsample": ((8, 8), 0), "attention": ((4, 4), 0)}),
    "pixio": (FLAT | {"n_cls_tokens": 8}, (64, 64), {"": ((8, 8), 8)}),
    "rt_detr_resnet": (STAGES | {"embedding_size": 16}, (64, 64), {}),
    "sapiens2": (FLAT | {"num_register_tokens": 8}, (64, 64), {"": ((8, 8), 9)}),
    "textnet": ({}, (64, 64), {}),
    "vitdet": (FLAT | {"window_size": 4, "window_block_indices": [0]}, (64, 64), {
        "": ((8, 8), 0), r"layer\.0\.attention": ((4, 4), 0)}),
    "vitpose_backbone": (FLAT | {"image_size": [64, 64], "patch_size": [8, 8]}, (64, 64), LINEAR),
}  # fmt: skip
DENSE = {
    "depth_anything": ({
        "backbone_config": FLAT | {"model_type": "dinov2", "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4],
                                   "reshape_hidden_states": False},
        "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "patch_size": 8,
        "head_hidden_size": 8, "depth_estimation_type": "metric", "max_depth": 1}, (64, 64), {
        r"backbone": ((8, 8), 1)}),
    "glpn": (PYRAMID | {"decoder_hidden_size": 16, "drop_path_rate": 0.0}, (64, 96), {
        r"block\.0": ((16, 24), 0), r"block\.1": ((8, 12), 0), r"block\.2": ((4, 6), 0), r"block\.3": ((2, 3), 0),
        r"self\.(key|value)|attention\.self\.[kv]": ((2, 3), 0)}),
}  # fmt: skip
SEGMENTATION = {
    "segformer": (PYRAMID | {"decoder_hidden_size": 16}, (64, 96), CASES["segformer"][2]),
    "upernet": ({
        "backbone_config": STAGES | {"model_type": "convnext",
                                     "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "hidden_size": 16, "auxiliary_in_channels": 32}, (64, 96), {}),
}  # fmt: skip
CASES |= {
    "efficientnet": ({"depth_coefficient": 1.0, "dropout_rate": 0.0, "drop_connect_rate": 0.0}, (64, 64), {}),
    "levit": ({"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 3], "depths": [1, 1, 1],
               "key_dim": [8, 8, 8], "image_size": 128, "drop_path_rate": 0}, (128, 128), {}),
}  # fmt: skip
SUBSAMPLED = {"levit": {(4, 4), (2, 2)}}  # without a layer that puts such a map out
AUTO = (
    [(name, AutoModelForImageClassification, CASES[name]) for name in CASES]
    + [(name, AutoBackbone, BACKBONES[name]) for name in BACKBONES]
    + [(name, AutoModelForDepthEstimation, DENSE[name]) for name in DENSE]
    + [(name, AutoModelForSemanticSegmentation, SEGMENTATION[name]) for name in SEGMENTATION]
)
EXACT = {
    "hiera": ({"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "image_size": [64, 64],
               "masked_unit_size": [8, 8], "query_stride": [2, 2], "num_query_pool": 2}, (64, 64),
              "unrolls its patches"),
    "mobilevitv2": ({"image_size": 64, "base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 1, 1]}, (64, 64),
                    "neither axis of its tokens is height or width"),
}  # fmt: skip


def build(name, settings, image, auto=AutoModelForImageClassification):
    torch.manual_seed(0)
    settings = {
        key: CONFIG_MAPPING[value["model_type"]](**{k: v for k, v in value.items() if k != "model_type"})
        if isinstance(value, dict) and "model_type" in value
        else value
        for key, value in settings.items()
    }
    config = CONFIG_MAPPING[name](**settings)
    config.num_labels, config.architectures = 3, []
    try:
        model = auto.from_config(config)
    except (ImportError, TypeError) as error:  # some need packages, or an image processor that is not there
        pytest.skip(f"{name} cannot be made here: {error}".splitlines()[0])
    for module in model.modules():  # or outputs and gradients would not repeat
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and not parameter.any():
                parameter.normal_(std=0.05)
    x = torch.randn(2, 3, *image, generator=torch.Generator().manual_seed(1))
    return model.train(), x


def unpacked(case):
    name, settings, image, expected = case if len(case) == 4 else (None, *case)
    return name, settings, image, expected


def logits(model, x):
    torch.manual_seed(2)
    output = model(pixel_values=x)
    for name in ("logits", "predicted_depth", "feature_maps"):
        if (found := getattr(output, name, None)) is not None:
            return found[-1] if isinstance(found, (tuple, list)) else found
    raise KeyError(list(output))


def gradients(model, x):
    model.zero_grad()
    y = logits(model, x)
    goal = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y - goal).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapt(model, **settings):
    return get_peft_model(copy.deepcopy(model), LBPWHTConfig(**settings)).train()


@pytest.mark.parametrize(
    "name, auto, case",
    [pytest.param(*one, id=f"{one[1].__name__.removeprefix('AutoModelFor')}-{one[0]}") for one in AUTO],
)
def test_the_default_configuration_does_the_right_thing(name, auto, case, tmp_path):
    kind, settings, image, expected = unpacked(case)
    base, x = build(kind or name, settings, image, auto)
    recorded = grids_of_the_forward_pass(base, x)
    model = adapt(base, r=3, grad_input=3)
    plain = logits(base, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exact backpropagation")
        torch.testing.assert_close(logits(model, x), plain, rtol=1e-5, atol=1e-6)
    report = layout_report(model)
    assert report.layers
    for layer, ran in report.layers.items():
        if ran is None or ran.layout is None:
            assert ran is None or "single token" in ran.why_exact or "not needed" in ran.why_exact, (layer, ran)
            continue
        assert ran.layout.grid in recorded | SUBSAMPLED.get(name, set()) or expected, layer
        matching = [grid for part, grid in expected.items() if re.search(part, layer)]
        if matching:
            assert (ran.layout.grid, ran.layout.num_prefix_tokens) == matching[-1], layer

    full = adapt(base, r=64, grad_input=64)
    found = gradients(full, x)
    with exact_backward(full):
        exact = gradients(full, x)
    assert largest_difference(found, exact) < 1e-4  # relative to each parameter, some of which hardly matter
    total = sum((found[n] - e).square().sum() for n, e in exact.items()) / sum(e.square().sum() for e in exact.values())
    assert total.sqrt() < 1e-5

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    gradients(model, x)
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for layer, module in layers_of(model).items():
        for adapter, weight in module.lbpwht_weight.items():
            assert torch.equal(weight, loaded.get_submodule(layer).lbpwht_weight[adapter])
    for buffer_name, buffer in model.named_buffers():  # batch norms' statistics are no adapter's to keep
        loaded.get_buffer(buffer_name).copy_(buffer)
    model.eval()
    torch.testing.assert_close(logits(loaded, x), logits(model, x), rtol=1e-4, atol=1e-5)


def grids_of_the_forward_pass(model, x):
    """Heights and widths of all feature maps that the model's own layers put out."""
    grids, hooks = set(), []
    for module in model.modules():
        hooks.append(
            module.register_forward_hook(
                lambda m, args, out: (
                    grids.add(tuple(out.shape[2:])) if isinstance(out, torch.Tensor) and out.dim() == 4 else None
                )
            )
        )
    with torch.no_grad():
        model(pixel_values=x)
    for hook in hooks:
        hook.remove()
    return grids


@pytest.mark.parametrize("name", EXACT)
def test_tokens_in_another_order_are_exact_with_one_warning(name):
    settings, image, why = EXACT[name]
    base, x = build(name, settings, image)
    model = adapt(base, r=3, grad_input=3)
    with pytest.warns(UserWarning, match=f"exact backpropagation.*{why}") as caught:
        gradients(model, x)
        gradients(model, x)
    assert sum("exact backpropagation" in str(w.message) for w in caught) == 1
    assert any(why in reason for reason in layout_report(model).exact.values())
