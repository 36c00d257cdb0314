"""A callback that measures the quality of gradients while transformers' Trainer trains a model."""

from __future__ import annotations

import sys
import warnings
from numbers import Integral, Real
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .measure.gradients import GradientQuality, gradient_quality
from .measure.memory import resident_now
from .measure.running import LossFunction, device_of

if TYPE_CHECKING:
    from transformers import Trainer


class LBPWHTCallback(TrainerCallback):
    """Compares the gradients with exact ones every few steps, on the batch of the step.

    Training is not disturbed: with and without the callback, the weights are the same, bit for bit. Each measurement
    takes two additional forward and backward passes, and the memory of two additional sets of gradients. Under DDP
    every process measures its own batch, and the values of the first are logged. If parameters are sharded (FSDP,
    ZeRO-3), nothing is measured, with one warning.

    The values `lbp_wht/gradient_cosine`, `lbp_wht/gradient_norm_ratio` and `lbp_wht/peak_memory_mib` go to the
    trainer's `log`, at the step that was measured: into `state.log_history`, and to the trackers of `report_to`.

    Args:
        every: The number of steps between measurements. The first one is made in step 1.
        min_cosine: Warn once when the cosine of the gradients is lower.
        loss_fn: (model, batch) -> scalar loss; None: `model(**batch).loss`.

    Attributes:
        history: The step and the [`lbp_peft.GradientQuality`] of each measurement.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[LBPWHTCallback(every=200, min_cosine=0.8)], ...)
    """

    def __init__(self, every: int = 200, min_cosine: float = 0.8, loss_fn: LossFunction | None = None):
        if not _is_a(Integral, every) or every < 1:
            raise ValueError(f"every must be an int of at least 1, got {every!r}.")
        if not _is_a(Real, min_cosine) or not 0 <= min_cosine <= 1:
            raise ValueError(f"min_cosine must be a number from 0 to 1, got {min_cosine!r}.")
        self.every, self.min_cosine, self.loss_fn = int(every), float(min_cosine), loss_fn
        self.history: list[tuple[int, GradientQuality]] = []
        self._batch: Any = None
        self._hook: RemovableHandle | None = None
        self._has_warned = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every or (model := kwargs.get("model")) is None:
            return
        if why := _why_not(model):
            self._warn(f"LBPWHTCallback measures nothing: {why}.")
            return

        def note(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled() and self._batch is None and not positional:
                self._batch = named

        self._batch = None
        self._hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook, batch, self._batch = None, self._batch, None
        if batch is None:
            self._warn("LBPWHTCallback measures nothing: it does not see the batches that the model is called with.")
            return
        model = kwargs["model"]
        with self._autocast(args, device_of(model)):
            quality = gradient_quality(model, batch, self.loss_fn)
        self.history.append((state.global_step, quality))
        values = {
            "lbp_wht/gradient_cosine": quality.cosine,
            "lbp_wht/gradient_norm_ratio": quality.norm_ratio,
            "lbp_wht/peak_memory_mib": _peak_mib(device_of(model)),
        }
        self._log(values, state, control)
        if state.is_world_process_zero and quality.cosine < self.min_cosine:
            self._warn(
                f"In step {state.global_step} the gradients have a cosine of {quality.cosine:.2f} with the exact "
                f"ones, below {self.min_cosine:g}. The worst is that of {quality.worst}, "
                f"{quality.tensors[quality.worst].cosine:.2f}. A larger r, or an exact input gradient, brings them "
                "closer; lbp_peft.recommend compares settings."
            )

    @staticmethod
    def _log(values: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        trainer = _calling_trainer()
        if trainer is None:  # the caller is not transformers' Trainer
            state.log_history.append({**values, "step": state.global_step})
            return
        its_own_follows = control.should_log  # `trainer.log` switches it off
        trainer.log(values)
        control.should_log = its_own_follows

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(text, stacklevel=3)

    @staticmethod
    def _autocast(args: TrainingArguments, device: torch.device) -> torch.autocast:
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=bool(args.fp16 or args.bf16))


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _calling_trainer() -> Trainer | None:
    """The trainer among the callers. transformers passes its state to callbacks, but neither itself nor its `log`."""
    from transformers import Trainer  # here, since it loads datasets and pandas, which take 80 MiB

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
        frame = frame.f_back
    return None


def _why_not(model: nn.Module) -> str:
    from .tuner.layers.base import LBPWHTLayer

    if not any(isinstance(module, LBPWHTLayer) for module in model.modules()):
        return "the model has no LBP-WHT layers"
    if any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters()):
        return "its parameters are sharded"
    return ""


def _peak_mib(device: torch.device) -> float:
    """The peak memory of this process in MiB: of PyTorch's allocator on a GPU, of the resident set on a CPU."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_now()["VmHWM"]
    return peak / 2**20
