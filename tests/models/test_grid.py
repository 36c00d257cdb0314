"""Which grid the tokens of real architectures are found to lie on."""

import re
import warnings

import pytest
import reference
import torch
import transformers
from models import (
    forward,
    gradients,
    hooks_of,
    images,
    input_gradient,
    largest_difference,
    layers_of,
    tiny_vit,
    vit_config,
)
from peft import get_peft_model
from torch import nn

from lbp_peft import GridMismatchError, LBPWHTConfig, layout_report

SMALL = {
    "image_size": 32, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
ARCHITECTURES = {
    # name: (config class, model class, settings, prefix tokens)
    "vit": ("ViTConfig", "ViTModel", {}, 1),
    "deit": ("DeiTConfig", "DeiTModel", {}, 2),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}, 1),
    "dinov2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"num_register_tokens": 4}, 5),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}, 5),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {}, 1),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {}, 0),
    "beit": ("BeitConfig", "BeitModel", {}, 1),
    "i-jepa": ("IJepaConfig", "IJepaModel", {}, 0),
    "vit-msn": ("ViTMSNConfig", "ViTMSNModel", {}, 1),
}


def build(name):
    config, model, settings, prefix = ARCHITECTURES[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**(SMALL | settings))), prefix


def adapt(model, **settings):
    return get_peft_model(model, LBPWHTConfig(**({"r": 3} | settings))).train()


def layouts(model):
    """(grid, prefix tokens) of all adapted layers; None for those with an exact backward pass."""
    return {ran and ran.layout and (ran.layout.grid, ran.layout.num_prefix_tokens)
            for ran in layout_report(model).layers.values()}  # fmt: skip


def backward(model, pixels, **how):
    output = model(pixel_values=pixels, **how)
    (output.logits if "logits" in output else output.last_hidden_state).square().sum().backward()


