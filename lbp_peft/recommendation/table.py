"""The table of a recommendation: one row for each setting, and the meaning of the columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from .trial import Trial

if TYPE_CHECKING:
    from .result import Recommendation

WIDTH = 100
_MOST_NAMED = 4  # settings that are left out for the same reason
_MIB = 2**20
_COLUMNS = ("step ms", "/full", "/LoRA", "peak MiB", "/full", "/LoRA", "saved MiB", "/full", "/LoRA", "cosine")


def as_table(recommendation: Recommendation) -> str:
    """The table as text, at most 100 columns wide."""
    measured = [trial for trial in recommendation.trials.values() if not trial.failure]
    rows = [_row(recommendation, trial) for trial in measured]
    heading = [_two_lines(column) for column in _COLUMNS]
    widths = [max(map(len, column)) for column in zip(*map(_cells_of, rows), *zip(*heading, strict=True), strict=True)]
    label_width = WIDTH - 2 - sum(widths) - len(widths)
    lines = [
        f"  {name:<{label_width}} " + _align([pair[line] for pair in heading], widths)
        for line, name in enumerate(("", "setting"))
    ]
    lines.append("-" * WIDTH)
    for mark, name, *cells in rows:
        lines += [f"{mark} {name}"] if len(name) > label_width else []
        start = f"{mark} {name:<{label_width}} " if len(name) <= label_width else " " * (label_width + 3)
        lines.append(start + _align(cells, widths))
    return "\n".join(
        [
            *lines,
            "",
            *_legend(recommendation, measured),
            *_layers(measured),
            *_not_measured(recommendation),
            *_notes(recommendation),
        ]
    )


def wrapped(text: str) -> list[str]:
    """The lines of a text, broken at the width of the table."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _row(recommendation: Recommendation, trial: Trial) -> list[str]:
    """The mark of the recommended setting, the label and the cells."""
    full, lora = recommendation.reference.full, recommendation.reference.lora
    row = [">" if recommendation.setting and trial.label == recommendation.setting.label else " ", trial.label]
    for name, scale, mark in (
        ("seconds", 1e3, "" if trial.is_timed else "~"),
        ("peak_bytes", 1 / _MIB, "" if trial.is_settled else "~"),
        ("saved_bytes", 1 / _MIB, ""),
    ):
        value = getattr(trial, name)
        row.append(f"{mark}{scale * value:.0f}")
        row += ["-" if other is None else _ratio(value, getattr(other, name)) for other in (full, lora)]
    return [*row, "-" if trial.cosine is None else f"{trial.cosine:.3f}"]


def _cells_of(row: list[str]) -> list[str]:
    return row[2:]


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "-"


def _two_lines(heading: str) -> tuple[str, str]:
    upper, _, lower = heading.rpartition(" ")
    return upper, lower


def _align(cells: list[str], widths: list[int]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _legend(recommendation: Recommendation, measured: list[Trial]) -> list[str]:
    single = "" if all(trial.is_timed for trial in measured) else "; ~ from a single step"
    notes = [f"{recommendation.libraries_bytes / _MIB:.0f} MiB of it are Python and its libraries"] * bool(
        recommendation.libraries_bytes
    )
    notes += ["~ estimated from a few steps"] * any(not trial.is_settled for trial in measured)
    more = [f"      {'; '.join(notes)}."] * bool(notes)
    return [
        f"step: forward, backward and AdamW{single}.",
        f"peak: the most memory at once, weights, gradients and AdamW's state included{';' if more else '.'}",
        *more,
        "saved: activations kept for the backward pass, parameters not counted.",
        "cosine: of the adapted layers' gradients with the exact ones; for LoRA, with those of LoRA alone.",
        "dx: the input gradient; adaptive: in 24 patterns fitted to each image.",
        "compression: of all that is saved for the backward pass.",
        "/full, /LoRA: relative to full fine-tuning and to LoRA (r=8, all linear layers).",
    ]


def _layers(measured: list[Trial]) -> list[str]:
    """The number of layers with a low-rank backward pass, unless it is all of the adapted ones."""
    adapted = max((trial.adapted_layers for trial in measured), default=0)
    numbers = sorted({trial.low_rank_layers for trial in measured if trial.adapted_layers})
    if not numbers or numbers[0] == adapted:
        return []
    number = f"{numbers[0] or 'none'} of {adapted} layers"
    if len(numbers) > 1:
        number = f"{numbers[0]} to {numbers[-1]} of {adapted} layers, depending on the setting"
    return wrapped(
        f"LBP-WHT has a low-rank backward pass in {number}, and an exact one in the others: `lbp-peft report` says why."
    )


def _not_measured(recommendation: Recommendation) -> list[str]:
    """The settings that failed or were left out, by reason."""
    failed = {label: trial.failure for label, trial in recommendation.trials.items() if trial.failure}
    lines = []
    for heading, reasons in (("Failed", failed), ("Left out", recommendation.left_out)):
        grouped: dict[str, list[str]] = {}
        for label, why in reasons.items():
            grouped.setdefault(why, []).append(label)
        for why, labels in grouped.items():
            more = len(labels) - _MOST_NAMED
            named = [*labels[:_MOST_NAMED], *([f"and {more} more, which the JSON lists"] if more > 0 else [])]
            lines += wrapped(f"{heading} ({why}): {'; '.join(named)}.")
    return lines


def _notes(recommendation: Recommendation) -> list[str]:
    return [line for note in recommendation.notes for line in wrapped(note)]
