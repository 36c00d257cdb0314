"""Measures candidates within a given time, and recommends one."""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..head import head_modules
from ..instructions import product_dtype
from ..measure.undisturbed import LossFunction, device_of, to_device
from ..tuner.validation.names import did_you_mean, unmatched_modules_to_save
from .bounds import Bounds
from .candidates import CANDIDATES, KINDS, SETTINGS, Candidate, checkpointing_call, compiled, in_order
from .choice import Reference, choose, device_in_words, in_the_running, price_of
from .processes import Apart, Here, WorkerError
from .result import Recommendation
from .trial import NO_TIME, TOO_LONG, UNEXPECTED, Job, Trial
from .turns import take_turns

_FOR_TRIALS = 0.6  # the share of the time; the rest is for rounds in which the best candidates take turns
_MOST_TIMED = 6
_GROWTH = 1.1  # the factor by which the resident set of a process may grow after the steps of a trial


def recommend(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    memory: str | float | None = None,
    step_time: str | float | None = None,
    min_cosine: float | None = None,
    lora: bool = False,
    mixed_precision: str | None = None,
    minutes: float = 2.5,
    loss_fn: LossFunction | None = None,
    modules_to_save: list[str] | None = None,
    candidates: Sequence[Candidate] = CANDIDATES,
    compile: bool = False,
    progress: bool = False,
) -> Recommendation:
    """Measure ways to train a model on this machine, and recommend one that keeps within the bounds.

    Each candidate takes a training step with AdamW after a short one. Its peak memory, its saved activations and the
    cosine of its gradients with exact ones are measured, on a CPU in a process of its own. The best candidates then
    take turns in this process, so that other work on the machine affects them all alike. The model is not changed.

    What is recommended is, of the settings within the bounds, the one with the shortest step if memory has a bound,
    with the least memory if the step time has one, with the best gradients if both have, and with the least product of
    memory and step time if neither has.

    Args:
        model: The plain model, on its device. PEFT adapters are put on copies.
        batches: A list of batches or a `DataLoader`, of which the first two are used. A batch is a dict of the model's
            arguments with its labels, or whatever `loss_fn` takes.
        memory: Bound of the peak memory, weights, gradients and AdamW's state included: "6GiB", "0.6x" of full
            fine-tuning's, or bytes. On a GPU it is PyTorch's allocator's, on a CPU the resident set of a process,
            Python and libraries included.
        step_time: Bound of the step time: "0.8x" of full fine-tuning's, "900ms", or seconds.
        min_cosine: The least cosine of the gradients with the exact ones; None: 0.85.
        lora: Recommend a setting that trains LoRA's factors, and not whole weights.
        mixed_precision: "bf16" or "fp16", for autocast.
        minutes: The most minutes that it may take. Candidates that do not fit in are left out, and named. On a CPU a
            candidate that still runs when the time is over is ended.
        loss_fn: (model, batch) -> scalar loss; None: `model(**batch).loss`.
        modules_to_save: Names of modules that are trained in full in addition to the adapters, such as the head; None:
            those outside the base model of a model of transformers, or timm's classifier.
        candidates: The candidates to compare; see [`lbp_peft.recommendation.candidates`].
        compile: Whether to try each candidate under `torch.compile` too.
        progress: Whether to show a progress bar.

    Returns:
        The recommendation. Printed, it has the table, the reason and the configuration.

    Raises:
        BudgetError: (a ValueError) nothing keeps within the bounds; the message says what the least is, and with what.
        ValueError: an argument makes no sense, the model has adapters already, it cannot be trained on the batch, or
            not even full fine-tuning could be tried in the time.
    """
    bounds = Bounds.parse(memory, step_time, min_cosine)
    _check(model, mixed_precision, minutes)
    first = [*itertools.islice(iter(batches), 2)]
    if not first:
        raise ValueError("There are no batches to measure on.")
    device = device_of(model)
    heads = head_modules(model) if modules_to_save is None else modules_to_save
    if wrong := unmatched_modules_to_save(model, heads, None):
        raise ValueError(f"The model has no module {wrong[0]!r} to train in full.{did_you_mean(model, wrong[0])}")
    job = Job(model, to_device(first, device), loss_fn, heads, mixed_precision, torch.get_num_threads(), "")
    tried = tuple(candidates)
    if compile:  # those of each kind early, since the user asks for them
        tried = (*tried[:KINDS], *compiled(tried[:KINDS]), *tried[KINDS:], *compiled(SETTINGS[KINDS:]))
    search = _Search(job, tried, bounds, lora, time.monotonic() + 60 * minutes, minutes, progress)
    return search.run()


