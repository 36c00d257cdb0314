"""Targets that are found by following the patches of an image through one forward pass."""

import warnings

import architectures
import pytest
import torch
import vlm_architectures
from models import images, layers_of, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn

from lbp_peft import LBPWHTConfig, layout_report, targets_from, verify_layout
from lbp_peft.encoder import encoder_linears

PREFIX = "base_model.model."


def by_name(of):
    return {architecture.name: architecture for architecture in of}


ALIKE = {  # whose structure tells all layers
    name: found[name]
    for found, names in (
        (by_name(architectures.ARCHITECTURES), ("vit", "swin", "hiera", "segformer, segmentation", "dpt", "siglip2")),
        (
            by_name(vlm_architectures.ARCHITECTURES),
            (
                "llava", "qwen2_vl, two images of two sizes", "qwen3_vl, one image", "florence2",
                "blip-2, image to text", "vision-encoder-decoder, TrOCR", "vision-encoder-decoder, Donut and Nougat",
            ),
        ),
    )
    for name in names
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_where_the_structure_tells_all_layers_one_pass_finds_the_same(name):
    if why := ALIKE[name].why_not_here():
        pytest.skip(why)
    model = ALIKE[name].build()
    assert set(targets_from(model, ALIKE[name].batch())) == set(encoder_linears(model))


def test_layers_of_single_tokens_and_heads_are_left_out():
    architecture = by_name(architectures.ARCHITECTURES)["regnet"]
    model = architecture.build()
    left_out = set(encoder_linears(model)) - set(targets_from(model, architecture.batch()))
    assert left_out and all(".attention." in name for name in left_out)  # squeeze-and-excitation


def test_a_projection_between_backbone_and_encoder_is_found():
    architecture = by_name(architectures.ARCHITECTURES)["detr"]
    model = architecture.build()
    assert set(targets_from(model, architecture.batch())) - set(encoder_linears(model)) == {"model.input_projection"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Unusual(nn.Module):
    """A model with a block that stands alone, a layer whose weight is read without a call, and a head of two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.embed = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16)
        self.blocks, self.alone, self.read, self.last = (
            nn.ModuleList([Block()]), Block(), nn.Linear(16, 16), nn.ModuleList([Block()])
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 5))
        self.per_token = nn.Linear(16, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        tokens = self.alone(self.blocks[0](self.embed(self.cut(x).flatten(2).transpose(1, 2))))
        tokens = self.last[0](nn.functional.linear(tokens, self.read.weight))
        return self.classify(tokens.mean(1)), self.per_token(tokens)


def test_blocks_that_the_structure_does_not_tell_are_found():
    model = Unusual().eval()
    before = torch.get_rng_state()
    targets = targets_from(model, {"x": images()})
    assert targets == [f"{part}.fc{i}" for part in ("blocks.0", "alone", "last.0") for i in (1, 2)]
    assert torch.equal(torch.get_rng_state(), before) and not model.training and not model.calls
    assert not any(module._forward_pre_hooks for module in model.modules())
    peft = get_peft_model(model, LBPWHTConfig(r=3, target_modules=targets, grad_input_dtype="full"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.train()(images())[1].sum().backward()
    assert {name.removeprefix(PREFIX) for name in layers_of(peft)} == set(targets)
    assert not layout_report(peft).exact and verify_layout(peft, {"x": images()}).left_out == ("read",)


def test_layers_that_lora_has_adapted_are_found_by_their_own_names():
    vit = tiny_vit()
    expected = targets_from(vit, {"pixel_values": images()})
    lora = get_peft_model(vit, LoraConfig(target_modules=["fc1", "q_proj"])).base_model.model
    assert targets_from(lora, {"pixel_values": images()}) == expected


def test_why_there_are_no_targets():
    with pytest.raises(ValueError, match="receives tokens whose places are known"):
        targets_from(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)), {"input": images()})
    model = get_peft_model(tiny_vit(), LBPWHTConfig())
    with pytest.raises(ValueError, match="before get_peft_model"):
        targets_from(model, {"pixel_values": images()})


@pytest.mark.parametrize("batch", [torch.zeros(1, 3, 32, 32), {}, None], ids=["a tensor", "empty", "none"])
def test_the_batch_must_name_its_tensors(batch):
    with pytest.raises(TypeError, match="keyword arguments"):
        targets_from(tiny_vit(), batch)


class Several(nn.Module):
    """Some blocks in a list."""

    def __init__(self, count=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Steps(nn.Module):
    """A list of blocks that is no ModuleList."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        return self.second(self.first(x))


class PooledBlocks(Several):
    def forward(self, x):
        return super().forward(x.mean(1))


class TrunkDecoder(Several):
    """The trunk of a model that is called a decoder."""


class StageHead(Several):
    """A stage of an encoder that is called a head."""


class Parts(nn.Module):
    """An embedding, parts that patches pass through one after another, and a classifier."""

    def __init__(self, *parts):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.classify = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.part_names = [f"part{i}" for i in range(len(parts))]
        for name, part in zip(self.part_names, parts, strict=True):
            self.add_module(name, part)

    def forward(self, x):
        tokens = self.cut(x).flatten(2).transpose(1, 2)
        for name in self.part_names:
            tokens = getattr(self, name)(tokens)
        return self.classify(tokens if tokens.dim() == 2 else tokens.mean(1))


def hidden_layer():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


UNTOLD = {  # parts of models whose structure does not tell all blocks, and which of these parts are the encoder's
    "after the list": (lambda: (Several(1), Steps()), (0, 1)),
    "before the list": (lambda: (Steps(), Several(1)), (0, 1)),
    "between blocks that are told only by a pass": (lambda: (Several(1), Block(), nn.Tanh(), Block()), (0, 1, 3)),
    "a trunk that is called a decoder": (lambda: (Several(1), TrunkDecoder(3)), (0, 1)),
    "a first stage that is called a head": (lambda: (StageHead(), Several(1)), (0, 1)),
    "a small decoder": (lambda: (Several(3), TrunkDecoder(1)), (0,)),
    "a head with a hidden layer": (
        lambda: (Several(1), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))),
        (0,),
    ),
    "blocks after pooling": (lambda: (Several(1), PooledBlocks()), (0,)),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_one_warning_names_where_the_default_differs_from_a_pass(name):
    make, of_encoder = UNTOLD[name]
    model = Parts(*make())
    expected = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(tuple(f"part{i}." for i in of_encoder))
    }
    assert set(targets_from(model, {"x": images()})) == expected
    default = set(encoder_linears(model))
    peft = get_peft_model(model, LBPWHTConfig(r=3, grad_input_dtype="full")).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            peft(images()).sum().backward()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (default != expected)
    for message in messages:
        assert message.startswith(tuple(default ^ expected)) and "targets_from" in message


class Pair(nn.Module):
    """Embeds images and texts, under names of its own, by blocks of the same kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Module(), nn.Module()
        self.left.table, self.right.cut = nn.Embedding(20, 16), nn.Conv2d(3, 16, 4, 4)
        self.left.several, self.right.several = Several(), Several()

    def forward(self, picture, sentence):
        words = self.left.several(self.left.table(sentence)).mean(1)
        return words @ self.right.several(self.right.cut(picture).flatten(2).mT).mean(1).mT


def test_a_text_encoder_that_the_structure_does_not_tell_is_named():
    batch = {"picture": images(), "sentence": torch.arange(14).view(2, 7)}
    model = get_peft_model(Pair(), LBPWHTConfig(r=3, grad_input_dtype="full")).train()
    with pytest.warns(UserWarning, match="no patches of the image pass through") as caught:
        model(**batch).sum().backward()
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("left.several.blocks.0.fc1, left.several.blocks.0.fc2") and "targets_from" in message
    assert all(name.startswith("right.") for name in targets_from(Pair(), batch))
