"""Trains on batches that differ from process to process, and on the same batches with one process."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from models import CASES, forward, images, input_gradient, tiny_vit
from peft import LoraConfig, get_peft_model
from transformers import Dinov2Config, Dinov2ForImageClassification

from lbp_peft import LBPWHTConfig

PROCESSES, STEPS, BATCH = 2, 8, 2  # steps, and images per step of each process
HEAD = {"modules_to_save": ["classifier"]}


def lbp_wht(**settings):
    return get_peft_model(tiny_vit(), LBPWHTConfig(**({"r": 3, "grad_input_dtype": "full"} | HEAD | settings)))


def stacked(**settings):
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], **HEAD, **settings)
    return lbp_wht(grad_input_rank=6, train_base_weight=False, stack_on=lora)


def case(name, **settings):
    exact = input_gradient("full") | {"modules_to_save": ["head"]}  # the workers do not run the fixture that sets this
    return next(case for case in CASES if case.name == name).adapted(**(exact | settings))


def dinov2():
    """A model whose mask token is not used in the forward pass."""
    torch.manual_seed(0)
    config = Dinov2Config(image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return get_peft_model(Dinov2ForImageClassification(config), LBPWHTConfig(r=3, grad_input_dtype="full", **HEAD))


@dataclass(frozen=True, eq=False)
class Trial:
    """A model trained on batches that differ in every step and on every process.

    Args:
        name: The name of the trial.
        build: Builds the adapted model.
        inputs: A function from a seed to a batch of one process.
        low_rank: The expected number of layers with a low-rank backward pass.
        wrapping: Arguments of DistributedDataParallel.
        adam: Whether to use AdamW instead of SGD with momentum.
        micro_batches: The number of micro-batches per step, whose gradients are accumulated.
        checkpointing: Whether to use gradient checkpointing.
    """

    name: str
    build: Callable
    inputs: Callable = functools.partial(images, BATCH)
    low_rank: int = 12
    wrapping: dict = field(default_factory=dict)
    adam: bool = False
    micro_batches: int = 1
    checkpointing: bool = False

    def model(self):
        model = self.build().train()
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def optimizer(self, model):
        weights = [p for p in model.parameters() if p.requires_grad]
        if not self.adam:
            return torch.optim.SGD(weights, lr=0.05, momentum=0.9)
        # With the usual eps, a gradient that consists of rounding errors (k_proj's bias) would take full steps.
        return torch.optim.AdamW(weights, lr=1e-3, eps=1e-5)

    def loss(self, model, step, micro_batch, rank):
        seed = (step * self.micro_batches + micro_batch) * PROCESSES + rank
        logits = forward(model, self.inputs(seed=seed))
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1000 + seed))
        return (logits - goal).square().mean() / self.micro_batches


def sequences(seed):
    return torch.randn(BATCH, 9, 12, generator=torch.Generator().manual_seed(seed))


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_alone(trial, steps=STEPS, processes=PROCESSES):
    model = trial.model()
    optimizer = trial.optimizer(model)
    for step in range(steps):
        for micro_batch in range(trial.micro_batches):
            for rank in range(processes):
                (trial.loss(model, step, micro_batch, rank) / processes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)
