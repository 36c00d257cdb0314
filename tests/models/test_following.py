"""Positions of tokens are followed from the image, not guessed from their number: cases in which a guess is wrong."""

import copy
import gc
import itertools
import os
import random
import threading
import warnings
import weakref
from collections import deque
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import reference
import torch
import transformers
from arranged import SIDE, Net, adapted, close, expected_gradient, found, gradients, last_layer
from models import images, largest_difference, layers_of, tiny_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lbp_peft import exact_backward, layout_report, verify_layout
from lbp_peft.layout import recognition
from lbp_peft.layout.inputs import assign_positions
from lbp_peft.layout.operations import registry
from lbp_peft.layout.positions import column_of, number_of, row_of
from lbp_peft.layout.recognition import UnknownLayoutError, read_layout
from lbp_peft.layout.tracer import PositionTracer


@contextmanager
def without_garbage_collection():
    """Switch garbage collection off, so that objects in reference cycles stay alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


FIXED = random.Random(5).sample(range(SIDE**2), SIDE**2)


def put(where, tokens):
    where[:, FIXED] = tokens
    return where


def with_data(where, data):
    where.data = data
    return where


def unfolded_and_folded(tokens):
    image = tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    fold = nn.functional.fold(nn.functional.unfold(image, 2, stride=2), (SIDE, SIDE), 2, stride=2)
    return fold.flatten(2).transpose(1, 2)


def test_an_output_argument_loses_the_tokens():
    def into(t):
        return torch.index_select(t.detach(), 1, torch.tensor(FIXED), out=torch.empty_like(t.detach())) + t.mean()

    model = adapted(Net(into))
    with pytest.warns(UserWarning, match="uses exact backpropagation.*'index_select'"):
        model(images()).sum().backward()
    assert found(model) == {None}


ARRANGEMENTS = {
    # the order of the tokens: a function that makes (images, tokens row by row, C) of them
    "row by row": (lambda t: t, lambda t: t),
    "sequence first": (lambda t: t.transpose(0, 1), lambda t: t.transpose(0, 1)),
    "channels last": (lambda t: t.unflatten(1, (SIDE, SIDE)), lambda t: t.flatten(1, 2)),
    "rows, images, columns": (
        lambda t: t.unflatten(1, (SIDE, SIDE)).transpose(0, 1), lambda t: t.transpose(0, 1).flatten(1, 2)),
    "column by column": (lambda t: t.unflatten(1, (SIDE, SIDE)).transpose(1, 2).flatten(1, 2), None),
    "upside down": (lambda t: t.flip(1), None),
    "packed": (lambda t: t.flatten(0, 1), lambda t: t.unflatten(0, (2, -1))),
    "in a fixed order": (lambda t: t[:, torch.arange(SIDE**2).view(2, -1).t().flatten()], None),
    "rolled": (lambda t: t.unflatten(1, (SIDE, SIDE)).roll((2, 3), (1, 2)).flatten(1, 2), None),
    "put in a fixed order": (lambda t: put(torch.empty_like(t), t), None),
    "taken in a fixed order": (lambda t: torch.take_along_dim(t, torch.tensor(FIXED)[None, :, None], 1), None),
    "in a fixed order, by its data": (lambda t: with_data(t.clone(), t.data[:, FIXED]), None),
    "joined from the last part to the first": (lambda t: torch.cat(t.chunk(4, 1)[::-1], 1), None),
    "unfolded and folded": (lambda t: unfolded_and_folded(t), lambda t: t),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_tokens_in_any_arrangement_are_projected_on_the_bases_of_their_grid(name):
    arrange, restore = ARRANGEMENTS[name]
    model = adapted(Net(arrange))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gradient, x, g = last_layer(model)
    bases = reference.orthogonal_bases((SIDE, SIDE), 3)
    places = arrange(torch.arange(float(SIDE**2)).view(1, -1, 1).expand(2, -1, 1))
    if restore is None:  # the same bases, their columns in the order of the tokens
        order = places[0, :, 0].long()
        rolled = torch.arange(SIDE**2) if name in ("upside down", "column by column") else order
        x, g, bases = x, g, bases[:, rolled]
    else:
        x, g = restore(x), restore(g)
    assert close(gradient, expected_gradient(x, g, bases))
    assert not layout_report(model).exact and verify_layout(model, {"x": images()}).ok


def test_windows_of_six_axes():
    """Twins has such windows. Windows below one another are one grid."""
    model = adapted(Net(lambda t: t.unflatten(1, (2, 4, 2, 4)).transpose(2, 3)))
    gradient, x, g = last_layer(model)
    x, g = (t.permute(0, 2, 1, 3, 4, 5).reshape(4, SIDE * 4, -1) for t in (x, g))
    assert {(layout.grid, layout.axes) for layout in found(model)} == {((SIDE, 4), (1, 3, 4))}
    assert close(gradient, expected_gradient(x, g, reference.orthogonal_bases((SIDE, 4), 3)))


@pytest.mark.parametrize("num_images", [2, SIDE**2])
def test_as_many_images_as_tokens_are_no_grid(num_images):
    model = adapted(Net(lambda t: t.transpose(0, 1)))
    gradients(model, images(num_images))
    assert {layout.axes for layout in found(model)} == {(0,)}


class Mixer(nn.Module):
    """A layer that mixes 64 patches, for each of 64 features: its 64 "tokens" are features."""

    def __init__(self):
        super().__init__()
        self.cut, self.blocks = nn.Conv2d(3, 64, 4, 4), nn.ModuleList([nn.ModuleDict({"mix": nn.Linear(64, 64)})])

    def forward(self, x):
        x = self.cut(x).flatten(2)
        return x + self.blocks[0]["mix"](x)


def shuffled_by_data(tokens):
    order = tokens[..., 0].argsort(1)
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))


def without_one(tokens):
    return tokens[:, torch.arange(SIDE**2) != 20]


def gated(tokens):
    return shuffled_by_data(tokens) * tokens.mean(2, keepdim=True)


def changed_under_a_view(tokens, write):
    """A view that was taken before the tokens were written in another order, in the same memory."""
    other = tokens.detach().clone()
    view = other[:]
    write(other, tokens.detach()[:, FIXED])
    return view + tokens.mean()


def by_an_index_written_in_part(tokens):
    order = torch.zeros(SIDE**2, dtype=torch.long)
    order[:].copy_(tokens[0, :, 0].argsort())
    return tokens[:, order]


def halves(tokens, function):
    """The tokens of an image whose upper and lower halves were changed, or exchanged, and that was then upsampled."""
    image = torch.cat(function(tokens.unflatten(1, (SIDE, SIDE)).chunk(2, 1)), 1).movedim(-1, 1)
    return nn.functional.interpolate(image, scale_factor=2).flatten(2).transpose(1, 2)


def pooled(tokens, rows):
    """The tokens of an image whose rows were brought into another order, and that was then pooled."""
    image = tokens.unflatten(1, (SIDE, SIDE))[:, rows].movedim(-1, 1)
    return nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)


LOST = {
    "rows in another order, pooled": lambda: Net(lambda t: pooled(t, [3, 6, 1, 4, 7, 2, 5, 0])),
    "flipped halves, upsampled": lambda: Net(lambda t: halves(t, lambda parts: [part.flip(1) for part in parts])),
    "exchanged halves, upsampled": lambda: Net(lambda t: halves(t, lambda parts: parts[::-1])),
    "added in another order": lambda: Net(lambda t: (t * 0).index_add(1, torch.tensor(FIXED), t)),
    "added at other places": lambda: Net(
        lambda t: (t * 0).scatter_add(1, torch.tensor(FIXED)[None, :, None].expand(2, -1, 16), t)
    ),
    "a factor by name": lambda: Net(lambda t: torch.matmul(input=t, other=torch.eye(16))),
    "written under a view": lambda: Net(partial(changed_under_a_view, write=lambda x, y: x.__setitem__(..., y))),
    "an output argument that has a view": lambda: Net(
        partial(changed_under_a_view, write=lambda x, y: torch.mul(y, 1, out=x))
    ),
    "by an index that a view has changed": lambda: Net(by_an_index_written_in_part),
    "shuffled, times a gate in order": lambda: Net(gated),
    "a mixer's features": Mixer,
    "their neighbours, by their values": lambda: Net(
        lambda t: torch.where(t[..., :1] > 0, t.unflatten(1, (8, 8)).roll(1, 2).flatten(1, 2), t)
    ),
    "shuffled by their values": lambda: Net(shuffled_by_data),
    "shuffled by chance": lambda: Net(lambda t: t[:, torch.randperm(SIDE**2)]),
    "picked by their values": lambda: Net(lambda t: t[:, t[0, :, 0].topk(49).indices]),
    "one is missing": lambda: Net(without_one),
    "by an operation that is not known": lambda: Net(lambda t: torch.fft.fft(t, dim=1).real),
    "two images in a row": lambda: Net(lambda t: torch.cat((t, t.flip(0)), 1)[:, : 2 * SIDE**2 - 3]),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_not_known_is_exact_with_one_warning(name):
    model = adapted(LOST[name]())
    with pytest.warns(
        UserWarning, match=r"uses exact backpropagation.* (Set grid_size|Give the model images)"
    ) as caught:
        torch.manual_seed(1)
        low = gradients(model, images())
    assert len([w for w in caught if "exact backpropagation" in str(w.message)]) == 1
    assert found(model) == {None}
    torch.manual_seed(1)
    with exact_backward(model):
        assert largest_difference(low, gradients(model, images())) == 0


@pytest.mark.parametrize(
    ("rows", "grid", "num_outside"),
    [
        ([6, 7, 0, 1, 2, 3, 4, 5], (4, 4), 0),
        ([1, 0, 3, 2, 5, 4, 7, 6], (4, 4), 0),
        ([7, 0, 1, 2, 3, 4, 5, 6], (3, 4), 4),  # the first row is a mixture of the last one and the first one
    ],
)
def test_neighbours_that_are_pooled_keep_their_place(rows, grid, num_outside):
    model = adapted(Net(lambda t: pooled(t, rows)))
    model(images())
    assert {(layout.grid, layout.num_prefix_tokens) for layout in found(model)} == {(grid, num_outside)}


def test_the_warning_tells_tokens_at_the_same_place():
    with pytest.warns(UserWarning, match="several of its tokens lie at the same place"):
        adapted(Net(lambda tokens: tokens[:, [0, *range(63)]]))(images())


def test_the_warning_names_the_operation_that_lost_the_tokens():
    model = adapted(Net(lambda t: torch.fft.fft(t, dim=1).real))
    with pytest.warns(UserWarning, match="blocks.0.fc .*positions were lost in 'fft_fft'"):
        gradients(model, images())


def test_images_picked_by_chance_keep_their_grid():
    """Stochastic depth runs a block on some of the images."""

    class OnSome(Net):
        def forward(self, x):
            tokens = self.cut(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                some = torch.randperm(len(tokens))[: int(0.7 * len(tokens))]
                tokens = tokens.index_add(0, some, block["fc"](tokens[some]))
            return tokens

    model = adapted(OnSome())
    for _ in range(2):
        gradients(model, images(8))
    assert {layout.grid for layout in found(model)} == {(SIDE, SIDE)}


class TwoEmbeddings(nn.Module):
    """Two streams of 64 tokens each, 8 x 8 and 16 x 4 patches, which are embedded before either is encoded."""

    def __init__(self, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.square, self.flat = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(3, 16, (2, 8), (2, 8))
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(16, 16)}) for _ in range(1 if shared else 2)])

    def forward(self, x, way=None):
        streams = [cut(x).flatten(2).transpose(1, 2) for cut in (self.square, self.flat)]
        outputs = []
        for index, tokens in enumerate(streams):
            tokens.requires_grad_()  # or use_reentrant=True would train nothing
            block = self.blocks[index % len(self.blocks)]["fc"]
            run = block if way is None else lambda t, block=block: checkpoint(block, t, use_reentrant=way)
            outputs.append(run(tokens))
        return outputs[0] * outputs[1]


def test_each_stream_has_its_own_grid():
    model = adapted(TwoEmbeddings())
    gradients(model, images())
    assert [ran.layout.grid for ran in layout_report(model).layers.values()] == [(8, 8), (16, 4)]


@pytest.mark.parametrize("way", [True, False])
@pytest.mark.parametrize("shared", [False, True])
def test_each_call_of_a_layer_that_is_run_again_has_its_own_grid(shared, way):
    model = adapted(TwoEmbeddings(shared), grad_input_rank=3)
    expected = gradients(model, images())
    assert largest_difference(gradients(model, images(), way=way), expected) < 1e-6


def test_a_replaced_patch_embedding_is_seen():
    model = adapted(Net())
    gradients(model, images())
    net = model.base_model.model
    net.cut = nn.Conv2d(3, 16, (2, 8), (2, 8))
    gradients(model, images())
    assert {layout.grid for layout in found(model)} == {(16, 4)}


def test_a_text_that_comes_sequence_first():
    torch.manual_seed(0)
    size = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    model = adapted(transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**size)))
    model(input_ids=torch.randint(1, 50, (24, 32))).logits.sum().backward()
    assert {(layout.grid, layout.axes) for layout in found(model)} == {((1, 32), (0,))}


def test_a_mask_belongs_to_its_own_pass():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **size))
    model = adapted(model, r=20)
    ids, mask, other = torch.randint(1, 50, (2, 24)), *torch.ones(2, 2, 24, dtype=torch.long)
    mask[0, 15:], other[1, 3:] = 0, 0
    embeds = torch.randn(2, 24, 16)
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"inputs_embeds": embeds},
                   {"inputs_embeds": embeds, "attention_mask": other}):  # fmt: skip
        model(**inputs).logits.sum().backward()
    assert {layout.grid for layout in found(model)} == {(1, 24)}


# Several grids one after another


def two_sizes(tokens):
    """Join the tokens of a square image and of a part of it in one sequence."""
    part = tokens.unflatten(1, (SIDE, SIDE))[:, 2:6].flatten(1, 2)
    return torch.cat((tokens[:1], part[1:]), 1)


def scales(tokens):
    pooled = nn.functional.avg_pool2d(tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE)), 2).flatten(2).transpose(1, 2)
    return torch.cat((tokens, pooled), 1)


def windows_with_a_token_each(tokens):
    windows = tokens.unflatten(1, (2, 4, 2, 4)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return torch.cat((torch.zeros_like(windows[:, :, :1]), windows), 2).flatten(1, 2)


def padded(tokens):
    """Fill up the tokens of images of two sizes to one length."""
    filled = torch.zeros_like(tokens[1:])
    filled[:, :24] = tokens[1:].unflatten(1, (SIDE, SIDE))[:, :4, :6].flatten(1, 2)
    return torch.cat((tokens[:1], filled))


SEVERAL = {
    # name: an arrangement, and the grids with the tokens before each
    "images of two sizes": (two_sizes, [(8, 8, 0), (4, 8, 0)]),
    "scales": (scales, [(8, 8, 0), (4, 4, 0)]),
    "windows with a token each": (windows_with_a_token_each, [(4, 4, 1)] * 4),
    "images filled up": (padded, [(8, 8, 0), (4, 6, 0)]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_each_of_several_grids_has_its_own_bases(name):
    arrange, grids = SEVERAL[name]
    model = adapted(Net(arrange))
    gradient, x, g = last_layer(model)
    (layout,) = found(model)
    parts = getattr(layout, "parts", (layout,) * layout.packed)
    assert [(*part.grid, part.num_prefix_tokens) for part in parts] == grids
    if layout.axes == (0, 1):
        x, g = x.flatten(0, 1)[None], g.flatten(0, 1)[None]
    blocks = []
    for part in parts:
        before, after = torch.eye(part.num_prefix_tokens), torch.eye(part.num_suffix_tokens)
        blocks.append(torch.block_diag(before, reference.orthogonal_bases(part.grid, 3), after))
    assert close(gradient, expected_gradient(x, g, torch.block_diag(*blocks).double()))
    assert verify_layout(model, {"x": images()}).ok
    assert "8 x 8" in str(layout_report(model)) or "4 x 4" in str(layout_report(model))


# What the model's code may depend on, besides the shapes of its inputs


def rolled(tokens, places):
    return tokens.unflatten(1, (SIDE, SIDE)).roll(places, 1).flatten(1, 2)


class Ordered(Net):
    """A model that puts its tokens in the order that a buffer holds."""

    def __init__(self):
        super().__init__(lambda tokens: tokens[:, self.order])
        self.register_buffer("order", torch.arange(SIDE**2))


class Counting(Net):
    """A model that rolls its tokens by an attribute, which it changes."""

    offset = 0

    def __init__(self):
        super().__init__(lambda tokens: rolled(tokens, self.count + self.offset))
        self.count = 0

    def forward(self, x):
        self.count = (self.count + 1) % 3
        return super().forward(x)


def _shuffle(model):
    model.order = torch.randperm(SIDE**2)


def _shuffle_in_place(model):
    model.order.copy_(torch.randperm(SIDE**2))


settings, generator = {"places": 0}, random.Random(0)
PLACES = 0


def _change_setting(model):
    settings["places"] += 1


def _change_class(model):
    type(model).offset += 1


def _change_global(model):
    globals()["PLACES"] += 1


def _change_list(model):
    LONG[-1] += 1


def _change_array(model):
    ARRAY[0] += 1


def _change_number(model):
    globals()["NUMBER"] += 1


def _change_slot(model):
    slotted.places += 1


def rolled_by_a_global(tokens):
    return rolled(tokens, PLACES)


class Slotted:
    __slots__ = ("places",)


slotted, turns, LONG, ARRAY = Slotted(), itertools.cycle(range(3)), [0] * 1000, np.zeros(1, dtype=int)
NUMBER = np.int64(0)
slotted.places = 0


DECISIONS = {
    # name: a model, what is done before each pass, and how often five passes are traced
    "random numbers": (lambda: Net(lambda t: rolled(t, random.randrange(8))), None, 5),
    "random numbers of NumPy": (lambda: Net(lambda t: rolled(t, int(np.random.randint(8)))), None, 5),
    "a generator of its own": (lambda: Net(lambda t: rolled(t, generator.randrange(8))), None, 5),
    "a random tensor's value": (lambda: Net(lambda t: rolled(t, torch.randint(8, ()).item())), None, 5),
    "a list of random values": (lambda: Net(lambda t: t[:, torch.randperm(SIDE**2).tolist()]), None, 5),
    "values of the data": (lambda: Net(lambda t: t[:, t[0, :, 0].argsort().tolist()]), None, 5),
    "a variable of its closure": (lambda: Net(lambda t: rolled(t, settings["places"])), _change_setting, 5),
    "a global variable": (lambda: Net(lambda t: rolled(t, PLACES)), _change_global, 5),
    "an iterator": (lambda: Net(lambda t: rolled(t, next(turns))), None, 5),
    "a method of an iterator": (lambda: Net(partial(lambda turn, t: rolled(t, turn()), turns.__next__)), None, 5),
    "a method of a queue": (lambda: Net(partial(lambda pop, t: rolled(t, pop()), deque(range(9)).popleft)), None, 5),
    "a long list": (lambda: Net(lambda t: rolled(t, LONG[-1])), _change_list, 5),
    "an array that is changed in place": (lambda: Net(lambda t: rolled(t, int(ARRAY[0]))), _change_array, 5),
    "a number of NumPy": (lambda: Net(lambda t: rolled(t, int(NUMBER))), _change_number, 5),
    "a slot": (lambda: Net(lambda t: rolled(t, slotted.places)), _change_slot, 5),
    "a global variable of a function": (lambda: Net(lambda t: rolled_by_a_global(t)), _change_global, 5),
    "an attribute": (Counting, None, 3),
    "an attribute of its class": (Counting, _change_class, 5),
    "a buffer that is replaced": (Ordered, _shuffle, 5),
    "a buffer that is changed in place": (Ordered, _shuffle_in_place, 5),
    "nothing": (Net, None, 1),
}


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.filterwarnings("ignore:Each forward pass is traced")
def test_what_pythons_code_decides_is_followed_in_each_pass(name, monkeypatch):
    build, change, num_traced = DECISIONS[name]
    model = adapted(build())
    net, first = model.base_model.model, next(iter(layers_of(model).values()))
    traced, seen = [], {}
    trace = PositionTracer.__init__
    monkeypatch.setattr(PositionTracer, "__init__", lambda self, *given: traced.append(given) or trace(self, *given))
    first.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0].detach()))
    x = images()
    for _ in range(5):
        if change is not None:
            change(net)
        model(x).sum().backward()
        in_order = net.cut(x).detach().flatten(2).transpose(1, 2)
        expected = torch.cdist(seen["tokens"][0], in_order[0]).argmin(1).tolist()
        layout = layout_report(model).layers[first.layer_name].layout
        assert list(layout.order or range(SIDE**2)) == expected
    assert len(traced) == num_traced


class CutByReshaping(Net):
    """A model that cuts patches of 4 x 4 pixels by a view of the image."""

    def __init__(self, embed):
        super().__init__(width=48)
        self.embed = embed

    def forward(self, x):
        x = x.unflatten(2, (SIDE, 4)).unflatten(4, (SIDE, 4)).permute(0, 2, 4, 1, 3, 5)
        tokens = self.embed(x.flatten(3).flatten(1, 2))
        for block in self.blocks:
            tokens = tokens + torch.tanh(block["fc"](tokens))
        return tokens


ORIGINS = {
    "convolution": (Net, "cut", 2),
    "linear layer": (lambda: CutByReshaping(nn.Linear(48, 48)), "embed", 0),
    "no layer": (lambda: CutByReshaping(nn.Identity()), "x", 5),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_a_report_says_where_a_grid_was_followed_from(name):
    build, origin, steps = ORIGINS[name]
    model = adapted(build(), target_modules=["fc"])
    model(images())
    first = next(iter(layout_report(model).layers.values()))
    assert first.layout.grid == (SIDE, SIDE)
    assert first.known_by == f"followed from {origin} through {steps} operation{'s' * (steps != 1)}"


def test_a_report_says_which_of_two_embeddings_a_grid_was_followed_from():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = Net(), Net()
            self.coarse.cut = nn.Conv2d(3, 16, 8, 8)

        def forward(self, x):
            return self.fine(x).sum() + self.coarse(x).sum()

    model = adapted(Two())
    model(images()).backward()
    for name, ran in layout_report(model).layers.items():
        assert ran.known_by.startswith(f"followed from {name.split('.')[0]}.cut through")
    assert "The grids were" not in str(layout_report(model))


@pytest.mark.parametrize("decision", [lambda t: random.random(), lambda t: t.sum().item()])
def test_a_model_that_is_traced_in_each_pass_says_why(decision):
    model = adapted(Net(lambda t: rolled(t, int(decision(t)))))
    with pytest.warns(
        UserWarning, match=r"Each forward pass is traced.*(random numbers|item in test_following.py:\d+)"
    ):
        model(images()).sum().backward()


def test_code_after_the_last_layer_decides_nothing():
    class WithLoss(Net):
        def forward(self, x):
            y = super().forward(x)
            return y * random.random() if y.sum().item() > 0 else y

    model = adapted(WithLoss())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            model(images()).sum().backward()


class Stepped(Net):
    def forward(self, x, step=0, names=(), options=None):
        places = step % 3 + len(names) + (options.places if options else 0)
        tokens = rolled(self.cut(x).flatten(2).transpose(1, 2), places)
        for block in self.blocks:
            tokens = tokens + torch.tanh(block["fc"](tokens))
        return tokens


class Options:
    def __init__(self, places):
        self.places = places


@pytest.mark.parametrize("argument", ["step", "names", "options"])
def test_arguments_that_are_no_tensors_decide(argument):
    model = adapted(Stepped())
    values = {"step": range(12), "names": [["a"] * n for n in range(12)], "options": [Options(n) for n in range(12)]}
    with pytest.warns(UserWarning, match=f"traced again and again.*the argument '{argument}'") as caught:
        for value in values[argument]:
            model(images(), **{argument: value}).sum().backward()
            places = value % 3 if argument == "step" else len(value) if argument == "names" else value.places
            orders = {layout.order for layout in found(model)}
            assert orders == {None if places % SIDE == 0 else _rows_from(-places % SIDE)}
    assert len([w for w in caught if "again and again" in str(w.message)]) == 1


def _rows_from(first):
    return tuple(torch.arange(SIDE**2).view(SIDE, SIDE).roll(-first, 0).flatten().tolist())


@pytest.mark.filterwarnings("ignore:Each forward pass is traced")
@pytest.mark.parametrize("way", [True, False])
def test_a_pass_with_decisions_is_run_again_with_its_own_layouts(way):
    class Checkpointed(Net):
        def forward(self, x):
            tokens = rolled(self.cut(x).flatten(2).transpose(1, 2), random.randrange(8)).requires_grad_()
            for block in self.blocks:
                tokens = tokens + torch.tanh(checkpoint(block["fc"], tokens, use_reentrant=way))
            return tokens

    def run(model):
        random.seed(0)
        return sum(model(images(seed=seed)).square().sum() for seed in range(3))

    with exact_backward(model := adapted(Checkpointed(), r=64)):
        expected = gradients_of(model, run)
    assert largest_difference(gradients_of(model, run), expected) < 1e-4
    assert largest_difference(gradients_of(adapted(Checkpointed(), r=3), run), expected) > 1e-2


def test_sizes_that_change_unseen_are_exact_and_told_if_that_lasts(monkeypatch):
    def crop(tokens):
        return tokens.unflatten(1, (SIDE, SIDE))[:, : int(os.environ["HEIGHT"])].flatten(1, 2)

    model = adapted(Net(crop))
    with pytest.warns(UserWarning, match="blocks.0.fc uses exact backpropagation in some of the forward passes"):
        for height in (SIDE, 4) * 3:
            monkeypatch.setenv("HEIGHT", str(height))
            low = gradients(model, images())
    with exact_backward(model):
        assert largest_difference(low, gradients(model, images())) == 0


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class BlocksOfADecoder(nn.Sequential):
    """Blocks that are part of the encoder in spite of their name."""


class Named(nn.Module):
    """An encoder with a part that is called a decoder and one that is no list of blocks, a projection and a head."""

    def __init__(self, reads_weight=False):
        super().__init__()
        self.reads_weight = reads_weight
        self.cut = nn.Conv2d(3, 16, 4, 4)
        self.first, self.last = nn.ModuleList([Block()]), nn.ModuleList([Block(32)])
        self.middle = BlocksOfADecoder(Block(), Block())
        self.alone, self.project, self.head = Block(), nn.Linear(16, 32), nn.Linear(32, 32)

    def forward(self, x):
        tokens = self.alone(self.middle(self.first[0](self.cut(x).flatten(2).transpose(1, 2))))
        tokens = nn.functional.linear(tokens, self.project.weight) if self.reads_weight else self.project(tokens)
        return self.head(self.last[0](tokens))


@pytest.mark.parametrize("reads_weight", [False, True])
def test_the_first_pass_tells_what_the_default_targets_left_out(reads_weight):
    plain = Named(reads_weight)
    plain.register_forward_hook(lambda *_: None)  # so that the structure alone decides
    model = adapted(plain)
    with pytest.warns(UserWarning, match="patches of the image pass through") as caught:
        for _ in range(2):
            model(images()).sum().backward()
    (message,) = [str(w.message) for w in caught if "pass through" in str(w.message)]
    assert message.startswith("middle.0.fc1, middle.0.fc2, middle.1.fc1 and 3 more are not adapted")
    assert "target_modules" in message
    left_out = verify_layout(model, {"x": images()}).left_out
    assert set(left_out) == {f"{part}.fc{i}" for part in ("middle.0", "middle.1", "alone") for i in (1, 2)} | {
        "project"
    }


@pytest.mark.parametrize("settings", [{"target_modules": ["fc1"]}, {"exclude_modules": ["last.0.fc1"]}])
def test_what_was_left_out_on_purpose_is_no_cause_for_a_warning(settings):
    model = adapted(Named(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(images()).sum().backward()


def test_layers_that_were_left_out_are_listed():
    model = adapted(tiny_vit(), target_modules=["fc1"])
    left_out = verify_layout(model, {"pixel_values": images()}).left_out
    assert {name.rpartition(".")[2] for name in left_out} == {"fc2", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert not verify_layout(adapted(tiny_vit()), {"pixel_values": images()}).left_out


def test_numbers_held_by_tensors_lose_the_tokens_that_they_move():
    model = adapted(Net(lambda t: rolled(t, torch.randint(8, ()))))
    with pytest.warns(UserWarning, match="positions were lost in 'roll'"):
        model(images()).sum().backward()


@pytest.mark.parametrize("added", [-torch.inf, -10000.0, torch.finfo(torch.float32).min])
def test_masks_that_are_added_and_masks_of_padding_tell_the_same(added):
    from lbp_peft.layout.masks import mask_of, padding_mask_of

    keep = torch.arange(6) < torch.tensor([[4], [6]])
    for name, mask in (("attention_mask", keep.long()), ("attention_mask", keep.float()),
                       ("attention_mask", torch.zeros(2, 6).masked_fill(~keep, added)),
                       ("key_padding_mask", ~keep)):  # fmt: skip
        assert torch.equal(padding_mask_of(name, mask), ~keep)
        assert mask_of({name: mask}, "input_ids") is mask
    assert not padding_mask_of("attention_mask", torch.zeros(2, 6)).any()  # added to the scores: nothing is padding


# Passes and their reruns


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def gradients_of(model, run):
    model.zero_grad()
    run(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_at(model, height, width, count=2):
    return model(images(count, height, width), interpolate_pos_encoding=True).logits.square().sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_exact_backward_reaches_layers_that_are_run_again(reentrant):
    def run(model):
        with exact_backward(model):
            return model(images()).logits.square().sum()

    expected = gradients_of(adapted(tiny_vit(), grad_input_rank=6), run)
    found = gradients_of(checkpointed(adapted(tiny_vit(), grad_input_rank=6), reentrant), run)
    assert largest_difference(found, expected) < 1e-5


def test_blocks_of_exact_backward_may_end_in_any_order():
    """Blocks of two threads, or of a model and of a part of it, do so."""
    model = adapted(tiny_vit(), grad_input_rank=6)
    low = gradients_of(model, lambda m: m(images()).logits.square().sum())
    with exact_backward(model):
        exact_loss = model(images()).logits.square().sum()
    exact = gradients_of(model, lambda m: exact_loss)

    first, second = exact_backward(model), exact_backward(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    within = gradients_of(model, lambda m: m(images()).logits.square().sum())
    second.__exit__(None, None, None)
    after = gradients_of(model, lambda m: m(images()).logits.square().sum())
    assert largest_difference(within, exact) < 1e-5 and largest_difference(after, low) < 1e-5
    assert largest_difference(exact, low) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_exact_pass_and_one_low_rank_pass_before_one_backward(reentrant):
    def run(model):
        low = model(images()).logits.square().sum()
        with exact_backward(model):
            return low + model(images(seed=5)).logits.square().sum()

    expected = gradients_of(adapted(tiny_vit(), grad_input_rank=6), run)
    found = gradients_of(checkpointed(adapted(tiny_vit(), grad_input_rank=6), reentrant), run)
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("passes", [((32, 32, 4), (32, 32, 3)), ((32, 64, 2), (64, 32, 2)), ((16, 64, 2), (32, 32, 1))])
def test_batches_of_other_sizes_before_one_backward(passes, reentrant):
    def run(model):
        return sum(loss_at(model, *sizes) for sizes in passes)

    expected = gradients_of(adapted(tiny_vit(), grad_input_rank=6), run)
    found = gradients_of(checkpointed(adapted(tiny_vit(), grad_input_rank=6), reentrant), run)
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_evaluation_between_two_steps_changes_nothing(reentrant):
    model = checkpointed(adapted(tiny_vit(), grad_input_rank=6), reentrant)
    expected = gradients_of(model, lambda m: loss_at(m, 32, 64))
    model.eval()
    with torch.no_grad():
        loss_at(model, 64, 32)
    assert largest_difference(gradients_of(model.train(), lambda m: loss_at(m, 32, 64)), expected) < 1e-6


def test_two_threads_with_images_of_two_sizes():
    """The replicas of nn.DataParallel run like this."""
    model = adapted(tiny_vit())
    sizes, seen = ((32, 64), (64, 32)), {}

    def run(size):
        for _ in range(5):
            copied = copy.copy(model)
            loss_at(copied, *size)
            seen.setdefault(size, []).append(torch.autograd.grad(loss_at(copied, *size), wanted))

    wanted = [p for n, p in model.named_parameters() if p.requires_grad and "fc1" in n]
    expected = {size: torch.autograd.grad(loss_at(model, *size), wanted) for size in sizes}
    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in sizes:
        assert len(seen[size]) == 5
        for one in seen[size]:
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, expected[size], strict=True))


def test_what_is_kept_does_not_grow_with_image_sizes_and_batches():
    model = adapted(tiny_vit(image_size=8))
    finder = next(iter(layers_of(model).values())).finder
    for step in range(150):
        loss_at(model, 8 + 4 * (step % 12), 8 + 4 * (step // 12)).backward()
    assert len(finder._traces) <= 64 and len(finder._history._distinct) <= 65
    assert sum(len(passes) for passes in finder._history._passes.values()) <= 128
    assert all(one.tracer is None for passes in finder._history._passes.values() for _, one in passes)


def test_only_the_first_pass_with_inputs_of_a_kind_is_traced(monkeypatch):
    traced = []
    trace = PositionTracer.__init__
    model = adapted(tiny_vit())
    monkeypatch.setattr(PositionTracer, "__init__", lambda self, *given: traced.append(given) or trace(self, *given))
    for _ in range(3):
        loss_at(model, 32, 32).backward()
        loss_at(model, 64, 32).backward()
    assert len(traced) == 2
    model.eval()
    loss_at(model, 48, 32)
    assert len(traced) == 2


def _read_and_fail():
    """A weak reference to a tensor of the function that asks for a layout that is not known."""
    activations = torch.zeros(2)
    try:
        read_layout(torch.tensor([[0, 4, 5 << 20]]))
    except UnknownLayoutError:  # `pytest.raises` would keep the error, and with it this frame
        return weakref.ref(activations)
    raise AssertionError


def test_a_layout_that_is_not_known_keeps_nothing_alive():
    recognition._results.clear()
    with without_garbage_collection():
        assert _read_and_fail()() is None
        assert _read_and_fail()() is None  # it is known now that it is not known


def test_a_traced_pass_leaves_nothing_behind(monkeypatch):
    seen = []
    trace = PositionTracer.__init__
    monkeypatch.setattr(
        PositionTracer, "__init__", lambda self, *given: seen.append(weakref.ref(self)) or trace(self, *given)
    )
    recognition._results.clear()
    with without_garbage_collection():
        for _ in range(2):
            model = adapted(Net(lambda tokens: tokens[:, 1:]))  # one patch is missing
            model.blocks[0]["fc"].register_forward_hook(lambda _, args, y: seen.extend(map(weakref.ref, (*args, y))))
            with pytest.warns(UserWarning, match="its tokens do not form a grid"):
                model(images()).sum().backward()
            assert [reference() for reference in seen] == [None] * 4  # two tracers: one when the model was wrapped
            seen.clear()


def test_tracing_changes_neither_outputs_nor_random_numbers():
    torch.manual_seed(3)
    plain, model = tiny_vit().train(), adapted(tiny_vit())
    for _ in range(2):
        torch.manual_seed(4)
        expected = plain(images()).logits, torch.rand(1)
        torch.manual_seed(4)
        found = model(images()).logits, torch.rand(1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Operations


def traced(operation, shape=(2, 3, 8, 12)):
    """The image, row and column (in pixels) of each element of the result of an operation on images."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tracer = PositionTracer(nn.Module())
    assign_positions(tracer, {"x": x})
    with tracer:
        y = operation(x)
    positions = tracer.positions(y)
    assert positions is None or positions.shape == y.shape
    return positions, tracer.trail(y)


