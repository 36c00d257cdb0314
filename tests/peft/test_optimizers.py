"""Optimisers that keep less state than AdamW, from libraries, together with offloaded base weights."""

import importlib

import pytest
import torch
from models import adapter_parameters, forward, images, layers_of, outputs, tiny_vit
from peft import PeftModel, get_peft_model
from torch import nn

from lbp_peft import LBPWHTConfig
from lbp_peft.tuner.layers import storage

STEPS = 8


def of_library(library, make):
    """An optimiser of a library; the test is skipped where the library is missing or does not work on this machine."""

    def build(model):
        try:
            module = importlib.import_module(library)
        except ImportError as error:
            pytest.skip(f"needs {library}: {error}")
        return make(module, model)

    return build


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_rank(model, **settings):
    """Parameter groups: the low-rank optimiser gets the matrices of the adapter, its plain form biases and the head."""
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and "lbpwht_weight" in name]
    others = [p for p in trained(model) if not any(p is matrix for matrix in matrices)]
    return [{"params": others}, {"params": matrices, "rank": 4, "update_proj_gap": 4, **settings}]


GALORE = {"scale": 1.0, "proj_type": "std"}
APOLLO = {"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}
OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(trained(model), lr=1e-2),
    "all parameters": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "Adafactor, PyTorch": lambda model: torch.optim.Adafactor(trained(model), lr=0.1),
    "Adafactor, transformers": of_library(
        "transformers",
        lambda t, model: t.Adafactor(trained(model), lr=1e-2, scale_parameter=False, relative_step=False),
    ),
    "8 bits, torchao": of_library("torchao.optim", lambda t, model: t.AdamW8bit(trained(model), lr=1e-2)),
    "8 bits, bitsandbytes": of_library(
        "bitsandbytes", lambda b, model: b.optim.AdamW8bit(trained(model), lr=1e-2, min_8bit_size=256)
    ),
    "GaLore": of_library("galore_torch", lambda g, model: g.GaLoreAdamW(by_rank(model, **GALORE), lr=1e-2)),
    "APOLLO": of_library("apollo_torch", lambda a, model: a.APOLLOAdamW(by_rank(model, **APOLLO), lr=1e-2)),
}


@pytest.mark.parametrize("name, base_weights", [*((name, "disk") for name in OPTIMIZERS), ("AdamW", "dropped")])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:no_deprecation_warning")
def test_they_train_the_adapter_and_leave_the_base(name, base_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)  # a busy disk may take long
    base, x = tiny_vit(num_hidden_layers=1), images()
    settings = {"r": 3, "grad_input_dtype": "full", "modules_to_save": ["classifier"], "base_weights": base_weights}
    model = get_peft_model(tiny_vit(num_hidden_layers=1), LBPWHTConfig(**settings)).train()
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    optimizer = OPTIMIZERS[name](model)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(forward(model, x), torch.tensor([1, 3]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    weights = {name for name in before if "lbpwht_weight" in name}
    assert not any(torch.equal(adapter_parameters(model)[name], before[name]) for name in weights)
    assert all(layer.base_weight_is_offloaded for layer in layers_of(model).values())
    expected = outputs(model, x)
    if base_weights == "disk":
        with model.disable_adapter():
            assert torch.equal(outputs(model, x), outputs(base, x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(outputs(loaded, x), expected)
