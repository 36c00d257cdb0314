"""Checks of an architecture of transformers or timm, see `tests/support/architectures.py`.

Expected grids and gradients share no code with the package: grids are those of the architecture or, of images, those
that arrive at the layer; gradients are computed from what hooks on the plain model see, with dense bases.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import OneAfterAnother
from models import layers_of
from peft import PeftModel, get_peft_model
from recorded import R, Record, layout_of, loss, sides_and_others, tensors

from lbp_peft import BasisSet, LBPWHTConfig, exact_backward, layout_report

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
        check_gradients_at_full_rank(base, batch, monkeypatch, list(record.layers))
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


def check_gradients_at_full_rank(base, batch, monkeypatch, targets):
    """Check gradients through the projections themselves, not the shortcut that skips them at full rank."""
    num_coefficients = BasisSet.num_coefficients

    def one_less(basis, layout):
        return min(num_coefficients(basis, layout), layout.num_tokens - 1)

    model = adapted(base, r=64, grad_input_rank=64, target_modules=targets)
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


def is_surprising(ran):
    """Whether a layer is exact for a reason other than that there is nothing to gain."""
    benign = "single token|no token axis|as many rows as there are tokens|is not needed$"
    return bool(ran.why_exact) and not re.search(benign, ran.why_exact)


def adapted(base, **settings):
    return get_peft_model(copy.deepcopy(base), LBPWHTConfig(**settings)).train()


def report_of(model):
    return layout_report(model).layers


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
