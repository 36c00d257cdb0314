"""Each way to make the backward pass cheap works on each kind of model, and with other changes to a training step."""

import pytest
import torch
from comparing import cosine
from mixers import ConvMLP
from models import forward, images, input_gradient, patches_of, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lbp_peft import LBPWHTConfig, layout_report
from lbp_peft.tuner.patches.activation_patch import ActivationPatch


class Convolutions(ConvMLP):
    """A model of convolutions with activation functions that are modules."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block["act"] = nn.GELU()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["fc2"](block["act"](block["fc1"](block["mix"](x))))
        return self.head(x.mean((2, 3)))


MODELS = {
    "ViT": (tiny_vit, {}, images()),
    "LoRA": (
        tiny_vit,
        {
            "train_base_weight": False,
            "stack_on": LoraConfig(r=4, target_modules=["q_proj", "fc1", "fc2"], init_lora_weights=False),
        },
        images(),
    ),
    "convolutions": (Convolutions, {}, images(2, 32, 48)),
}
WAYS = {
    "int8": {"grad_input_dtype": "int8"},
    "bf16": {"grad_input_dtype": "bf16"},
    "auto": {"grad_input_dtype": "auto"},
    "low-rank int8": {"grad_input_rank": 10, "grad_input_dtype": "int8"},
    "compressed": {"grad_input_dtype": "full", "compress_activations": ("activation", "norm")},
    "all": {
        "grad_input_rank": 10,
        "grad_input_dtype": "int8",
        "hadamard_size": 16,
        "compress_activations": ("activation", "norm"),
    },
}


def with_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return forward(model, x)


def checkpointed(model, x):
    return checkpoint(forward, model, x, use_reentrant=False)


def compiled(model, x):
    torch._dynamo.reset()
    base = model.base_model.model
    part = base.vit.layers[1] if hasattr(base, "vit") else model
    part.compile(backend="aot_eager", fullgraph=True)
    return forward(model, x)


REGIMES = {"autocast": with_autocast, "checkpointing": checkpointed, "compile": compiled}


def adapted(kind, **settings):
    build, own, x = MODELS[kind]
    torch.manual_seed(0)
    return get_peft_model(build(), LBPWHTConfig(**({"r": 10} | own | settings))).train(), x


def gradients(model, x, run):
    logits = run(model, x)
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits.float() - goal).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cases():
    for kind in MODELS:
        for way in WAYS:
            for regime in REGIMES:
                if regime != "compile" or way == "all":  # which takes long
                    yield pytest.param(kind, way, regime, id=f"{kind}-{way}-{regime}")


@pytest.mark.parametrize("kind, way, regime", cases())
def test_gradients_are_near_those_of_an_input_gradient_in_full(kind, way, regime, decide):
    """They are compared at the same rank and in the same regime, except for compilation."""
    decide(use_low_rank=True, fastest_precision="int8")
    model, x = adapted(kind, **WAYS[way])
    plain, _ = adapted(kind, **input_gradient(10 if way in ("low-rank int8", "all") else "full"))
    found = gradients(model, x, REGIMES[regime])
    expected = gradients(plain, x, forward if regime == "compile" else REGIMES[regime])
    assert cosine(found, expected) > 0.999
    if regime != "compile":  # which leaves no report
        ran = layout_report(model).layers.values()
        assert {"compressed": "full", "bf16": "bf16"}.get(way, "int8") in {r.precision for r in ran if not r.why_exact}
    if "compress_activations" in WAYS[way]:
        assert patches_of(model, ActivationPatch)
