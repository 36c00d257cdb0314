"""Chooses among the measured settings, and gives the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .bounds import Bounds, BudgetError
from .trial import Trial

_NEGLIGIBLE = 0.03  # the relative difference in step time or peak between two runs of the same program
_SAME_COSINE = 0.005
LORA_INSTEAD = "to choose among its settings, give --lora (in Python, lora=True)"


@dataclass(frozen=True)
class Reference:
    """The trials that others are compared with; None if they could not be measured.

    Attributes:
        full, lora: The trials of full fine-tuning and of LoRA.
    """

    full: Trial | None
    lora: Trial | None

    @property
    def full_bytes(self) -> float | None:
        """The peak of full fine-tuning."""
        return None if self.full is None else self.full.peak_bytes

    @property
    def full_seconds(self) -> float | None:
        """The step time of full fine-tuning."""
        return None if self.full is None else self.full.seconds

    def of(self, is_lora: bool) -> Trial | None:
        """The exact setting that trains the same weights: full fine-tuning or LoRA."""
        return self.lora if is_lora else self.full


def choose(trials: Sequence[Trial], bounds: Bounds, reference: Reference) -> tuple[Trial, str]:
    """Choose the best setting among those that keep within the bounds.

    Memory or step time is minimised, whichever has no bound, or their product if neither has one. If both have one, the
    setting with the best gradients is chosen. Among settings that differ by a few percent only, the one with the best
    gradients is chosen. Full fine-tuning or LoRA by itself is chosen if no other setting gains anything over it.

    Args:
        trials: The trials of the settings. Failed ones are skipped.
        bounds: The bounds.
        reference: The trials to compare with.

    Returns:
        The trial of the chosen setting, and the rule by which it was chosen, in words.

    Raises:
        BudgetError: none keeps within the bounds.
    """
    max_bytes = bounds.max_bytes(reference.full_bytes)
    max_seconds = bounds.max_seconds(reference.full_seconds)
    measured = [trial for trial in trials if not trial.failure]
    within = [
        trial
        for trial in measured
        if trial.peak_bytes <= max_bytes
        and trial.seconds <= max_seconds
        and (trial.cosine is None or trial.cosine >= bounds.least_cosine)
    ]
    if not within:
        raise BudgetError(_message_of_failure(measured, bounds, max_bytes, max_seconds))
    price, rule = objective(bounds)
    least = min(map(price, within))
    # Differences in the cosine are small, so that smaller ones count.
    margin = _SAME_COSINE if bounds.memory and bounds.step_time else _NEGLIGIBLE * least
    nearly_equal = [trial for trial in within if price(trial) <= least + margin]
    best = max(nearly_equal, key=lambda trial: (_cosine(trial), -trial.seconds * trial.peak_bytes))
    return next((exact for exact in within if _is_as_good(exact, best, reference)), best), rule


def choose_timed(trials: Sequence[Trial], bounds: Bounds, reference: Reference) -> tuple[Trial, str]:
    """Choose as [`choose`] does, among the trials that were timed in turns if one of these keeps within the bounds.

    Other trials have the time of a single step, which says little.
    """
    try:
        return choose([trial for trial in trials if trial.is_timed], bounds, reference)
    except BudgetError:
        return choose(trials, bounds, reference)


def _is_as_good(exact: Trial, best: Trial, reference: Reference) -> bool:
    """Whether a trial is that of full fine-tuning or LoRA, and takes as little time and memory as the best setting."""
    negligible = 1 + _NEGLIGIBLE
    return (
        exact in (reference.full, reference.lora)
        and exact.seconds <= negligible * best.seconds
        and exact.peak_bytes <= negligible * best.peak_bytes
    )


def objective(bounds: Bounds) -> tuple[Callable[[Trial], float], str]:
    """The quantity that is to be minimised, and the rule in words."""
    good = f"a gradient cosine of at least {bounds.least_cosine:g}"
    within = "of the measured settings that keep within"
    if bounds.memory and bounds.step_time:
        return lambda trial: -_cosine(trial), f"the best gradients {within} the memory and the step time"
    if bounds.memory:
        return lambda trial: trial.seconds, f"the shortest step {within} the memory and have {good}"
    if bounds.step_time:
        return lambda trial: trial.peak_bytes, f"the least peak memory {within} the step time and have {good}"
    return (
        lambda trial: trial.seconds * trial.peak_bytes,
        f"the least product of step time and peak memory of the measured settings that have {good}",
    )


def _cosine(trial: Trial) -> float:
    return -math.inf if trial.cosine is None else trial.cosine


def _message_of_failure(trials: Sequence[Trial], bounds: Bounds, max_bytes: float, max_seconds: float) -> str:
    """The message of the error: the lowest possible value for each bound by itself, or for both together."""
    good = [trial for trial in trials if trial.cosine is None or trial.cosine >= bounds.least_cosine]
    if not trials:
        return "No setting could be measured."
    if not good:
        best = max(trials, key=_cosine)
        return (
            f"No setting has a gradient cosine of {bounds.least_cosine:g}. The best is {_cosine(best):.2f}, with "
            f"{best.label}."
        )
    parts = []
    if all(trial.peak_bytes > max_bytes for trial in good):
        least = min(good, key=lambda trial: trial.peak_bytes)
        parts.append(
            f"No setting with a gradient cosine of at least {bounds.least_cosine:g} keeps within "
            f"{max_bytes / 2**20:.0f} MiB of memory. The least is {least.peak_bytes / 2**20:.0f} MiB, with "
            f"{least.label}."
        )
    if all(trial.seconds > max_seconds for trial in good):
        least = min(good, key=lambda trial: trial.seconds)
        parts.append(
            f"No setting with a gradient cosine of at least {bounds.least_cosine:g} takes at most "
            f"{1e3 * max_seconds:.0f} ms a step. The shortest is {1e3 * least.seconds:.0f} ms, with {least.label}."
        )
    if not parts:
        small = min((trial for trial in good if trial.seconds <= max_seconds), key=lambda trial: trial.peak_bytes)
        quick = min((trial for trial in good if trial.peak_bytes <= max_bytes), key=lambda trial: trial.seconds)
        parts.append(
            f"No setting keeps within {max_bytes / 2**20:.0f} MiB and {1e3 * max_seconds:.0f} ms a step together. "
            f"Within that time the least memory is {small.peak_bytes / 2**20:.0f} MiB, with {small.label}; within that "
            f"memory the shortest step is {1e3 * quick.seconds:.0f} ms, with {quick.label}."
        )
    return " ".join(parts)


def undominated(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that are not dominated in memory, step time and gradients, up to negligible differences."""
    measured = [trial for trial in trials if not trial.failure]

    def is_dominated(trial: Trial) -> bool:
        return any(
            other is not trial
            and other.peak_bytes <= trial.peak_bytes
            and other.seconds <= (1 - 2 * _NEGLIGIBLE) * trial.seconds
            and _cosine(other) >= _cosine(trial)
            for other in measured
        )

    return [trial for trial in measured if not is_dominated(trial)]


