"""A model that arranges its patches in any way, and what it is expected to compute."""

from __future__ import annotations

import torch
from models import images, layers_of
from peft import get_peft_model
from torch import nn

from lbp_peft import LBPWHTConfig, layout_report

SIDE = 8  # of the grids below, in patches


class Net(nn.Module):
    """A model that passes patches, `arrange`d in some way, through layers that treat every token alike."""

    def __init__(self, arrange=lambda tokens: tokens, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.arrange = arrange
        self.cut = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(width, width)}) for _ in range(2)])

    def forward(self, x):
        tokens = self.arrange(self.cut(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = tokens + torch.tanh(block["fc"](tokens))
        return tokens


def adapted(model, **settings):
    return get_peft_model(model, LBPWHTConfig(**({"r": 3, "grad_input_dtype": "full"} | settings))).train()


def found(model):
    """The layouts of all layers that have run."""
    return {ran.layout for ran in layout_report(model).layers.values() if ran is not None}


def gradients(model, x, **how):
    model.zero_grad()
    model(x, **how).sin().square().sum().backward()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None and "lbpwht" in n}


def last_layer(model):
    """The weight gradient of the last layer, and the input and output gradient from which it is computed."""
    layer = list(layers_of(model).values())[-1]
    seen = {}

    def note(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda grad: seen.update(g=grad))

    hook = layer.register_forward_hook(note)
    gradients(model, images())
    hook.remove()
    return layer.lbpwht_weight["default"].grad.double(), seen["x"].double(), seen["g"].double()


def expected_gradient(x, g, bases):
    """The weight gradient that is expected for tokens (N, L, C)."""
    x, g = (torch.einsum("kl,nlc->nkc", bases, t) for t in (x, g))
    return torch.einsum("nko,nki->oi", g, x)


def close(a, b):
    return bool((a - b).norm() < 1e-5 * b.norm())
