"""Targets that are found by following the patches of an image through one forward pass."""

import copy
import random
import warnings
import weakref

import architectures
import numpy as np
import pytest
import torch
import vlm_architectures
from models import images, layers_of, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensor
from transformers import TrOCRConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, ViTModel

from lbp_peft import LBPWHTConfig, layout_report, targets_from, verify_layout
from lbp_peft.encoder import encoder_linears
from lbp_peft.layout.without_values import WithoutValues
from lbp_peft.tuner.targets import default_targets, seen_without_values

PREFIX = "base_model.model."


def a_pass_decides(model):
    return seen_without_values(model, encoder_linears(model)) is not None


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


class Alone(Block):
    """A block with a class of its own."""


class InDict(nn.Module):
    """Blocks in a dictionary."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"first": Block(), "second": Block()})

    def forward(self, x):
        return self.blocks["second"](self.blocks["first"](x))


class WithoutSum(nn.Sequential):
    """A head of several layers with a class of its own, which does not add its input."""

    def __init__(self):
        super().__init__(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


UNTOLD_ALONE = {  # the same, where the warnings of a pass say nothing either
    "a trailing block of its own class": (lambda: (Several(2), Alone()), (0, 1)),
    "a first block of its own class": (lambda: (Alone(), Several(2)), (0, 1)),
    "a block and no other": (lambda: (Alone(),), (0,)),
    "blocks in a dictionary": (lambda: (InDict(),), (0,)),
    "blocks in a list and in a dictionary": (lambda: (Several(1), InDict()), (0, 1)),
    "nothing but a trunk that is called a decoder": (lambda: (TrunkDecoder(3),), (0,)),
    "a head of its own class": (lambda: (Several(2), WithoutSum()), (0,)),
}


def layers_in(model, parts):
    """The names of the linear layers in some parts of `Parts`."""
    beginnings = tuple(f"part{i}." for i in parts)
    return {name for name, layer in model.named_modules() if type(layer) is nn.Linear and name.startswith(beginnings)}


def structure_alone(model):
    """The same model, with a hook that keeps a copy of it from being run."""
    model.register_forward_hook(lambda *_: None)
    return model


def warnings_of_training(model, **batch):
    """What the first two training passes warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**batch).sum().backward()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", UNTOLD)
def test_one_warning_names_where_the_structure_differs_from_a_pass(name):
    make, of_encoder = UNTOLD[name]
    model = structure_alone(Parts(*make()))
    expected = layers_in(model, of_encoder)
    assert set(targets_from(model, {"x": images()})) == expected
    default = set(encoder_linears(model))
    peft = get_peft_model(model, LBPWHTConfig(r=3, grad_input_dtype="full")).train()
    assert {name.removeprefix(PREFIX) for name in layers_of(peft)} == default
    messages = warnings_of_training(peft, x=images())
    assert len(messages) == (default != expected)
    for message in messages:
        assert message.startswith(tuple(default ^ expected)) and "targets_from" in message


@pytest.mark.parametrize("name", UNTOLD | UNTOLD_ALONE)
def test_the_default_follows_a_pass_that_needs_no_data(name):
    make, of_encoder = (UNTOLD | UNTOLD_ALONE)[name]
    model = Parts(*make())
    expected = layers_in(model, of_encoder)
    config = LBPWHTConfig(r=3, grad_input_dtype="full")
    peft = get_peft_model(model, config).train()
    assert {name.removeprefix(PREFIX) for name in layers_of(peft)} == set(config.target_modules) == expected
    assert not warnings_of_training(peft, x=images())
    assert not layout_report(peft).exact


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
    model = get_peft_model(structure_alone(Pair()), LBPWHTConfig(r=3, grad_input_dtype="full")).train()
    (message,) = warnings_of_training(model, **batch)
    assert message.startswith("left.several.blocks.0.fc1, left.several.blocks.0.fc2") and "targets_from" in message
    assert "no patches of the image pass through" in message
    assert all(name.startswith("right.") for name in targets_from(Pair(), batch))


def test_a_text_encoder_that_the_structure_does_not_tell_is_left_out_by_default():
    model = get_peft_model(Pair(), LBPWHTConfig(r=3, grad_input_dtype="full")).train()
    assert len(layers_of(model)) == 4 and all(name.startswith(f"{PREFIX}right.") for name in layers_of(model))
    assert not warnings_of_training(model, picture=images(), sentence=torch.arange(14).view(2, 7))


