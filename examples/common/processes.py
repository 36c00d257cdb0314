"""Sets up training on one process or several."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, send_to_device
from torch import nn

from .options import Options

# With these, the prepared model is sharded or in another dtype, so only all processes together can save or run it.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator(options: Options) -> Accelerator:
    """The accelerator of this process, alone or one of those that `accelerate launch` or `torchrun` started.

    Raises:
        SystemExit: several processes were started, but each takes itself for the only one.
    """
    accelerator = Accelerator(
        # Without a GPU, accelerate has to be told to form a group of torchrun's processes.
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
    if plugin := accelerator.state.deepspeed_plugin:
        # DeepSpeed clips gradients itself, by default at a norm of 1.
        plugin.deepspeed_config["gradient_clipping"] = options.max_grad_norm or 0.0
    count = accelerator.num_processes
    accelerator.print(f"{count} process{'es' if count > 1 else ''}, {accelerator.device.type}.")
    return accelerator


def on_main(processes: Accelerator | PartialState, function: Callable[..., Any], *values: Any) -> Any:
    """Call a function on the main process only. If it fails there, all processes stop.

    Returns:
        What it returned, on every process.
    """
    outcome, failure = [None, ""], None
    if processes.is_main_process:
        try:
            outcome[0] = function(*values)
        except (Exception, SystemExit) as error:
            outcome[1], failure = f"{type(error).__name__}: {error}", error
    result, why = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if why:
        raise SystemExit(f"The main process failed. {why}")
    return result


def plain_copy(accelerator: Accelerator, model: nn.Module) -> nn.Module | None:
    """A copy of the model that will get the trained weights; only on the main process of sharded training."""
    if accelerator.distributed_type in SHARDED and accelerator.is_main_process:
        return copy.deepcopy(model)
    return None


def whole_model(accelerator: Accelerator, model: nn.Module, plain: nn.Module | None) -> nn.Module:
    """The model without accelerate's wrappers. All processes take part.

    Args:
        model: The model as accelerate prepared it.
        plain: Its [`plain_copy`]. It takes the weights of a sharded model, and can then be saved and run by the main
            process alone.
    """
    if accelerator.distributed_type not in SHARDED:
        return accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    weights = accelerator.get_state_dict(model)
    if plain is None:
        return accelerator.unwrap_model(model)
    plain.load_state_dict(weights)
    return plain


def freeze_unused(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
    """Freeze the parameters that the loss does not depend on, such as the mask token of DINOv2.

    They would never change, and processes that train together would wait for their gradients.

    Args:
        model: The model. It is run once in eval mode, so that no layer is skipped at random.
        batch: A batch with labels.

    Returns:
        The names of these parameters.
    """
    trained = model.training
    model.eval()
    loss = model(**send_to_device(batch, next(model.parameters()).device)).loss
    model.train(trained)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad = False
    return unused