def exact_warnings(caught):
    return [str(w.message) for w in caught if "exact backpropagation" in str(w.message)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_at_their_own_size(name):
    model, prefix = build(name)
    model = adapt(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(model, images())
    assert not exact_warnings(caught)
    assert layouts(model) == {((8, 8), prefix)}
    assert {ran.grad_weight_rows for ran in layout_report(model).layers.values()} == {3 + prefix}
    assert not layout_report(model).exact
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any("head" in name or "pooler" in name or "embed" in name for name in layout_report(model).layers)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (48, 32), (20, 36)])
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2 with registers", "dinov3", "clip", "siglip"])
def test_other_sizes_and_aspect_ratios(name, height, width):
    model, prefix = build(name)
    model = adapt(model)
    how = {} if name in ("dinov2 with registers", "dinov3") else {"interpolate_pos_encoding": True}
    backward(model, images(2, height, width), **how)
    assert layouts(model) == {((height // 4, width // 4), prefix)}
    assert not layout_report(model).exact


def test_changing_the_size_from_step_to_step():
    model = adapt(tiny_vit())
    for height, width in ((32, 32), (64, 32), (32, 64), (32, 32)):
        forward_at(model, height, width)
        assert layouts(model) == {((height // 4, width // 4), 1)}


def forward_at(model, height, width):
    return model(images(2, height, width), interpolate_pos_encoding=True).logits


def test_patches_need_not_be_square():
    model = adapt(tiny_vit(patch_size=(4, 8)))
    model(images())
    assert layouts(model) == {((8, 4), 1)}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("second", [(64, 64), (32, 64), (16, 64)])
def test_two_sizes_before_one_backward_with_gradient_checkpointing(reentrant, second):
    def found(checkpointing):
        model = adapt(tiny_vit(), grad_input_rank=3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        (forward_at(model, 32, 32).square().sum() + forward_at(model, *second).square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert largest_difference(found(True), found(False)) < 1e-5


def test_a_patch_embedding_that_is_trained_is_watched_too():
    """PEFT trains a copy of what modules_to_save names, and runs the copy."""
    model = adapt(tiny_vit(), modules_to_save=["patch_embeddings"], grad_input_rank=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = gradients(model, images())
    assert layouts(model) == {((8, 8), 1)}
    assert any("patch_embeddings" in name for name in found)


# Tokens without a grid


def test_masked_pre_training_is_exact_with_one_warning():
    torch.manual_seed(0)
    settings = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**SMALL, **settings, decoder_intermediate_size=64)
    model = adapt(transformers.ViTMAEForPreTraining(config))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.manual_seed(0)  # the same mask
            loss = model(pixel_values=images()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    (message,) = exact_warnings(caught)
    assert "vit.layers.0.attention.q_proj" in message or "layer.0" in message
    assert "not known where its tokens lie" in message and "'gather'" in message and "grid_size" in message
    assert layouts(model) == {None}
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("num_frames", [2, 8])
def test_tubelets_of_a_video_are_as_many_images(num_frames):
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**SMALL, num_frames=num_frames, num_labels=3)
    model = adapt(transformers.VideoMAEForVideoClassification(config))
    model(pixel_values=torch.randn(1, num_frames, 3, 32, 32)).logits.sum().backward()
    assert layouts(model) == {((8, 8), 0)}
    assert {ran.layout.packed for ran in layout_report(model).layers.values()} == {num_frames // 2}


class CutByLinear(nn.Module):
    """A model that cuts patches by a linear layer instead of a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 4 * 4, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values):
        patches = nn.functional.unfold(pixel_values, 4, stride=4).transpose(1, 2)
        tokens = self.embed(patches)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("by_name", [True, False])
def test_patches_that_are_cut_by_unfolding_are_followed(by_name):
    model = adapt(CutByLinear())
    pixels = images(2, 32, 48)
    (model(pixel_values=pixels) if by_name else model(pixels)).sum().backward()
    assert layouts(model) == {((8, 12), 0)}
    assert not hooks_of(model.unload())


class OfTokens(CutByLinear):
    """A model whose inputs are tokens already."""

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def test_without_any_sign_of_patches_it_is_exact_and_says_once_what_to_do():
    model = adapt(OfTokens())
    with pytest.warns(UserWarning, match=r"blocks\.0\.0.*not known where its tokens lie.*grid_size") as caught:
        for _ in range(2):
            model(torch.randn(2, 64, 16)).sum().backward()
    assert len(exact_warnings(caught)) == 1
    assert layouts(model) == {None} and len(layout_report(model).exact) == 4


@pytest.mark.parametrize("settings, prefix", [({"grid_size": (8, 8)}, 0), ({"grid_size": (16, 4)}, 0)])
def test_a_grid_given_by_hand(settings, prefix):
    model = adapt(CutByLinear(), **settings)
    model(pixel_values=images()).sum().backward()
    assert layouts(model) == {(settings["grid_size"], prefix)}


@pytest.mark.parametrize("settings, message", [
    ({"grid_size": (7, 7)}, r"grid_size=\(7, 7\) makes 49 tokens, but 65 arrived.*16 of them.*num_prefix_tokens"),
    ({"grid_size": (9, 9)}, r"grid_size=\(9, 9\) makes 81 tokens, but 65 arrived.*correct grid_size"),
    ({"grid_size": (8, 8), "num_prefix_tokens": 3}, "num_prefix_tokens=3 makes 67 tokens, but 65 arrived"),
])  # fmt: skip
def test_a_grid_that_does_not_fit_is_an_error(settings, message):
    model = adapt(tiny_vit(), **settings)
    with pytest.raises(GridMismatchError, match=message) as caught:
        model(images())
    assert isinstance(caught.value, ValueError)


def test_a_grid_given_by_hand_is_not_looked_at_in_eval_mode():
    model = adapt(tiny_vit(), grid_size=(7, 7)).eval()
    assert model(images()).logits.shape == (2, 5)


def test_prefix_tokens_given_by_hand():
    model = adapt(tiny_vit(), grid_size=(8, 8))
    model(images())
    assert layouts(model) == {((8, 8), 1)}  # the one it has beyond the grid is known from the model
    model = adapt(tiny_vit(), num_prefix_tokens=1)
    model(images())
    assert layouts(model) == {((8, 8), 1)}
    model = adapt(tiny_vit(), num_prefix_tokens=2)
    with pytest.warns(UserWarning, match="num_prefix_tokens=2, but 1 of its tokens are before the patches"):
        model(images())
    assert layouts(model) == {None}


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.lin = nn.Linear(12, 10)

    def forward(self, x):
        return self.lin(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2))


def test_channels_last_input_is_its_own_grid():
    torch.manual_seed(0)
    model = adapt(ChannelsLast(), target_modules=["lin"])
    found = gradients(model, images(2, 32, 48))
    assert layouts(model) == {((8, 12), 0)}
    base = ChannelsLast().double()
    base.load_state_dict({n: p.double() for n, p in model.unload().state_dict().items()})
    recorded = record(base.lin)
    gradients(base, images(2, 32, 48).double())
    x, grad = (t.flatten(1, 2) for t in recorded)
    expected, _ = reference.orthogonal_gradients(x, base.lin.weight.detach(), grad, (8, 12), 0, 3, None)
    (name,) = (n for n in found if "weight" in n)
    assert (found[name] - expected).norm() < 1e-5 * expected.norm()


def test_channels_last_input_must_fit_a_grid_given_by_hand():
    model = adapt(ChannelsLast(), target_modules=["lin"], grid_size=(4, 4))
    with pytest.raises(GridMismatchError, match=r"\(4, 4\).*its own grid, \(8, 8\)"):
        model(images())


def record(layer):
    """A list that receives the input of the next forward pass, and then the gradient of its output."""
    seen = []

    def note(module, args, output):
        seen.append(args[0].detach())
        output.register_hook(seen.append)

    layer.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("r_input", ["full", 3])
def test_a_layer_in_a_real_model_has_the_gradient_of_the_formula(r_input):
    model = adapt(tiny_vit(), r=10, **input_gradient(r_input)).double()
    fc1 = next(layer for name, layer in layers_of(model).items() if name.endswith("layers.0.mlp.fc1"))
    recorded = record(fc1)
    inputs = []

    def note_gradient(module, args):
        args[0].register_hook(inputs.append)

    fc1.register_forward_pre_hook(note_gradient)
    gradients(model, images().double())
    x, grad = recorded
    weight = fc1.lbpwht_weight["default"]
    expected, expected_x = reference.orthogonal_gradients(
        x, weight.detach(), grad, (8, 8), 1, 10, None if r_input == "full" else r_input
    )
    assert (weight.grad - expected).norm() < 1e-10 * expected.norm()
    assert (fc1.lbpwht_bias["default"].grad - grad.sum((0, 1))).norm() < 1e-10 * grad.norm()
    assert (inputs[0] - expected_x).norm() < 1e-10 * expected_x.norm()


def test_reflection_on_a_grid_too_small_is_exact_with_one_warning():
    model = adapt(tiny_vit(image_size=12), boundary="reflect")
    with pytest.warns(UserWarning, match=r'too short to be padded.*boundary="orthogonal"') as caught:
        gradients(model, images(2, 12))
    assert len(exact_warnings(caught)) == 1
    assert len(layout_report(model).exact) == 12


def test_a_report_is_readable():
    model = adapt(tiny_vit(), target_modules=["fc1"], grad_input_rank=6)
    assert "not called in training mode yet" in str(layout_report(model))
    model(images())
    lines = layout_report(model).as_text(verbose=True).splitlines()
    start = lines.index("") + 1  # below the totals
    header = re.split("  +", lines[start])
    first, second = (
        re.split("  +", "".join(lines[row : row + 2])) for row in (start + 1, start + 3)
    )  # names above cells
    assert header == ["layer", "grid", "outside", "tokens", "dW from", "dx from", "dx in", "found by", "backward"]
    embedding = "vit.embeddings.patch_embeddings.projection"
    for row in (first, second):
        assert re.fullmatch(r"through \d+ operations", row.pop(7))
    assert f"The grids were followed from {embedding}." in str(layout_report(model))
    # Nothing before the first adapted layer is trained, so it needs no input gradient: 65 of 65 tokens.
    assert first == ["vit.layers.0.mlp.fc1", "8 x 8", "1", "65", "4", "65", "full", "low-rank"]
    assert second == ["vit.layers.1.mlp.fc1", "8 x 8", "1", "65", "4", "7", "full", "low-rank"]
    assert str(model.base_model.layout_report()) == str(layout_report(model))
    assert forward(model.eval(), images()).shape == (2, vit_config().num_labels)