def verdict(
    chosen: Trial, is_lora: bool, rule: str, reference: Reference, device: str, without_lbp_wht: bool = False
) -> str:
    """The reason for the setting, in a few sentences: the rule, and what it gains over the exact setting, if anything.

    Args:
        chosen: The trial of the setting.
        is_lora: Whether it trains LoRA's factors.
        rule: The rule by which it was chosen, in words.
        reference: The trials to compare with.
        device: The device of PyTorch.
        without_lbp_wht: Whether no setting of LBP-WHT could be measured.
    """
    exact, on_this_device = reference.of(is_lora), f"on this {device_name(device)}"
    if exact is None:
        return f"It has {rule}. {'LoRA' if is_lora else 'Full fine-tuning'}, to compare it with, could not be measured."
    if chosen.label == exact.label:
        return f"It has {rule}." + (
            "" if without_lbp_wht else f" So LBP-WHT gains nothing {on_this_device}: keep {exact.label}."
        )
    time, memory = chosen.seconds / exact.seconds, chosen.peak_bytes / exact.peak_bytes
    gained = [*_gain(time, "of the step time"), *_gain(memory, "of the peak memory")]
    lost = [*_loss(time, "longer steps"), *_loss(memory, "more memory")]
    cost = f", at {' and '.join(lost)}" if lost else ""
    if not gained:
        return f"It has {rule}. But {on_this_device} it gains nothing over {exact.label} in time or memory{cost}."
    unchanged = "" if lost or len(gained) == 2 else _unchanged(time, exact.label)
    gain = f"what you gain over {exact.label} is {' and '.join(gained)}{cost}"
    return f"It has {rule}. O{on_this_device[1:]} {unchanged}{gain}.{_quality(chosen)}"


def lora_hint(chosen: Trial, of_lora: Sequence[Trial], bounds: Bounds) -> str:
    """A sentence about the best setting that trains LoRA's factors, if it takes less time and memory; "" if none does.

    Args:
        chosen: The trial of the recommended setting, which trains whole weights.
        of_lora: The trials of settings that train LoRA's factors.
        bounds: The bounds, whose cosine it has to reach.
    """
    less = [
        trial
        for trial in of_lora
        if not trial.failure
        and trial.seconds < chosen.seconds
        and trial.peak_bytes < chosen.peak_bytes
        and (trial.cosine is None or trial.cosine >= bounds.least_cosine)
    ]
    if not less:
        return ""
    best = min(less, key=lambda trial: trial.seconds * trial.peak_bytes)
    time, memory = best.seconds / chosen.seconds, best.peak_bytes / chosen.peak_bytes
    return (
        f" {best.label}, which trains fewer weights, takes {time:.2f} of its step time and {memory:.2f} of its peak "
        f"memory: {LORA_INSTEAD}."
    )


def device_name(device: str) -> str:
    """The usual name of a device of PyTorch: "GPU" for "cuda:0"."""
    kind = device.partition(":")[0]
    return {"cpu": "CPU", "cuda": "GPU"}.get(kind, kind)


def _quality(chosen: Trial) -> str:
    """A sentence about the gradients of a setting; "" if they were not compared."""
    if chosen.cosine is None:
        return ""
    if not chosen.adapted_layers:
        return " Its gradients are exact."
    if not chosen.low_rank_layers:
        return (
            " None of its layers has a low-rank backward pass in this model, so the gain is that of training fewer "
            "weights, or of checkpointing or compression."
        )
    return f" Its gradients have a cosine of {chosen.cosine:.2f} with the exact ones."


def _unchanged(time: float, exact: str) -> str:
    return f"{exact} is as fast; " if abs(time - 1) < _NEGLIGIBLE else f"{exact} needs as much memory; "


def _gain(ratio: float, of: str) -> list[str]:
    return [f"{100 * (1 - ratio):.0f} % {of}"] if ratio < 1 - _NEGLIGIBLE else []


def _loss(ratio: float, of: str) -> list[str]:
    return [f"{100 * (ratio - 1):.0f} % {of}"] if ratio > 1 + _NEGLIGIBLE else []
