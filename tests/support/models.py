"""Tiny models, and what the tests do with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.integrations.peft import MIN_PEFT_VERSION

from lbp_peft import LBPWHTConfig, LBPWHTLayer
from lbp_peft.tuner.patches.forward_patch import PATCH_ATTR

torch.set_num_threads(1)  # more threads make models this small slower, and bits must not depend on the machine


def vit_config(**changes) -> ViTConfig:
    settings = {
        "image_size": 32, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "num_labels": 5,
    }  # fmt: skip
    return ViTConfig(**(settings | changes))


def tiny_vit(seed: int = 0, **changes) -> ViTForImageClassification:
    """A small ViT with 8 x 8 patches and [CLS]."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit_config(**changes))
    with torch.no_grad():  # transformers initialises biases to zero, which would hide that one is forgotten
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model


class MLP(nn.Module):
    """An MLP on inputs (N, C), which have no token axis, so its backward pass is exact."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class ConvNet(nn.Module):
    """A model with targets after a convolution, where there are no tokens any more."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.lin0 = nn.Linear(8, 16)
        self.lin1 = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(self.conv(x).mean((2, 3)))))))


class Attention(nn.Module):
    """An attention model on sequences without a patch grid."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(attended.mean(1))


class MultiheadBlock(nn.Module):
    """A block with nn.MultiheadAttention, which reads the weight of its out_proj without calling it."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
        self.lin0 = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin0(self.attn(x, x, x)[0])).mean(1))


class PatchMixer(nn.Module):
    """A model in which some targets receive an 8 x 8 grid of tokens, and one receives pooled features."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.tokens0 = nn.Linear(12, 16)
        self.tokens1 = nn.Linear(16, 12, bias=False)
        self.pooled = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.tokens1(torch.nn.functional.gelu(self.tokens0(tokens)))
        return self.head(torch.relu(self.pooled(tokens.mean(1))))


def images(batch: int = 2, height: int = 32, width: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def input_gradient(way: int | str | tuple[int, str]) -> dict:
    """The settings of an input gradient of some rank, in some number format, or both."""
    rank, dtype = way if isinstance(way, tuple) else (None, way) if isinstance(way, str) else (way, "auto")
    return {"grad_input_rank": rank, "grad_input_dtype": dtype}


# From 5.24 on, the methods of transformers' own models that add, switch and delete adapters need a peft that is not out
# yet. Those that load adapters do not.
with_transformers_own_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__}'s own adapters need peft >= {MIN_PEFT_VERSION}",
)


@dataclass(frozen=True)
class Case:
    """A model with an input and a configuration that suits it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    settings: dict = field(default_factory=dict)
    head: str = "head"

    def base(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build()

    def config(self, **changes) -> LBPWHTConfig:
        return LBPWHTConfig(**({"r": 3} | self.settings | changes))

    def adapted(self, seed: int = 0, **changes) -> PeftModel:
        return get_peft_model(self.base(seed), self.config(**changes))


CASES = [
    Case("mlp", MLP, lambda: _randn(4, 10), {"target_modules": ["lin0", "lin1"]}),
    Case("conv", ConvNet, lambda: images(3, 8), {"target_modules": ["lin0", "lin1"]}),
    Case("attention", Attention, lambda: _randn(2, 9, 12), {"target_modules": ["query", "key", "value"]}),
    Case("multihead", MultiheadBlock, lambda: _randn(2, 9, 12), {"target_modules": ["out_proj", "lin0"]}),
    Case("mixer", PatchMixer, lambda: images(), {"target_modules": ["tokens0", "tokens1", "pooled"]}),
    Case("vit", tiny_vit, lambda: images(), {"grad_input_rank": 6}, head="classifier"),
]
NO_GRID = "ignore:.*uses exact backpropagation"  # cases "attention" and "multihead" warn, rightly


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The logits in eval mode; the mode is restored afterwards."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = forward(model, x)
    model.train(training)
    return logits


def forward(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.logits


def disturb(model: nn.Module, adapter: str = "default", seed: int = 5, scale: float = 0.1) -> None:
    """Change all weights of an adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapter_parameters(model, adapter).items()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))
            assert parameter.isfinite().all(), name


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter, including those of modules_to_save."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ("lbpwht_" in name or "modules_to_save." in name) and adapter in name.split(".")
    }


def train(model: nn.Module, x: Tensor, steps: int = 3, lr: float = 0.05) -> list[float]:
    """Train with plain SGD towards fixed random logits; return the losses."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        logits = forward(model, x)
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).to(logits)
        loss = (logits - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of a fixed loss with respect to all trainable parameters that took part."""
    model.zero_grad()
    logits = forward(model, x)
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).to(logits)
    (logits - goal).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the gradient's norm, without vanishing gradients (that of k_proj's bias)."""
    assert found.keys() == expected.keys()
    scale = max(e.norm() for e in expected.values())
    differences = [(found[n] - e).norm() / max(e.norm(), 1e-4 * scale) for n, e in expected.items()]
    return float(max(differences))


def layers_of(model: nn.Module) -> dict[str, LBPWHTLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LBPWHTLayer)}


def patches_of(model: nn.Module, kind: type) -> dict[str, Any]:
    """The patches of modules that are not adapted layers, by the name of the host."""
    inside = {name: getattr(module, PATCH_ATTR, None) for name, module in model.named_modules()}
    return {name: one for name, one in inside.items() if isinstance(one, kind)}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def hooks_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


ROOT = Path(__file__).resolve().parents[2]


def run_python(script: str, *args: str) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # as here
    subprocess.run([sys.executable, "-c", script, *args], check=True, env=env)
