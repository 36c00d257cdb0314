"""Checks of an architecture of transformers or timm, see `tests/support/architectures.py`.

Expected grids and gradients share no code with the package: grids are those of the architecture or, of images, those
that arrive at the layer; gradients are computed from what hooks on the plain model see, with dense bases.
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from architectures import Elsewhere, InWindows, OneAfterAnother, Unrolled
from models import layers_of
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lbp_peft import BasisSet, LBPWHTConfig, exact_backward, layout_report
from lbp_peft.tuner.layers.conv1x1 import is_pointwise_conv

R = 3
# Layers that are not adapted by default, although patches pass through them between adapted layers: they scale queries,
# or lead to the neck of a detector.
LEFT_OUT = r"model\.encoder\.query_scale|model\.layer\.|model\.neck\.input_channel_adjustment"


def check(architecture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the default configuration on a small instance: outputs, grids, gradients, a training step, a checkpoint.

    Args:
        architecture: An `Architecture`, or an object with its `build`, `batch` and `grids`.
        tmp_path, monkeypatch: pytest's fixtures.
    """
    base, batch = architecture.build(), architecture.batch()
    model = adapted(base, r=R)
    record = Record(base, list(layers_of(model)))
    check_outputs(model, base, batch)
    check_layouts(architecture, model, record)
    check_low_rank_gradients(architecture, model, base, batch, record)
    if any(ran is not None and not ran.why_exact for ran in report_of(model).values()):
        check_gradients_at_full_rank(base, batch, monkeypatch)
    check_training_step_and_checkpoint(model, base, batch, tmp_path)


def check_outputs(model, base, batch):
    """Check that the outputs are equal bit for bit.

    The same parameters are trained in both models, since torch.matmul folds batches depending on that.
    """
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(f"base_model.model.{name.rpartition('.')[0]}" in layers_of(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tensors(model, batch)
    for ours, plain in zip(found, tensors(base, batch), strict=True):
        assert torch.equal(ours, plain)
    check_told(model, [str(warning.message) for warning in caught], found)


def check_told(model, messages, outputs):
    """Check that there is one warning for each reason for exact layers that costs something, and no other warning."""
    told = [message for message in messages if "exact backpropagation" in message]
    left_out = [message for message in messages if "patches of the image pass through" in message]
    assert all(re.match(LEFT_OUT, message) for message in left_out), left_out
    if names := read_without_a_call(model, outputs):
        (read,) = [message for message in told if "the model reads its weight" in message]
        assert any(read.startswith(f"{name} uses") for name in names)
        told.remove(read)
    whys = {ran.why_exact for ran in report_of(model).values() if ran is not None and is_surprising(ran)}
    assert len(told) == len(whys), (whys, told)
    for why in whys:
        names = [name for name, ran in report_of(model).items() if ran is not None and ran.why_exact == why]
        assert any(why in message and message.startswith(tuple(names)) for message in told), (why, told)
        assert all(re.search("Set |Give |Leave ", message) for message in told), told


def read_without_a_call(model, outputs):
    """The names of the layers that were not called, although their parameters have a gradient."""
    loss = sum(output.float().sum() for output in outputs if output.requires_grad)
    names = []
    for name, ran in report_of(model).items():
        parameters = [p for p in layers_of(model)[f"base_model.model.{name}"].parameters() if p.requires_grad]
        if ran is None and any(
            gradient is not None
            for gradient in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        ):
            names.append(name)
    return names


def check_layouts(architecture, model, record):
    for name, ran in report_of(model).items():
        calls = record.inputs[name]
        if ran is None:
            assert not calls, name
            continue
        expected = layout_of(architecture, name, record.layers[name], calls[-1])
        if isinstance(expected, str):
            assert ran.layout is None and ran.why_exact, (name, expected, ran)
            continue
        assert ran.layout is not None, (name, expected, ran)
        if isinstance(expected, OneAfterAnother):
            found = getattr(ran.layout, "parts", (ran.layout,) * ran.layout.packed)
            sides = [sides_and_others(part) for part in expected.parts]
            assert [(*p.grid, p.num_prefix_tokens, p.num_suffix_tokens) for p in found] == sides, (name, expected, ran)
            assert not ran.why_exact
            continue
        height, width, before, after = sides_and_others(expected)
        assert (ran.layout.grid, ran.layout.num_prefix_tokens) == ((height, width), before), (name, expected, ran)
        assert ran.num_tokens == ran.layout.num_tokens == before + height * width + after, (name, expected, ran)
        assert (not ran.why_exact) == (height * width > R), (name, ran)


def check_low_rank_gradients(architecture, model, base, batch, record):
    """Check weight gradients against those computed from the plain model's inputs and gradients, with dense bases."""
    record.clear()
    loss(base, batch).backward()
    expected = {name: record.weight_gradient(name, architecture) for name in record.layers if record.gradients[name]}
    model.zero_grad()
    loss(model, batch).backward()
    found = {name: layers_of(model)[f"base_model.model.{name}"].lbpwht_weight["default"].grad for name in expected}
    assert found
    check_close({name: grad.flatten(1).double() for name, grad in found.items()}, expected)


def check_gradients_at_full_rank(base, batch, monkeypatch):
    """Check gradients through the projections themselves, not the shortcut that skips them at full rank."""
    num_coefficients = BasisSet.num_coefficients

    def one_less(basis, layout):
        return min(num_coefficients(basis, layout), layout.num_tokens - 1)

    model = adapted(base, r=64, grad_input_rank=64)
    with monkeypatch.context() as patched:
        patched.setattr(BasisSet, "num_coefficients", one_less)
        loss(model, batch).backward()
    found = gradients_of(model)
    assert any(ran is not None and not ran.why_exact for ran in report_of(model).values())
    model.zero_grad()
    with exact_backward(model):
        loss(model, batch).backward()
    check_close(found, gradients_of(model))


def check_training_step_and_checkpoint(model, base, batch, tmp_path):
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert any(not torch.equal(model.get_parameter(name), old) for name, old in before.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
    for buffer_name, buffer in model.named_buffers():  # an adapter does not keep the statistics of batch norms
        loaded.get_buffer(buffer_name).copy_(buffer)
    for ours, plain in zip(tensors(loaded, batch), tensors(model, batch), strict=True):
        assert torch.equal(ours, plain)


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
        if is_pointwise_conv(self.layers[name]):
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
    if x.dim() < 3 or x[0].numel() == x.shape[1 if is_pointwise_conv(layer) else -1]:
        return "a single token"
    if is_pointwise_conv(layer) and not (matching and isinstance(matching[-1], str)):
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


def is_surprising(ran):
    """Whether a layer is exact for a reason other than that there is nothing to gain."""
    benign = "single token|no token axis|as many rows as there are tokens|is not needed$"
    return bool(ran.why_exact) and not re.search(benign, ran.why_exact)


def adapted(base, **settings):
    return get_peft_model(copy.deepcopy(base), LBPWHTConfig(**settings)).train()


def report_of(model):
    return layout_report(model).layers


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


def gradients_of(model):
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def check_close(found, expected):
    """Check that all agree to 1e-5, and each tensor to 1e-4 unless it is negligible, as that of key biases is."""
    assert found.keys() == expected.keys()
    scale = torch.stack([e.norm() for e in expected.values()]).norm()
    differences = {name: (found[name] - e).norm() for name, e in expected.items()}
    assert torch.stack(list(differences.values())).norm() < 1e-5 * scale
    for name, difference in differences.items():
        assert difference < 1e-4 * (expected[name].norm() + 1e-2 * scale), name
