"""Measures the cost of a training step: the time of its parts, memory and multiply-adds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .activations import saved_activations
from .memory import peak_memory
from .products import multiply_adds
from .running import LossFunction, device_of, loss_of_output, preserve_state, to_device
from .timing import now
from .warming_up import run_until_warm


@dataclass(frozen=True)
class StepCost:
    """The cost of a training step. Printed, it is a summary.

    Attributes:
        forward, backward, optimiser: The time of each part in seconds, medians of the timed steps.
        saved_bytes: The bytes that the forward pass saves for the backward pass, without parameters and buffers.
        peak_bytes: The most bytes in use at once, with weights, gradients and the state of the optimiser: on a GPU the
            allocation of PyTorch's allocator, on a CPU the resident set of this process, all its other data included.
        forward_multiply_adds, backward_multiply_adds: The multiply-adds of matrix products, convolutions and attention.
        trained_parameters: The number of trained values.
    """

    forward: float
    backward: float
    optimiser: float
    saved_bytes: int
    peak_bytes: int
    forward_multiply_adds: int
    backward_multiply_adds: int
    trained_parameters: int

    @property
    def seconds(self) -> float:
        """The time of the whole step."""
        return self.forward + self.backward + self.optimiser

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1e3 * getattr(self, name):.0f}" for name in ("forward", "backward", "optimiser"))
        return (
            f"step {1e3 * self.seconds:.0f} ms ({parts}), peak memory {self.peak_bytes / 2**20:.0f} MiB, saved "
            f"activations {self.saved_bytes / 2**20:.0f} MiB, multiply-adds {self.forward_multiply_adds / 1e9:.1f} G "
            f"forward and {self.backward_multiply_adds / 1e9:.1f} G backward, {self.trained_parameters / 1e6:.2f} M "
            "trained parameters"
        )


def step_cost(model: nn.Module, batch: object, loss_fn: LossFunction | None = None, steps: int = 3) -> StepCost:
    """Measure forward pass, backward pass and optimiser step (AdamW) on one batch.

    The optimiser has a learning rate of 0: no weight changes. Gradients, buffers, modes and the state of random number
    generators are left as they were. Other work on the machine disturbs the times. To compare settings, which have to
    take turns, use [`lbp_peft.recommend`].

    Args:
        model: Any model, adapted or not, on its device.
        batch: The arguments of the model including labels, or the batch for `loss_fn`.
        loss_fn: (model, batch) -> scalar loss. None: `model(**batch).loss`.
        steps: The number of timed steps. One step before them counts memory and multiply-adds, and others are run
            until nothing is traced or compiled any more.

    Raises:
        ValueError: the model returns no loss or trains nothing, its gradients are not finite, or `steps` is below 1.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("The model has no trained parameters.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    device, loss_fn = device_of(model), loss_fn or loss_of_output
    batch = to_device(batch, device)
    optimiser = idle_optimiser(trained)
    with preserve_state(model):
        model.train()
        with saved_activations(model) as saved, multiply_adds() as forward:
            loss = loss_fn(model, batch)
        with multiply_adds() as backward:
            loss.backward()
        del loss
        check_finite(optimiser)
        optimiser.step()
        optimiser.zero_grad()
        step = partial(time_step, model, batch, loss_fn, optimiser)
        with peak_memory(device) as peak:
            run_until_warm(model, step)
            times = [step() for _ in range(steps)]
    forward_s, backward_s, optimiser_s = (statistics.median(part) for part in zip(*times, strict=True))
    number = sum(parameter.numel() for parameter in trained)
    return StepCost(forward_s, backward_s, optimiser_s, saved.bytes, peak.bytes, forward.total, backward.total, number)


def idle_optimiser(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW, the default of transformers' `Trainer`. At a learning rate of 0 it does all its work in vain."""
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)


def check_finite(optimiser: torch.optim.Optimizer) -> None:
    """Check that a step with a learning rate of 0 changes no weight: 0 times infinity is not 0.

    Raises:
        ValueError: a gradient is infinite or not a number.
    """
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if gradients and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
        raise ValueError("the gradients of the batch are not finite")


def time_step(
    model: nn.Module, batch: object, loss_fn: LossFunction, optimiser: torch.optim.Optimizer, clear: bool = True
) -> tuple[float, float, float]:
    """Run a training step.

    Args:
        clear: Whether to drop the gradients at the end.

    Returns:
        Seconds of forward pass, backward pass and optimiser step.
    """
    start = now()
    loss = loss_fn(model, batch)
    middle = now()
    loss.backward()
    del loss
    end = now()
    check_finite(optimiser)
    begin = now()
    optimiser.step()
    last = now()
    if clear:
        optimiser.zero_grad(set_to_none=True)
    return middle - start, end - middle, last - begin