SMALL_VIT = {"image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class ViTWithHead(nn.Module):
    """A whole model that is called a head."""

    def __init__(self):
        super().__init__()
        self.backbone = ViTModel(ViTConfig(**SMALL_VIT, intermediate_size=64), add_pooling_layer=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.backbone(x).last_hidden_state[:, 0])


def test_neither_the_name_of_a_decoder_nor_that_of_a_head_decides():
    assert default_targets(ViTWithHead()) == [f"backbone.{name}" for name in default_targets(ViTWithHead().backbone)]
    words = TrOCRConfig(vocab_size=100, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64)
    vit = ViTConfig(**SMALL_VIT, intermediate_size=64)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, words))
    targets = default_targets(model)
    assert len(targets) == 6 and all(name.startswith("encoder.layers.") for name in targets)


@pytest.mark.parametrize(
    "name", ["vit", "swin", "segformer", "detr", "clip, both towers", "siglip2", "videomae", "timesformer", "imagegpt"]
)
def test_by_default_a_pass_changes_nothing_where_the_structure_is_right(name):
    model = by_name(architectures.ARCHITECTURES)[name].build()
    assert a_pass_decides(model)
    assert default_targets(model) == encoder_linears(structure_alone(model)) == default_targets(model)


def test_layers_whose_tokens_are_in_an_unknown_order_stay():
    model = by_name(architectures.ARCHITECTURES)["vit_mae"].build()
    assert a_pass_decides(model)
    assert default_targets(model) == encoder_linears(model)


def test_layers_of_one_token_of_each_image_are_left_out_by_default():
    model = by_name(architectures.ARCHITECTURES)["regnet"].build()
    left_out = set(encoder_linears(model)) - set(default_targets(model))
    assert left_out == {name for name in encoder_linears(model) if ".attention." in name}


