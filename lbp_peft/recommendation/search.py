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
from ..measure.running import LossFunction, device_of, preserve_state, to_device
from ..tuner.validation.names import did_you_mean, unmatched_modules_to_save
from .bounds import Bounds
from .candidates import CANDIDATES, KINDS, SETTINGS, Candidate, checkpointing_call, sort_candidates, with_compile
from .choice import Reference, choose_timed, device_name, objective, undominated
from .result import Recommendation
from .runners import LocalRunner, ProcessRunner, Runner, WorkerError
from .trial import NO_TIME, TOO_LONG, UNEXPECTED, Job, Trial
from .turns import Scales, Turns

_SHARE_OF_TRIALS = 0.6  # of the time; in the rest, the best candidates take turns
_TIMED_FIRST, _MOST_TIMED = 3, 6
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

    Each candidate runs a few training steps with AdamW, on a CPU in a process of its own. Its peak memory, its saved
    activations and the cosine of its gradients with the exact ones are measured. The best candidates then train in
    turns, so that other work on the machine affects them all alike. The model is not changed.

    Of the settings within the bounds, the one with the shortest step is recommended if memory has a bound, the one with
    the least memory if the step time has one, the one with the best gradients if both have, and the one with the least
    product of memory and step time if neither has.

    Args:
        model: The plain model, on its device. PEFT adapters are put on copies.
        batches: A list of batches or a `DataLoader`, of which the first two are used. A batch is a dict of the model's
            arguments with its labels, or whatever `loss_fn` takes.
        memory: Bound of the peak memory, weights, gradients and AdamW's state included: "6GiB", "0.6x" of full
            fine-tuning's, or bytes. On a GPU it is PyTorch's allocator's, on a CPU the resident set of a process,
            Python and libraries included.
        step_time: Bound of the step time: "0.8x" of full fine-tuning's, "900ms", or seconds.
        min_cosine: The least cosine of the gradients with the exact ones; None: 0.85.
        lora: Whether to recommend a setting that trains LoRA's factors instead of whole weights.
        mixed_precision: "bf16" or "fp16", for autocast.
        minutes: The most minutes that the search may take. The result names the candidates for which there was no time.
            On a CPU, a candidate that still runs when the time is over is ended.
        loss_fn: (model, batch) -> scalar loss; None: `model(**batch).loss`.
        modules_to_save: Names of modules that are trained in full in addition to the adapters, such as the head; None:
            those outside the base model of a model of transformers, or timm's classifier.
        candidates: The candidates to compare; see [`lbp_peft.recommendation.candidates`].
        compile: Whether to try each candidate under `torch.compile` too.
        progress: Whether to show a progress bar.

    Returns:
        The recommendation. Printed, it has the table, the reason and the configuration.

    Raises:
        BudgetError: (a ValueError) no setting keeps within the bounds; the message gives the lowest possible value and
            its setting.
        ValueError: an argument is not valid, the model has adapters already, it cannot be trained on the batch, or
            not even full fine-tuning could be tried in the time.
    """
    bounds = Bounds.parse(memory, step_time, min_cosine)
    _check(model, mixed_precision, minutes)
    first_two = [*itertools.islice(iter(batches), 2)]
    if not first_two:
        raise ValueError("There are no batches to measure on.")
    device = device_of(model)
    heads = head_modules(model) if modules_to_save is None else modules_to_save
    if wrong := unmatched_modules_to_save(model, heads, None):
        raise ValueError(f"The model has no module {wrong[0]!r} to train in full.{did_you_mean(model, wrong[0])}")
    job = Job(model, to_device(first_two, device), loss_fn, heads, mixed_precision, torch.get_num_threads(), "")
    tried = tuple(candidates)
    if compile:  # one of each kind comes early, since the user asks for them
        tried = (*tried[:KINDS], *with_compile(tried[:KINDS]), *tried[KINDS:], *with_compile(SETTINGS[KINDS:]))
    search = _Search(job, tried, bounds, lora, time.monotonic() + 60 * minutes, minutes, progress)
    return search.run()


def _later_peak(trial: Trial) -> float:
    """The peak that a setting may reach in later steps, in bytes."""
    return trial.peak_bytes * (1.0 if trial.is_settled else _GROWTH)


def _precision_warning(job: Job) -> str:
    """A warning if autocast makes products slower than they are in float32; "" if it does not."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.precision or "")
    if dtype is None or product_dtype(dtype, device_of(job.model)) == dtype:
        return ""
    return (
        f"This {device_name(device_of(job.model).type)} has no instructions for products in {job.precision}, so "
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
    """One search: tries the candidates, trains the best ones in turns, and recommends one.

    Args:
        job: The model and the data.
        candidates: The candidates.
        bounds: The bounds of the recommended setting.
        lora: Whether that setting is to train LoRA's factors.
        deadline: The time, by `time.monotonic()`, at which the search has to end.
        minutes: The minutes until then, for messages.
        progress: Whether to show a progress bar.
    """

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
        only_time_is_bounded = bounds.memory is None and bounds.step_time is not None
        ordered = sort_candidates(candidates, lora, only_time_is_bounded)
        self.candidates = {candidate.label: candidate for candidate in ordered}
        self.deadline, self.minutes = deadline, minutes
        self.trials: dict[str, Trial] = {}
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.libraries_bytes = 0

    def run(self) -> Recommendation:
        start = time.monotonic()
        self.warning = _precision_warning(self.job)
        if self.warning:
            warnings.warn(self.warning, stacklevel=3)
            self.notes.append(self.warning)
        if device_of(self.job.model).type == "cpu":
            try:
                with ProcessRunner(self.job) as runner:
                    self._measure(runner)
            except WorkerError as error:
                self.notes.append(
                    f"The model could not be handed to a process of its own ({error}), so peak memory is worked out "
                    "from what PyTorch allocates, which is somewhat less than what the process takes."
                )
        if not self.trials:
            with tempfile.TemporaryDirectory() as folder:
                self.job.folder = folder
                with LocalRunner(self.job) as local_runner:
                    self._measure(local_runner)
        return self._make_recommendation(time.monotonic() - start)

    def _measure(self, runner: Runner) -> None:
        self.libraries_bytes = runner.libraries_bytes
        self._try_all(runner.measure)
        self._take_turns(runner)

    def _try_all(self, measure: Callable[[Candidate, float], Trial]) -> None:
        start = time.monotonic()
        end_of_trials = start + _SHARE_OF_TRIALS * (self.deadline - start)
        longest = {False: 0.0, True: 0.0}  # the duration of a trial, by whether the model is compiled
        bar = tqdm(self.candidates.values(), desc="memory and gradients", leave=False, disable=not self.progress)
        for number, candidate in enumerate(bar):
            began = time.monotonic()
            # One setting of each kind is tried as long as there is time, so that there is a comparison.
            end = self.deadline if number < KINDS else self._end_of_trials(end_of_trials)
            expected = began if number < KINDS else began + longest[candidate.compiled]
            if number and expected > end:
                self.left_out[candidate.label] = NO_TIME
                continue
            if why := self._why_needless(candidate):
                self.left_out[candidate.label] = why
                continue
            bar.set_postfix_str(candidate.label)
            # Compiling may take minutes. They must not use up the time of all other candidates.
            limit = (end - began) / 2 if candidate.compiled else self.deadline - began
            trial = self.trials[candidate.label] = measure(candidate, limit)
            if trial.failure.startswith(UNEXPECTED) and number == 0:
                raise ValueError(f"The model {trial.failure}")
            if trial.failure == TOO_LONG and number == 0:
                raise ValueError(
                    f"A few training steps of {candidate.label} take longer than the given {self.minutes:g} min. Give "
                    f"more time, or smaller batches. {self.warning}".strip()
                )
            longest[candidate.compiled] = max(0.7 * longest[candidate.compiled], time.monotonic() - began)
        if not any(not trial.failure for trial in self.trials.values()):
            raise ValueError("; ".join(f"{label}: {trial.failure}" for label, trial in self.trials.items()))

    def _end_of_trials(self, usual: float) -> float:
        """The time at which the last trial has to end: the deadline, as long as no setting keeps within the bounds."""
        return self.deadline if self._choose() is None else usual

    def _why_needless(self, candidate: Candidate) -> str:
        """The reason why a candidate cannot be recommended, given the trials so far; "" if it can be."""
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
        full_bytes = full.peak_bytes if full and not full.failure else None
        only_memory_is_bounded = self.bounds.memory is not None and self.bounds.step_time is None
        bound_is_known = full_bytes is not None or not self.bounds.memory_is_relative
        if only_memory_is_bounded and bound_is_known and _later_peak(plain) <= self.bounds.max_bytes(full_bytes):
            return "without what it adds, the setting keeps within the memory, and is faster"
        return ""

    @property
    def reference(self) -> Reference:
        """The trials to compare with, as far as there are any yet."""
        return Reference(self._exact_trial(lora=False), self._exact_trial(lora=True))

    def _exact_trial(self, lora: bool) -> Trial | None:
        """The trial of full fine-tuning, or of LoRA; None if it could not be measured."""
        for label, candidate in self.candidates.items():
            trial = self.trials.get(label)
            if candidate.is_exact and candidate.lora is lora and trial is not None and not trial.failure:
                return trial
        return None

    def _take_turns(self, runner: Runner) -> None:
        """Train the best candidates in turns, and correct the times and peaks of the others accordingly.

        Where the turns show that another setting is the best one, it has its turns too, before the less important ones.
        """
        before = {label: (trial.seconds, trial.peak_bytes) for label, trial in self.trials.items()}
        turns = Turns(runner, self.deadline, self.progress)
        worth_timing = self._worth_timing()
        with warnings.catch_warnings(), preserve_state(self.job.model):
            warnings.simplefilter("ignore")
            turns.train(self._with_candidates(worth_timing[:_TIMED_FIRST]))
            self._time_choice(turns, before)
            turns.train(self._with_candidates(trial for trial in worth_timing if not turns.has(trial)))
            turns.go_on()
            self._time_choice(turns, before)

    def _time_choice(self, turns: Turns, before: dict[str, tuple[float, float]]) -> None:
        """Have the setting that would be recommended take turns, if it has not yet, until that changes no more.

        Args:
            turns: The turns.
            before: The step time and the peak of each trial before there were turns, by its label.
        """
        self._correct_untimed(before, turns.scales)
        while (best := self._choose()) is not None and not turns.has(best):
            if not turns.train(self._with_candidates([best])):
                return
            self._correct_untimed(before, turns.scales)

    def _with_candidates(self, trials: Iterable[Trial]) -> list[tuple[Candidate, Trial]]:
        return [(self.candidates[trial.label], trial) for trial in trials]

    def _correct_untimed(self, before: dict[str, tuple[float, float]], scales: Scales) -> None:
        """Correct the times and peaks of trials that were not measured in turns, given what they were in the trials."""
        for label, trial in self.trials.items():
            seconds, peak_bytes = before[label]
            if not trial.failure and not trial.is_timed:
                trial.seconds = seconds * scales.seconds
            if not trial.failure and not trial.is_settled:
                trial.peak_bytes = peak_bytes + (scales.peak_bytes - 1) * (peak_bytes - self.libraries_bytes)

    def _choose(self) -> Trial | None:
        """The trial of the setting that would be recommended now; None if no setting keeps within the bounds."""
        eligible = [trial for label, trial in self.trials.items() if self.candidates[label].lora is self.lora]
        try:
            return choose_timed(eligible, self.bounds, self.reference)[0]
        except ValueError:  # none does, or full fine-tuning could not be measured, to which a bound is relative
            return None

    def _worth_timing(self) -> list[Trial]:
        """The trials whose time decides what is recommended, the most important ones first."""
        reference = self.reference
        exact = [trial for trial in (reference.full, reference.lora) if trial is not None]
        if self.lora:
            exact.reverse()
        others = [
            trial
            for trial in undominated(list(self.trials.values()))
            if self.candidates[trial.label].lora is self.lora
            and trial not in exact
            and (trial.cosine or 1) >= self.bounds.least_cosine
        ]
        others.sort(key=self._sort_key)
        # The two best ones are timed even if there is no time for the exact setting that trains other weights.
        return [*exact[:1], *others[:2], *exact[1:], *others[2:]][:_MOST_TIMED]

    def _sort_key(self, trial: Trial) -> tuple[bool, float]:
        """The key that sorts trials within the bounds first, and then by the quantity that is minimised."""
        reference, bounds = self.reference, self.bounds
        if reference.full is None and (bounds.memory_is_relative or bounds.step_time_is_relative):
            return False, objective(bounds)[0](trial)
        is_over = _later_peak(trial) > bounds.max_bytes(reference.full_bytes)
        is_over = is_over or trial.seconds > bounds.max_seconds(reference.full_seconds)
        return is_over, objective(bounds)[0](trial)

    def _make_recommendation(self, seconds: float) -> Recommendation:
        device = device_of(self.job.model)
        result = Recommendation(
            candidates=self.candidates,
            trials=self.trials,
            reference=self.reference,
            bounds=self.bounds,
            left_out=self.left_out,
            notes=self.notes,
            libraries_bytes=self.libraries_bytes,
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
