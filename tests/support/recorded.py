"""Inputs and gradients of a plain model's layers, and the weight gradients that follow from the true places of tokens.

Nothing here imports the package, so that `docs/low_rank_by_counts.py` can measure an old version of it as well.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import reference
import torch
from architectures import Elsewhere, InWindows, OneAfterAnother, Unrolled
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

R = 3
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # with kernel 1, if they are adapted


class Record:
    """Records the inputs and output gradients of those layers of a plain model that are adapted in another model."""

    def __init__(self, base: nn.Module, names: list[str]):
        self.layers = {name: base.get_submodule(name) for name in (n.removeprefix("base_model.model.") for n in names)}
        self.clear()
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda layer, args, output, name=name: self._note(name, args[0], output))

    def clear(self) -> None:
        self.inputs: dict[str, list] = {name: [] for name in self.layers}
        self.gradients: dict[str, list] = {name: [] for name in self.layers}

    def _note(self, name: str, x: Tensor, output: Tensor) -> None:
        self.inputs[name].append(x.detach())
        if output.requires_grad:
            output.register_hook(lambda grad: self.gradients[name].append((x.detach(), grad)))

    def weight_gradient(self, name: str, architecture: Any) -> Tensor:
        found = sum(self._weight_gradient(name, architecture, x, grad) for x, grad in self.gradients[name])
        return found.t() if isinstance(self.layers[name], Conv1D) else found

    def _weight_gradient(self, name, architecture, x, grad):
        layout = layout_of(architecture, name, self.layers[name], x)
        if isinstance(self.layers[name], CONVOLUTIONS):
            x, grad = x.movedim(1, -1), grad.movedim(1, -1)
        if isinstance(layout, OneAfterAnother):
            return sum(
                of_grid(part, *both) for part, *both in zip(layout.parts, *map(layout.split, (x, grad)), strict=True)
            )
        return of_grid(layout, x, grad)


def of_grid(layout, x, grad):
    """The weight gradient of a layer whose tokens lie on one grid, or the exact one."""
    if isinstance(layout, Elsewhere):
        x, grad = layout.tokens(x), layout.tokens(grad)
    if x.dim() == 4 and not isinstance(layout, str):
        x, grad = x.flatten(1, 2), grad.flatten(1, 2)
    x, grad = x.double(), grad.double()
    if isinstance(layout, str):
        return torch.einsum("...o,...i->oi", grad, x)
    height, width, before, _ = sides_and_others(layout)
    bases = orthogonal_bases((height, width))
    if isinstance(layout, (Unrolled, InWindows)):
        bases = bases[:, layout.places()]
    on_grid = slice(before, before + height * width)
    x_hat, g_hat = (torch.einsum("kl,nlc->nkc", bases, tokens[:, on_grid]) for tokens in (x, grad))
    beside = [torch.einsum("nlo,nli->oi", grad[:, part], x[:, part]) for part in outside(on_grid)]
    return torch.einsum("nko,nki->oi", g_hat, x_hat) + sum(beside)


@cache
def orthogonal_bases(grid):
    """Orthogonal bases of a grid: the bases of one block, repeated for all blocks."""
    return reference.orthogonal_bases(grid, R)


def outside(part):
    return slice(0, part.start), slice(part.stop, None)


def layout_of(architecture: Any, name: str, layer: nn.Module, x: Tensor):
    """Where the tokens of x lie, or why they lie on no grid, as in `Architecture.grids`."""
    matching = [grid for part, grid in architecture.grids.items() if re.search(part, name)]
    if (
        x.dim() == 2 and matching and isinstance(matching[-1], (str, Elsewhere, OneAfterAnother))
    ):  # images one after another
        return matching[-1]
    if x.dim() < 3 or x[0].numel() == x.shape[1 if isinstance(layer, CONVOLUTIONS) else -1]:
        return "a single token"
    if isinstance(layer, CONVOLUTIONS) and not (matching and isinstance(matching[-1], str)):
        return tuple(x.shape[2:])
    assert matching, f"{name}: no grid is known for {tuple(x.shape)}"
    if not isinstance(matching[-1], (str, Elsewhere, OneAfterAnother)):
        height, width, before, after = sides_and_others(matching[-1])
        assert x[0].numel() == (height * width + before + after) * x.shape[-1], (name, matching[-1], x.shape)
    return matching[-1]


def sides_and_others(layout):
    """The height, the width, and the numbers of tokens before and after a grid."""
    if isinstance(layout, Elsewhere):
        return layout.height, layout.width, layout.before, 0
    sides = (layout.height, layout.width) if isinstance(layout, (Unrolled, InWindows)) else layout
    return (*sides, 0, 0)[:4]


def tensors(model, batch):
    """All floating-point outputs of the model in training mode."""
    torch.manual_seed(2)
    return [t for t in leaves(model(**batch)) if t.is_floating_point()]


def leaves(output):
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from leaves(value)


def loss(model, batch):
    """The distance of all outputs from fixed random goals."""
    total = 0.0
    for index, tensor in enumerate(t for t in tensors(model, batch) if t.requires_grad):
        goal = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
        finite = tensor.isfinite()
        total = total + (tensor - goal)[finite].square().mean()
    return total
