"""One process, or several: what all of them need before training starts."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from torch import nn

from .options import Options


def make_accelerator(options: Options) -> Accelerator:
    """The accelerator of this process, alone or one of those that `accelerate launch` or `torchrun` started.

    Raises:
        SystemExit: several processes were started, but each takes itself for the only one.
    """
    accelerator = Accelerator(
        # Without a device, accelerate would let each process of torchrun run alone unless it is told so.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to,
        project_dir=options.output,
        step_scheduler_with_optimizer=False,  # the training loop steps the schedule once an update
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise SystemExit(f"{started} processes were started, but they form groups of {accelerator.num_processes}.")
    count = accelerator.num_processes
    accelerator.print(f"{count} process{'es' if count > 1 else ''}, {accelerator.device.type}.")
    return accelerator


def freeze_unused(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
    """Freeze the parameters that the loss does not depend on, such as the mask token of DINOv2.

    They would never change; but processes that train together would wait for their gradients.

    Args:
        model: Run once, in eval mode, so that no layer is left out by chance and no random number is drawn.
        batch: With labels.

    Returns:
        Their names.
    """
    trained = model.training
    model.eval()
    loss = model(**batch).loss
    model.train(trained)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad = False
    return unused
