"""Small models whose linear layers are convolutions with kernel 1 or transformers' Conv1D."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


class Mixer(nn.Module):
    """A model that passes an 8 x 12 grid of patches through blocks of two layers of one kind."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.channels_first = kind == "Conv1d"
        self.patches = nn.Conv2d(3, 8, 4, 4)

        def layer(inside, outside):
            if kind == "Conv1d":
                return nn.Conv1d(inside, outside, 1)
            made = Conv1D(outside, inside)
            nn.init.normal_(made.weight, std=0.3)
            nn.init.normal_(made.bias, std=0.3)
            return made

        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": layer(8, 16), "act": nn.GELU(), "fc2": layer(16, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2)
        x = x if self.channels_first else x.transpose(1, 2).contiguous()
        for block in self.blocks:
            x = x + block["fc2"](block["act"](block["fc1"](x)))
        return self.head(x.mean(2 if self.channels_first else 1))


class ConvMLP(nn.Module):
    """A convolutional stage as in hybrid models: depthwise mixing, then an MLP written as convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mix": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                    "fc1": nn.Conv2d(8, 16, 1),
                    "fc2": nn.Conv2d(16, 8, 1, bias=False),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["fc2"](F.gelu(block["fc1"](block["mix"](x))))
        return self.head(x.mean((2, 3)))
