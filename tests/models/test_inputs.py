"""Inputs of several shapes: which of their axes run over rows, columns, frames and channels."""

import pytest
import torch
from arranged import SIDE, Net, adapted, found
from torch import nn


class Cutting(nn.Module):
    """A model that brings its input into the form (N, C, ..., H, W) and cuts it into patches or tubelets."""

    def __init__(self, arrange, cut):
        super().__init__()
        self.arrange, self.cut = arrange, cut
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(16, 16)})])

    def forward(self, x):
        x = self.cut(self.arrange(x))
        tokens = x.flatten(2).transpose(1, 2) if x.dim() > 3 else x.flatten(1).t()
        return tokens + torch.tanh(self.blocks[0]["fc"](tokens))


def patches(channels=3):
    return nn.Conv2d(channels, 16, 4, 4)


def tubelets(channels=3):
    return nn.Conv3d(channels, 16, (2, 4, 4), (2, 4, 4))


def same(x):
    return x


def channels_first(x):
    return x.movedim(-1, 1)


def frames_last(x):
    return x.transpose(1, 2)


INPUTS = {
    # name: (shape, arrangement, cut, the number of grids in a row; None: the layers are exact)
    "an image": ((3, 32, 32), same, patches(), 1),
    "channels last": ((2, 32, 32, 3), channels_first, patches(), 1),
    "many channels": ((2, 8, 32, 32), same, patches(8), 1),
    "four channels last": ((2, 32, 32, 4), channels_first, patches(4), None),
    "frames": ((2, 3, 3, 32, 32), lambda x: x.flatten(0, 1), patches(), 1),
    "a video": ((2, 8, 3, 32, 32), frames_last, tubelets(), 4),
    "a video, channels first": ((2, 3, 8, 32, 32), same, tubelets(), 4),
    "a short video, channels first": ((2, 3, 4, 32, 32), same, tubelets(), 2),
    "a video, channels last": ((2, 8, 32, 32, 3), channels_first, tubelets(), 4),
    "a short video, channels last": ((2, 4, 32, 32, 3), channels_first, tubelets(), 2),
    "a video of many channels": ((2, 8, 5, 32, 32), frames_last, tubelets(5), 4),
    "a video of many channels, first": ((2, 5, 8, 32, 32), same, tubelets(5), None),
    "a video of many channels, last": ((2, 8, 32, 32, 5), channels_first, tubelets(5), None),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.filterwarnings("ignore:.*uses exact backpropagation")
def test_rows_and_columns_are_those_of_the_images(name):
    shape, arrange, cut, packed = INPUTS[name]
    model = adapted(Cutting(arrange, cut))
    model(torch.randn(shape)).sum().backward()
    (layout,) = found(model)
    assert layout is None if packed is None else (layout.grid, layout.packed) == ((SIDE, SIDE), packed)


class OfTokens(Net):
    """A model that is given tokens, which could be an image of one or three channels by their shape."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, tokens):
        tokens = self.mix(tokens.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + torch.tanh(block["fc"](tokens))
        return tokens


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("mix", [nn.Identity(), nn.BatchNorm1d(16), nn.Conv1d(16, 16, 3, padding=1, groups=16)])
@pytest.mark.filterwarnings("ignore:.*uses exact backpropagation")
def test_tokens_are_not_taken_for_an_image(mix, num_images):
    model = adapted(OfTokens(mix))
    model(torch.randn(num_images, SIDE**2, 16)).sum().backward()
    assert found(model) == {None}