class Pyramid(nn.Module):
    """Two stages, the second of which makes one patch of an image of the size that the model tells."""

    def __init__(self):
        super().__init__()
        self.image_size = 8
        self.cut, self.first, self.merge, self.second = (
            nn.Conv2d(3, 16, 4, 4), nn.ModuleList([Block()]), nn.Conv2d(16, 16, 2, 2), nn.ModuleList([Block()])
        )  # fmt: skip
        self.classify = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first[0](self.cut(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classify(self.second[0](self.merge(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_stages_with_one_patch_of_a_small_image_stay():
    assert a_pass_decides(Pyramid())
    assert default_targets(Pyramid()) == [f"{part}.0.fc{i}" for part in ("first", "second") for i in (1, 2)]


class Noisy(Several):
    """Blocks that write to their own state, draw random numbers and warn."""

    def __init__(self):
        super().__init__()
        self.cut, self.calls = nn.Conv2d(3, 16, 4, 4), []
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x):
        self.calls.append(x.shape)
        self.counter += random.random()
        warnings.warn("noisy", stacklevel=2)
        return super().forward(self.drop(self.norm(self.cut(x).flatten(2)).transpose(1, 2)) * torch.rand(()))


def test_the_pass_leaves_the_model_and_the_generators_as_they_are(capfd, recwarn):
    model = Noisy().eval()
    before, states = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    assert len(default_targets(model)) == 4 and a_pass_decides(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not model.calls and not model.training and model.norm.num_batches_tracked == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not recwarn.list and capfd.readouterr() == ("", "")


class Choosing(Parts):
    """A model whose code needs values."""

    def forward(self, x):
        return super().forward(x) if x.mean() < 2 else None


class Exporting(Parts):
    """A model that writes to its tokens' memory in another library."""

    def __init__(self, *parts, export=torch.from_dlpack):
        super().__init__(*parts)
        self.export = export

    def forward(self, x):
        tokens = self.cut(x).detach()
        self.export(tokens)[:] = 0
        return super().forward(x)


def through_a_capsule(tokens):
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tokens))


class Asking(Parts):
    """A model with an argument that nothing is known of."""

    def forward(self, x, scale):
        return super().forward(x * scale)


def replaced_forward(model):
    model.part0.forward = model.part0.forward
    return model


def with_calls_counted(model):
    model.calls = []
    model.part0.register_forward_pre_hook(lambda *_: model.calls.append(1))
    return model


class WithClosure(Parts):
    """A model with a function that reads one of its modules, which a copy of the model would share."""

    def __init__(self, *parts):
        super().__init__(*parts)
        norm = self.norm = nn.BatchNorm1d(16)
        self.normalise = [lambda tokens: norm(tokens.mT).mT]

    def forward(self, x):
        return super().forward(x) + self.normalise[0](self.cut(x).flatten(2).mT).sum()


class WithReference(Parts):
    """A model that refers to itself by a weak reference, which a copy would share."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.reference = weakref.ref(self)

    def forward(self, x):
        self.reference().last = x
        return super().forward(x)


def with_an_array(model):
    model.bank = {"features": np.zeros(2**24, dtype=np.float16)}
    return model


CANNOT_BE_RUN = {
    "a function of a module": lambda: WithClosure(Several(2), Alone()),
    "a weak reference": lambda: WithReference(Several(2), Alone()),
    "a large array": lambda: with_an_array(Parts(Several(2), Alone())),
    "its code needs values": lambda: Choosing(Several(2), Alone()),
    "its code exports memory": lambda: Exporting(Several(2), Alone()),
    "its code exports memory unseen": lambda: Exporting(Several(2), Alone(), export=through_a_capsule),
    "its arguments are not known": lambda: Asking(Several(2), Alone()),
    "a hook": lambda: with_calls_counted(Parts(Several(2), Alone())),
    "a forward method that was replaced": lambda: replaced_forward(Parts(Several(2), Alone())),
    "an attribute that cannot be copied": lambda: Parts(Several(2), Uncopied()),
}


class Uncopied(Alone):
    def __deepcopy__(self, memo):
        raise NotImplementedError("there is one of these")


@pytest.mark.parametrize("name", CANNOT_BE_RUN)
def test_where_a_copy_cannot_be_run_the_structure_decides(name, recwarn):
    model = CANNOT_BE_RUN[name]()
    assert default_targets(model) == encoder_linears(model) and len(encoder_linears(model)) == 4
    assert not recwarn.list and not getattr(model, "calls", []) and not hasattr(model, "last")
    assert not any(buffer.any() for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked"))


KEPT = {}


class Caching(Parts):
    """A model whose code keeps a tensor outside of it."""

    def forward(self, x):
        tokens = self.cut(x).flatten(2).mT
        ones = KEPT.setdefault(tokens.shape[1], x.new_ones(1, tokens.shape[1], 1))
        return super().forward(x) + (tokens * ones).sum()


def test_tensors_of_the_pass_that_code_keeps_are_told_and_never_used_in_training():
    model = Caching(Several(2), Alone())
    with pytest.warns(UserWarning, match="kept some of these.*target_modules"):
        adapted = get_peft_model(model, LBPWHTConfig())
    x = torch.randn(2, 3, 224, 224)
    with pytest.raises(Exception, match="FakeTensor"):
        adapted(x)
    KEPT.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = get_peft_model(Caching(Several(2), Alone()), LBPWHTConfig(target_modules=["fc1", "fc2"]))
    assert adapted(x).isfinite().all()


def test_tensors_in_lists_are_not_copied():
    model = Parts(Several(2), Alone())
    model.bank = [torch.zeros(2**22)]
    copied = WithoutValues().copy_of(model)
    assert isinstance(copied.bank[0], FakeTensor) and type(model.bank[0]) is torch.Tensor and a_pass_decides(model)


def test_scripted_parts_do_not_matter():
    model = Parts(Several(2), Alone())
    model.add_module("part2", torch.jit.script(nn.Hardswish()))
    model.part_names.append("part2")
    assert {f"part0.blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)} <= set(default_targets(model))
    assert get_peft_model(model, LBPWHTConfig())(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_parameters_without_memory_are_enough():
    with torch.device("meta"):
        model = ViTModel(ViTConfig(hidden_size=8192, intermediate_size=32768, num_hidden_layers=2))
        wrapped = Parts(Several(2), Alone())
    assert default_targets(model) == encoder_linears(model)
    assert set(default_targets(wrapped)) == layers_in(wrapped, (0, 1))


def test_a_further_adapter_and_one_that_is_stacked_get_the_same_layers():
    model = get_peft_model(Parts(Several(2), Alone()), LBPWHTConfig())
    model.add_adapter("other", LBPWHTConfig())
    assert model.peft_config["other"].target_modules == model.peft_config["default"].target_modules
    expected = layers_in(Parts(Several(2), Alone()), (0, 1))
    assert set(model.peft_config["other"].target_modules) == expected
    lora = get_peft_model(Parts(Several(2), Alone()), LoraConfig(target_modules=["fc1", "fc2"]))
    stacked = get_peft_model(lora, LBPWHTConfig(train_base_weight=False, grad_input_dtype="full"))
    assert set(stacked.peft_config["default"].target_modules) == expected


def test_the_default_device_does_not_matter():
    model = Parts(Several(2), Alone())
    with torch.device("meta"):
        assert set(default_targets(model)) == layers_in(model, (0, 1))