def rows_and_columns(positions):
    return [(int(row_of(p)) // 4, int(column_of(p)) // 4) for p in positions.flatten()]


conv = nn.functional.conv2d
OPERATIONS = {
    # name: an operation on (2, 3, 8, 12), and the (row, column) of every element of what it makes of the second image
    "slice": (lambda x: x[1, 0, 2:4, 5], [(2, 5), (3, 5)]),
    "mean over channels": (lambda x: x.mean(1)[1, 3, 4:6], [(3, 4), (3, 5)]),
    "a reshaped transpose": (lambda x: x[1, 0].t().reshape(-1)[:3], [(0, 0), (1, 0), (2, 0)]),
    "stride": (lambda x: conv(x, torch.ones(1, 3, 1, 1), stride=4)[1, 0].flatten(), [
        (0, 0), (0, 4), (0, 8), (4, 0), (4, 4), (4, 8)]),
    "a padded window's centre": (lambda x: conv(x, torch.ones(1, 3, 3, 3), padding=1)[1, 0, 0, :2], [(0, 0), (0, 1)]),
    "a window's centre": (lambda x: conv(x, torch.ones(1, 3, 3, 3))[1, 0, 0, :2], [(1, 1), (1, 2)]),
    "twice as fine": (lambda x: nn.functional.interpolate(x, scale_factor=2)[1, 0, 2, 2:5], [(1, 1), (1, 1), (1, 2)]),
    "one of two, by a constant": (lambda x: _one_of_two(x)[1, 0, 3, :4], [(3, 11), (3, 1), (3, 2), (3, 2)]),
    "one of two, by a method": (lambda x: x.roll(1, 3).where(torch.arange(12) % 3 == 0, x)[1, 0, 3, :4], [
        (3, 11), (3, 1), (3, 2), (3, 2)]),
    "one or a learned one": (lambda x: torch.where(x.mean(1, keepdim=True) > 0, torch.ones(3, 1, 1), x)[1, 0, 3, :2], [
        (3, 0), (3, 1)]),
    "flipped, twice as fine": (lambda x: nn.functional.interpolate(x.flip(2), scale_factor=2)[1, 0, ::5, 2], [
        (7, 1), (5, 1), (2, 1), (0, 1)]),
    "pooled": (lambda x: nn.functional.max_pool2d(x, 2)[1, 0, 1, :2], [(2, 0), (2, 2)]),
    "written into a new tensor": (lambda x: _written(x)[1, 0, 0, 1:4], [(0, 1), (0, 2), (0, 3)]),
    "einsum": (lambda x: torch.einsum("nchw,dc->nhwd", x, torch.ones(5, 3))[1, 2, 3, :1], [(2, 3)]),
    "attention": (lambda x: _attend(x)[1, 13:15, 0], [(1, 1), (1, 2)]),
    "transposed attention": (lambda x: _attend(x, by_hand=torch.clone)[1, 13:15, 0], [(1, 1), (1, 2)]),
    "causal attention": (lambda x: _attend(x, by_hand=torch.tril)[1, 13:15, 0], [(1, 1), (1, 2)]),
    "in place through a view": (lambda x: _in_place(x)[1, 0, 1, :2], [(1, 0), (1, 1)]),
    "joined along channels": (lambda x: torch.cat((x, x.mean(1, keepdim=True)), 1)[1, 2:, 4, 0], [(4, 0), (4, 0)]),
    "joined along rows": (lambda x: torch.cat((x[:, :, 6:], x), -2)[1, 0, 1:3, 0], [(7, 0), (0, 0)]),
    "stacked last": (lambda x: torch.stack((x, x.flip(-2)), -1)[1, 0, 0, 3], [(0, 3), (7, 3)]),
    "rolled": (lambda x: x.roll((1, 2), (1, 3))[1, 0, 4, 1:3], [(4, 11), (4, 0)]),
    "by name": (lambda x: torch.roll(shifts=1, dims=3, input=torch.mul(input=x, other=2))[1, 1, 0, :2], [
        (0, 11), (0, 0)]),
    "rolled flat": (lambda x: x.roll(1)[1, 1, 0, :2], [(7, 11), (0, 0)]),
    "flipped": (lambda x: x.flip(1, 3)[1, 0, 4, :1], [(4, 11)]),
    "reflected": (lambda x: nn.functional.pad(x, (2, 0, 0, 0), mode="reflect")[1, 0, 4, :3], [(4, 2), (4, 1), (4, 0)]),
    "stacked and unbound": (lambda x: torch.stack((x, x), 2).unbind(2)[1][1, 0, 4, :1], [(4, 0)]),
    "complex": (lambda x: torch.view_as_complex(x.unflatten(3, (6, 2)))[1, 0, 4, :2], [(4, 0), (4, 2)]),
}  # fmt: skip


def _written(x):
    y = x.new_zeros(2, 3, 8, 12)
    y[:, :, :4], y[:, :, 4:] = x[:, :, :4], x[:, :, 4:]
    return y


def _one_of_two(x):
    return torch.where(torch.arange(12) % 3 == 0, x.roll(1, 3), x)


def _in_place(x):
    y = x.clone()
    y[:, :, 1:] += y[:, :, :1].mean()
    return y.mul_(2)


def _attend(x, by_hand=None):
    tokens = x.flatten(2).transpose(1, 2)
    if by_hand is not None:
        return by_hand((tokens @ tokens.transpose(1, 2)).softmax(-1)) @ tokens
    return nn.functional.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None])[:, 0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    operation, expected = OPERATIONS[name]
    positions, _ = traced(operation)
    assert rows_and_columns(positions) == expected
    assert {int(number_of(p)) for p in positions.flatten()} == {1}


class LargestPositions(TorchDispatchMode):
    """Notes the largest memory of a tensor of integers, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int64:
            self.largest = max(self.largest, result.untyped_storage().nbytes() // 8)
        return result


COPYING = {
    # Operations that make a new tensor of images (2, 64, 32, 32), all channels of which have the same positions.
    "joined along rows": lambda x: torch.cat((torch.zeros(2, 64, 1, 32), x), 2),
    "joined along channels": lambda x: torch.cat((x, x.mean(1, keepdim=True), x), 1),
    "stacked": lambda x: torch.stack((x, x.flip(2)), 1),
    "rolled": lambda x: x.roll(1, 2),
    "padded": lambda x: nn.functional.pad(x, (1, 1, 1, 1)),
    "reflected": lambda x: nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    "resized": lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "picked by an index": lambda x: x.unsqueeze(1)[:, 0],
}


@pytest.mark.parametrize("name", COPYING)
def test_positions_that_do_not_vary_along_channels_take_no_memory_for_each(name):
    with LargestPositions() as noted:
        positions, _ = traced(COPYING[name], (2, 64, 32, 32))
    assert bool((positions >= 0).any())
    assert noted.largest <= 4 * 2 * 34 * 34


@pytest.mark.parametrize("name", ["repeated", "written"])
def test_positions_are_condensed_after_operations_that_copy_them(name):
    def written(x):
        y = torch.zeros_like(x)
        y[:, :, 1:] = x[:, :, 1:]
        return y

    operation = {"repeated": lambda x: x.repeat(1, 2, 1, 1), "written": written}[name]
    positions, _ = traced(operation, (2, 64, 32, 32))
    assert bool((positions >= 0).any())
    assert positions.untyped_storage().nbytes() == 8 * 2 * 32 * 32


def test_a_mixture_of_many_channels_is_that_of_those_that_differ():
    def joined(x):
        return torch.cat((x, x.roll((1, 1), (2, 3))), 1)

    expected, _ = traced(lambda x: conv(joined(x), torch.ones(1, 6, 1, 1)))
    x = torch.zeros(2, 64, 8, 12)
    found, _ = traced(lambda x: conv(joined(x), torch.ones(1, 128, 1, 1)), tuple(x.shape))
    assert torch.equal(found, expected)


UNKNOWN = {
    "fft_fft": lambda x: torch.fft.fft(x).real,
    "sort": lambda x: x.sort(3).values,
    "cumsum": lambda x: x.cumsum(2),
    "as_strided": lambda x: x.as_strided((2, 3), (1, 2)),
    "argsort": lambda x: x.gather(3, x.argsort(3)),
    "__getitem__": lambda x: x[x > 0],
    "grid_sample": lambda x: nn.functional.grid_sample(x, torch.rand(2, 4, 4, 2), align_corners=False),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_rule_loses_positions(name):
    positions, trail = traced(UNKNOWN[name])
    assert positions is None and trail.lost_by == name


def test_a_mean_over_all_pixels_has_no_position():
    positions, _ = traced(lambda x: x.mean((2, 3)))
    assert bool((positions < 0).all())
    positions, _ = traced(lambda x: x * x.mean((2, 3), keepdim=True))
    assert rows_and_columns(positions[0, 0, :1, :2]) == [(0, 0), (0, 1)]


# Parts of a pass within parts that are run again


class Nested(nn.Module):
    """A model that calls one layer three times on grids of 64 tokens: square, flat in an inner part, square again."""

    def __init__(self, outer, inner):
        super().__init__()
        torch.manual_seed(0)
        self.outer, self.inner = outer, inner
        self.square, self.flat = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(3, 16, (2, 8), (2, 8))
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(16, 16)})])

    def part(self, square, flat):
        block = self.blocks[0]["fc"]
        square = torch.tanh(block(square))
        inner = block if self.inner is None else lambda t: checkpoint(block, t, use_reentrant=self.inner)
        flat = torch.tanh(inner(flat))
        return torch.tanh(block(square + 1)) * flat

    def forward(self, x):
        streams = [cut(x).flatten(2).transpose(1, 2).requires_grad_() for cut in (self.square, self.flat)]
        if self.outer is None:
            return self.part(*streams)
        return checkpoint(self.part, *streams, use_reentrant=self.outer) * 2 - checkpoint(
            self.part, *streams, use_reentrant=self.outer
        )


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False, None])
def test_calls_within_nested_parts_that_are_run_again_keep_their_grids(outer, inner):
    expected = gradients(adapted(Nested(None, None), grad_input_rank=3), images())
    found = gradients(adapted(Nested(outer, inner), grad_input_rank=3), images())
    assert largest_difference(found, expected) < 1e-5


def test_two_threads_with_images_of_two_sizes_under_checkpointing():
    model = checkpointed(adapted(tiny_vit(), grad_input_rank=6), False)
    sizes, seen, begin = ((32, 64), (64, 32)), {}, threading.Barrier(2)
    wanted = [p for n, p in model.named_parameters() if p.requires_grad and "fc1" in n]
    expected = {size: torch.autograd.grad(loss_at(model, *size), wanted) for size in sizes}

    def run(size):
        begin.wait()
        seen[size] = [torch.autograd.grad(loss_at(model, *size), wanted) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in sizes:
        for one in seen[size]:
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, expected[size], strict=True))


def test_arguments_that_a_rule_does_not_expect_never_stop_training(monkeypatch):
    x, embedding = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 4, 1)
    tracer = PositionTracer(embedding)
    assign_positions(tracer, {"pixel_values": x})
    with tracer:
        pooled = nn.functional.max_pool2d(embedding(x), np.int64(2))
    assert tracer.positions(pooled) is not None

    def fails(*args, **kwargs):
        raise ValueError("of a rule")

    monkeypatch.setitem(registry.RULES, "max_pool2d", fails)
    with tracer:
        pooled = nn.functional.max_pool2d(embedding(x), 2)
    assert pooled.shape == (2, 4, 4, 4) and tracer.positions(pooled) is None