def _grown(trial: Trial) -> float:
    """The peak that a setting may have in later steps."""
    return trial.peak_bytes * (1.0 if trial.is_settled else _GROWTH)


def _slow_precision(job: Job) -> str:
    """A warning where autocast makes products slower than they are in float32; else ""."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.precision or "")
    if dtype is None or product_dtype(dtype, device_of(job.model)) == dtype:
        return ""
    return (
        f"This {device_in_words(device_of(job.model).type)} has no instructions for products in {job.precision}, so "
        "that mixed precision makes steps many times longer than float32 does. Leave it out here."
    )


def _check(model: nn.Module, mixed_precision: str | None, minutes: float) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has adapters already. Give the plain model: each candidate puts its own on it.")
    if mixed_precision not in (None, "no", "bf16", "fp16"):
        raise ValueError(f'mixed_precision must be "bf16", "fp16" or None, got {mixed_precision!r}.')
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}.")
    if next(model.parameters(), None) is None:
        raise ValueError("The model has no parameters.")


class _Search:
    def __init__(
        self,
        job: Job,
        candidates: Sequence[Candidate],
        bounds: Bounds,
        lora: bool,
        deadline: float,
        minutes: float,
        progress: bool,
    ):
        if job.precision == "no":
            job.precision = None
        self.job, self.bounds, self.lora, self.progress = job, bounds, lora, progress
        memory_is_free = bounds.memory is None and bounds.step_time is not None
        self.candidates = {one.label: one for one in in_order(candidates, lora, memory_is_free)}
        self.end, self.minutes = deadline, minutes
        self.trials: dict[str, Trial] = {}
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.libraries = 0

    def run(self) -> Recommendation:
        start = time.monotonic()
        self.slow = _slow_precision(self.job)
        if self.slow:
            warnings.warn(self.slow, stacklevel=3)
            self.notes.append(self.slow)
        if device_of(self.job.model).type == "cpu":
            try:
                with Apart(self.job) as place:
                    self._measure(place)
            except WorkerError as error:
                self.notes.append(
                    f"The model could not be handed to a process of its own ({error}), so peak memory is worked out "
                    "from what PyTorch allocates, which is somewhat less than what the process takes."
                )
        if not self.trials:
            with tempfile.TemporaryDirectory() as folder:
                self.job.folder = folder
                with Here(self.job) as here:
                    self._measure(here)
        return self._recommended(time.monotonic() - start)

    def _measure(self, place: Apart | Here) -> None:
        self.libraries = place.libraries
        self._try_all(place.measure)
        self._take_turns(place)

    def _try_all(self, measure: Callable[[Candidate, float], Trial]) -> None:
        start = time.monotonic()
        until = start + _FOR_TRIALS * (self.end - start)
        longest = {False: 0.0, True: 0.0}  # the duration of a trial, by whether the model is compiled
        bar = tqdm(self.candidates.values(), desc="memory and gradients", leave=False, disable=not self.progress)
        for number, candidate in enumerate(bar):
            began = time.monotonic()
            # One setting of each kind is tried as long as there is time, so that there is a comparison.
            end = self.end if number < KINDS else self._until(until)
            if number and (began if number < KINDS else began + longest[candidate.compiled]) > end:
                self.left_out[candidate.label] = NO_TIME
                continue
            if why := self._needless(candidate):
                self.left_out[candidate.label] = why
                continue
            bar.set_postfix_str(candidate.label)
            # Compiling may take minutes, which are not to be those of all other candidates.
            limit = (end - began) / 2 if candidate.compiled else self.end - began
            trial = self.trials[candidate.label] = measure(candidate, limit)
            if trial.failure.startswith(UNEXPECTED) and number == 0:
                raise ValueError(f"The model {trial.failure}")
            if trial.failure == TOO_LONG and number == 0:
                raise ValueError(
                    f"A few training steps of {candidate.label} take longer than the given {self.minutes:g} min. Give "
                    f"more time, or smaller batches. {self.slow}".strip()
                )
            longest[candidate.compiled] = max(0.7 * longest[candidate.compiled], time.monotonic() - began)
        if not any(not trial.failure for trial in self.trials.values()):
            raise ValueError("; ".join(f"{label}: {trial.failure}" for label, trial in self.trials.items()))

    def _until(self, usual: float) -> float:
        """The time at which the last trial has to end: later, as long as nothing keeps within the bounds."""
        own = [trial for label, trial in self.trials.items() if self.candidates[label].lora is self.lora]
        try:
            choose(own, self.bounds, self.reference)
        except ValueError:  # nothing does, or full fine-tuning, with which to compare, could not be measured
            return self.end
        return usual

    def _needless(self, candidate: Candidate) -> str:
        """The reason why a candidate cannot be recommended: its gradients are not better than another setting's."""
        if candidate.saves_memory and candidate.lora != self.lora and not candidate.is_exact:
            return "trains other weights than those asked for"
        too_poor = f"cosine below {self.bounds.least_cosine:g}"
        if self.left_out.get(candidate.no_better_than) == too_poor:
            return too_poor
        plain = self.trials.get(candidate.no_better_than)
        if plain is None or plain.failure:
            return ""
        if candidate.lora == self.lora and plain.cosine is not None and plain.cosine < self.bounds.least_cosine:
            return too_poor
        if not candidate.saves_memory:
            return ""
        full = self.trials.get(SETTINGS[0].label)
        relative = full.peak_bytes if full and not full.failure else None
        memory_alone = self.bounds.memory is not None and self.bounds.step_time is None
        is_known = relative is not None or not self.bounds.memory_is_relative
        if memory_alone and is_known and _grown(plain) <= self.bounds.most_memory(relative):
            return "without what it adds, the setting keeps within the memory, and is faster"
        return ""

    @property
    def reference(self) -> Reference:
        full, lora = (
            next(
                (
                    self.trials[label]
                    for label, one in self.candidates.items()
                    if one.is_exact and one.lora is is_lora and label in self.trials and not self.trials[label].failure
                ),
                None,
            )
            for is_lora in (False, True)
        )
        return Reference(full, lora)

    def _take_turns(self, place: Apart | Here) -> None:
        """Train the candidates that matter in turns, and correct time and memory of the others accordingly."""
        chosen = [(self.candidates[trial.label], trial) for trial in self._worth_timing()]
        scales = take_turns(place, chosen, self.end, self.progress)
        for trial in self.trials.values():
            if not trial.failure and not trial.is_timed:
                trial.seconds *= scales.seconds
            if not trial.failure and not trial.is_settled:
                trial.peak_bytes += (scales.peak_bytes - 1) * (trial.peak_bytes - self.libraries)

    def _worth_timing(self) -> list[Trial]:
        """The trials whose time decides what is recommended, the most important ones first."""
        reference = self.reference
        first = [trial for trial in (reference.full, reference.lora) if trial is not None]
        own = [
            trial
            for trial in in_the_running(list(self.trials.values()))
            if self.candidates[trial.label].lora is self.lora
        ]
        others = sorted(
            (trial for trial in own if trial not in first and (trial.cosine or 1) >= self.bounds.least_cosine),
            key=self._rank,
        )
        if self.lora:
            first.reverse()
        # The most likely ones are timed even if there is no time for the exact setting that trains other weights.
        return [*first[:1], *others[:2], *first[1:], *others[2:]][:_MOST_TIMED]

    def _rank(self, trial: Trial) -> tuple[bool, float]:
        """A sorting key: trials within the bounds first, then by the quantity that is minimised."""
        reference, bounds = self.reference, self.bounds
        if reference.full is None and (bounds.memory_is_relative or bounds.step_time_is_relative):
            return False, price_of(bounds)[0](trial)
        over = _grown(trial) > bounds.most_memory(reference.full_bytes)
        over = over or trial.seconds > bounds.most_seconds(reference.full_seconds)
        return over, price_of(bounds)[0](trial)

    def _recommended(self, seconds: float) -> Recommendation:
        device = device_of(self.job.model)
        result = Recommendation(
            candidates=self.candidates,
            trials=self.trials,
            reference=self.reference,
            bounds=self.bounds,
            left_out=self.left_out,
            notes=self.notes,
            libraries_bytes=self.libraries,
            seconds=seconds,
            device=str(device),
            precision=self.job.precision or "float32",
            heads=self.job.heads,
            checkpointing_call=checkpointing_call(self.job.model),
        )
        result.choose(self.job.model, self.lora)
        if not result.chosen.is_settled and not result.chosen.is_counted:
            self.notes.append(
                f"There was no time to train with {result.chosen.label} for more than its first few steps. Later steps "
                "have needed up to 13 % more memory, so leave room, or give more minutes."
            )
        return result
