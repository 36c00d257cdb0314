"""Trials: measurements of a candidate in a few training steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.activations import SavedActivations, saved_activations
from ..measure.gradients import compare
from ..measure.memory import peak_memory
from ..measure.running import LossFunction, device_of, loss_of_output
from ..measure.steps import idle_optimiser, time_step
from ..measure.timing import now
from ..measure.warming_up import run_until_warm
from ..tuner.layers.base import LBPWHTLayer
from ..tuner.report import layout_report
from .candidates import Candidate, NotApplicableError

SEED = 0
OUT_OF_MEMORY, TOO_LONG, NO_TIME = "out of memory", "takes longer than the time that was left", "no time"
UNEXPECTED = "cannot be trained: "  # the beginning of other failures
_LORA_PERTURBATION = 1e-3


@dataclass
class Job:
    """The model and the data for all candidates.

    Attributes:
        model: The plain model.
        batches: Batches on the device. Each step takes the next one, and the first one after the last.
        loss_fn: (model, batch) -> scalar loss; None: the model returns it.
        heads: The names of modules that adapters train in full.
        precision: "bf16" or "fp16" for autocast; None: no autocast.
        threads: The number of threads of PyTorch on a CPU.
        folder: A folder for the exact gradients, which later trials read.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss_fn: LossFunction | None
    heads: list[str]
    precision: str | None
    threads: int
    folder: str

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self.autocast(device_of(model)):
            return (self.loss_fn or loss_of_output)(model, batch)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)


@dataclass
class Trial:
    """The measurements of a candidate.

    Attributes:
        label: The candidate's label.
        peak_bytes: The most bytes in use at once, with weights, gradients and AdamW's state.
        saved_bytes: The bytes that the forward pass saves for the backward pass.
        seconds: The time of a training step, in which nothing was traced or compiled.
        cosine, norm_ratio: The cosine between the gradients of the adapted layers' matrices, as one vector, and the
            exact ones, and the ratio of their norms; None if there are no exact ones.
        low_rank_layers, adapted_layers: The numbers of layers whose backward pass was not exact, and of all layers with
            LBP-WHT.
        is_timed: Whether `seconds` is from rounds in which the candidates took turns, and not from a single step.
        warm_up_seconds: The time of the steps before the one that was timed in the trial.
        is_counted: Whether `peak_bytes` was computed from PyTorch's allocations, and not read from a process.
        is_settled: Whether `peak_bytes` is that of a longer training, and not of the first few steps: on a CPU the
            resident set of a process grows for some steps, as gaps form in its heap.
        failure: The reason why the candidate could not be measured; "" if it was.
    """

    label: str
    peak_bytes: float = 0
    saved_bytes: int = 0
    seconds: float = 0.0
    cosine: float | None = None
    norm_ratio: float | None = None
    low_rank_layers: int = 0
    adapted_layers: int = 0
    is_timed: bool = False
    warm_up_seconds: float = 0.0
    is_counted: bool = False
    is_settled: bool = False
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class RetainedLoss:
    """The loss function of a job, which retains each value until it has the next one.

    The variable `loss` of most training loops does so too. The graph behind the value takes little memory, but it is
    scattered: as long as it is in use in the next forward pass, the heap has more gaps, of up to 12 % of the resident
    set.
    """

    def __init__(self, job: Job):
        self._job = job
        self._last: Tensor | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self._last = self._job.loss(model, batch)
        return self._last


def try_candidate(model: nn.Module, job: Job, candidate: Candidate) -> Trial:
    """Run a few training steps of a candidate, time the last one, and compare its gradients with the exact ones.

    The model is changed: pass a copy, or run in a process that ends afterwards. The first exact candidate of each
    kind, of whole weights or LoRA's factors, writes its gradients to `job.folder`, which those after it read.

    Returns:
        The trial, whose peak memory includes all other data of the process.
    """
    try:
        return _run_trial(model, job, candidate)
    except NotApplicableError as error:
        return Trial(candidate.label, failure=str(error))
    except (torch.OutOfMemoryError, MemoryError):
        return Trial(candidate.label, failure=OUT_OF_MEMORY)
    except Exception as error:
        return Trial(candidate.label, failure=f"{UNEXPECTED}{error or type(error).__name__}")


def _run_trial(model: nn.Module, job: Job, candidate: Candidate) -> Trial:
    device = device_of(model)
    torch.manual_seed(SEED)
    model = candidate.apply_to(model, job.heads).train()
    if candidate.lora:
        _perturb_lora(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise NotApplicableError("it trains no parameters of this model")
    optimiser = idle_optimiser(trained)
    first, second = job.batches[0], job.batches[1 % len(job.batches)]
    began = now()
    saved, loss = SavedActivations(), RetainedLoss(job)

    def counted_loss(model: nn.Module, batch: Any) -> Tensor:
        with saved_activations(model) as counted:
            value = loss(model, batch)
        saved.bytes = counted.bytes
        return value

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        torch.manual_seed(SEED)
        return sum(time_step(model, second, loss, optimiser, clear=False))

    with warnings.catch_warnings(), peak_memory(device) as peak:
        warnings.simplefilter("ignore")
        # In the first step the optimiser creates its state, and base weights are offloaded. It runs on a whole batch,
        # since what is in memory when the state is created decides where the heap has gaps.
        time_step(model, first, loss, optimiser)
        time_step(model, second, counted_loss, optimiser)
        seconds = run_until_warm(model, step)
    trial = Trial(candidate.label, peak.bytes, saved.bytes, seconds, warm_up_seconds=now() - began - seconds)
    trial.is_settled = device.type != "cpu"
    report = layout_report(model)
    trial.adapted_layers = len(report.layers)
    trial.low_rank_layers = sum(ran is not None and not ran.why_exact for ran in report.layers.values())
    _compare_gradients(trial, model, job, candidate)
    return trial


@torch.no_grad()
def _perturb_lora(model: nn.Module) -> None:
    """Change LoRA's factor B a little, as the first steps do: it starts at zero, so that A has no gradient."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_B." in name and parameter.requires_grad:
            parameter.add_(_LORA_PERTURBATION * torch.randn(parameter.shape, generator=generator).to(parameter))


def _compare_gradients(trial: Trial, model: nn.Module, job: Job, candidate: Candidate) -> None:
    """Compare the gradients with the exact ones in the job's folder, if there are any yet, or write them there."""
    gradients = {
        plain_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    file = Path(job.folder, "lora.pt" if candidate.lora else "full.pt")
    if candidate.is_exact and not file.exists():
        torch.save(gradients, file)
    if candidate.is_exact:
        trial.cosine = trial.norm_ratio = 1.0
        return
    if not file.exists():
        return
    exact = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
    layers = [plain_name(name) + "." for name, module in model.named_modules() if isinstance(module, LBPWHTLayer)]
    matrices = [name for name in gradients if name.startswith(tuple(layers)) and gradients[name].dim() > 1]
    quality = compare({name: gradients[name].cpu() for name in matrices}, exact, matrices)
    trial.cosine, trial.norm_ratio = quality.cosine, quality.norm_ratio


def plain_name(name: str) -> str:
    """The name that a parameter or module of an adapted model has in the plain model, or in a model with LoRA alone."""
    name = name.removeprefix("base_model.model.")
    for before, after in (
        (".lbpwht_weight.default", ".weight"),
        (".lbpwht_bias.default", ".bias"),
        (".modules_to_save.default", ""),
        (".base_layer", ""),
        (".low_rank_backward", ""),
    ):
        name = name.replace(before, after)
    return name
