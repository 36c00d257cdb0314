"""The result of a search, for people (table, figure) and for programs (configuration, JSON, YAML)."""

from __future__ import annotations

import json
import math
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from ..environment import environment
from .bounds import Bounds, BudgetError
from .candidates import LORA, Candidate
from .choice import LORA_INSTEAD, Reference, choose, verdict
from .trial import NO_TIME, TOO_LONG, Trial

WIDTH = 100
_MOST_NAMED = 4  # of the settings left out for one reason
_MIB = 2**20
# Okabe and Ito's colours, told apart by readers with any colour vision.
_COLOURS = {"exact": "#999999", "low-rank": "#0072B2", "front": "#D55E00"}


@dataclass
class Recommendation:
    """The recommended setting, and all measurements. Printed, it is a full report.

    Attributes:
        config: For `peft.get_peft_model`: an [`lbp_peft.LBPWHTConfig`], a `LoraConfig`, or None where full fine-tuning
            is best.
        setting: The [`Candidate`] that is recommended; it tells whether gradient checkpointing goes with the
            configuration.
        reason: The reason, in one or two sentences.
        trials: The trial of each candidate, by its label.
        left_out: The reason why each other candidate was not tried, by its label.
        notes: Further remarks.
        libraries_bytes: The resident set of a process with Python and the libraries alone; peaks on a CPU include it.
        seconds: The duration of the search.
        checkpointing_call: The Python that switches gradient checkpointing on, from the attribute of the model on; ""
            where there is no gradient checkpointing.
    """

    candidates: dict[str, Candidate] = field(repr=False)
    trials: dict[str, Trial] = field(repr=False)
    reference: Reference = field(repr=False)
    bounds: Bounds
    left_out: dict[str, str] = field(repr=False)
    notes: list[str] = field(repr=False)
    libraries_bytes: int
    seconds: float
    device: str
    precision: str
    heads: list[str]
    checkpointing_call: str
    config: PeftConfig | None = None
    setting: Candidate | None = None
    reason: str = ""

    def choose(self, model: nn.Module, lora: bool) -> None:
        """Choose among the trials of settings that train LoRA's factors, or among those that train whole weights.

        Raises:
            BudgetError: none keeps within the bounds.
        """
        own = [trial for label, trial in self.trials.items() if self.candidates[label].lora is lora]
        untried = self._why_untried(lora)
        try:
            try:  # a single step says little about the time
                chosen, rule = choose([trial for trial in own if trial.is_timed], self.bounds, self.reference)
            except BudgetError:
                chosen, rule = choose(own, self.bounds, self.reference)
        except BudgetError as error:
            raise BudgetError(f"{untried}{error}{self._remedies(lora)}", self.table) from None
        self.setting = self.candidates[chosen.label]
        self.config = self.setting.config(model, self.heads)
        reason = verdict(chosen, lora, rule, self.reference, self.device, is_alone=bool(untried))
        self.reason = f"{reason} {untried}".strip()

    def _remedies(self, lora: bool) -> str:
        """What may help where nothing keeps within the bounds: more time, or LoRA."""
        text = ""
        own = [label for label, one in self.candidates.items() if one.lora is lora]
        late = sum(self.left_out.get(label) == NO_TIME for label in own)
        late += sum(label in self.trials and self.trials[label].failure == TOO_LONG for label in own)
        if late:
            text = f" There was no time for {late} other settings: give more minutes to try them."
        if not lora:
            others = [trial for label, trial in self.trials.items() if self.candidates[label].lora]
            with suppress(ValueError):
                found, _ = choose(others, self.bounds, self.reference)
                text += f" {found.label}, which trains fewer weights, keeps within the bounds: {LORA_INSTEAD}."
        return text

    def _why_untried(self, lora: bool) -> str:
        """A sentence for the case that no setting with LBP-WHT could be measured; else ""."""
        own = [label for label, one in self.candidates.items() if one.lora is lora and not one.is_exact]
        if not own or any(label in self.trials and not self.trials[label].failure for label in own):
            return ""
        why = {self.trials[label].failure if label in self.trials else self.left_out.get(label, "") for label in own}
        which = "LoRA with LBP-WHT" if lora else "LBP-WHT"
        return f"No setting of {which} could be measured ({'; '.join(sorted(filter(None, why)))}). "

    @property
    def chosen(self) -> Trial:
        """The trial of the recommended setting."""
        assert self.setting is not None
        return self.trials[self.setting.label]

    # For people

    @property
    def table(self) -> str:
        """A table with one row for each setting, at most 100 columns wide, and the meaning of its columns."""
        metrics = ["step ms", "/full", "/LoRA", "peak MiB", "/full", "/LoRA", "saved MiB", "/full", "/LoRA", "cosine"]
        rows = [self._row(trial) for trial in self.trials.values() if not trial.failure]
        widths = (
            [max(map(len, column)) for column in zip(*(row[2:] for row in rows), strict=True)] if rows else [4] * 10
        )
        heading = [_two_lines(metric) for metric in metrics]
        widths = [max(own, len(upper), len(lower)) for own, (upper, lower) in zip(widths, heading, strict=True)]
        label = WIDTH - 2 - sum(widths) - len(widths)
        lines = [
            f"  {name:<{label}} "
            + " ".join(f"{pair[line]:>{width}}" for pair, width in zip(heading, widths, strict=True))
            for line, name in enumerate(("", "setting"))
        ]
        lines.append("-" * WIDTH)
        for mark, name, *cells in rows:
            lines += [f"{mark} {name}"] if len(name) > label else []
            start = f"{mark} {name:<{label}} " if len(name) <= label else " " * (label + 3)
            lines.append(start + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        return "\n".join([*lines, *self._legend()])

    def _row(self, trial: Trial) -> list[str]:
        full, lora = self.reference.full, self.reference.lora
        row = [">" if self.setting and trial.label == self.setting.label else " ", trial.label]
        for name, scale, mark in (
            ("seconds", 1e3, "" if trial.is_timed else "~"),
            ("peak_bytes", 1 / _MIB, "~" if trial.is_counted else ""),
            ("saved_bytes", 1 / _MIB, ""),
        ):
            value = getattr(trial, name)
            row.append(f"{mark}{scale * value:.0f}")
            row += ["-" if other is None else _ratio(value, getattr(other, name)) for other in (full, lora)]
        return [*row, "-" if trial.cosine is None else f"{trial.cosine:.3f}"]

    def _legend(self) -> list[str]:
        text = [
            "",
            "step: forward, backward and AdamW"
            + ("; ~ from a single step" if self._any("is_timed", False) else "")
            + ".",
            "peak: the most memory at once, weights, gradients and AdamW's state included"
            + (f"; {self.libraries_bytes / _MIB:.0f} MiB of it are" if self.libraries_bytes else "."),
            *(["      Python and its libraries."] if self.libraries_bytes else []),
            "saved: activations kept for the backward pass, parameters not counted.",
            "cosine: of the adapted layers' gradients with the exact ones; for LoRA, with those of LoRA alone.",
            "dx: the input gradient; adaptive: in 24 patterns fitted to each image.",
            "compression: of all that is saved for the backward pass.",
            "/full, /LoRA: relative to full fine-tuning and to LoRA (r=8, all linear layers).",
        ]
        text += _wrapped(self._layers())
        failed = {label: trial.failure for label, trial in self.trials.items() if trial.failure}
        for heading, reasons in (("Failed", failed), ("Left out", self.left_out)):
            grouped: dict[str, list[str]] = {}
            for label, why in reasons.items():
                grouped.setdefault(why, []).append(label)
            for why, labels in grouped.items():
                more = len(labels) - _MOST_NAMED
                named = [*labels[:_MOST_NAMED], *([f"and {more} more, which the JSON lists"] if more > 0 else [])]
                text += _wrapped(f"{heading} ({why}): {'; '.join(named)}.")
        for note in self.notes:
            text += _wrapped(note)
        return text

    def _layers(self) -> str:
        """How many layers LBP-WHT does not go through exactly, where that is not all of them; else ""."""
        adapted = max((one.adapted_layers for one in self.trials.values()), default=0)
        low = sorted({one.low_rank_layers for one in self.trials.values() if one.adapted_layers})
        if not low or low[0] == adapted:
            return ""
        number = f"{low[0] or 'none'} of {adapted} layers"
        if len(low) > 1:
            number = f"{low[0]} to {low[-1]} of {adapted} layers, depending on the setting"
        return (
            f"LBP-WHT has a low-rank backward pass in {number}, and an exact one in the others: `lbp-peft report` says "
            "why."
        )

    def _any(self, name: str, value: bool) -> bool:
        return any(getattr(trial, name) is value for trial in self.trials.values() if not trial.failure)

    def __str__(self) -> str:
        assert self.setting is not None
        reason = _wrapped(f"Recommended: {self.setting.label}. {self.reason}")
        return "\n".join([self.table, "", *reason, "", self.python])

    def plot(self, path: str | Path) -> None:
        """Plot cosines against peak memory with the Pareto front. The size of a point is its step time.

        Raises:
            ImportError: matplotlib is not installed; the message says how to install it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError('The figure needs matplotlib: pip install "lbp-peft[cli]"') from None
        measured = [trial for trial in self.trials.values() if not trial.failure and trial.cosine is not None]
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots()
        longest = max(trial.seconds for trial in measured)
        marks = []
        for number, trial in enumerate(measured, 1):
            candidate = self.candidates[trial.label]
            marks += axes.plot(
                *_place(trial),
                marker="s" if candidate.lora else "o",
                markersize=20 * math.sqrt(trial.seconds / longest),
                color=_COLOURS["exact" if candidate.is_exact else "low-rank"],
                alpha=0.5,
                linestyle="",
                label=f"{number}: {trial.label}, {1e3 * trial.seconds:.0f} ms",
            )
        for is_lora in (False, True):
            front = pareto_front([trial for trial in measured if self.candidates[trial.label].lora is is_lora])
            axes.step(*_outline(front, axes), where="post", color=_COLOURS["front"], linestyle=":" if is_lora else "-")
        for places in _close_ones([_place(trial) for trial in measured]):
            numbers = ", ".join(str(index + 1) for index in places)
            axes.annotate(numbers, _place(measured[places[0]]), (5, 9), textcoords="offset points", fontsize=8)
        if self.setting is not None:
            axes.plot(*_place(self.chosen), "o", markersize=28, markerfacecolor="none", markeredgecolor="black")
        axes.set_xlabel("peak memory, MiB")
        axes.set_ylabel("cosine of the gradients with the exact ones")
        axes.set_title(
            "The larger the area of a point, the longer its step. Circles: whole weights. Squares: LoRA. Grey: exact.\n"
            "Ring: recommended. Lines: Pareto fronts, of whole weights and (dotted) of LoRA.",
            fontsize=9,
            loc="left",
        )
        legend = axes.legend(
            handles=marks, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, handlelength=1
        )
        for handle in legend.get_lines():
            handle.set_markersize(6)
        figure.savefig(path, dpi=130)

    # For programs

    @property
    def python(self) -> str:
        """Python code that prepares the model as recommended."""
        assert self.setting is not None
        config: Any = self.config
        if config is None:
            lines = ["# Train the model as it is: full fine-tuning, without an adapter."]
        elif isinstance(config, LoraConfig):
            lines = ["from peft import LoraConfig, get_peft_model", ""]
            lines += _adaptation("model", "model", "LoraConfig", _of_lora(config))
        else:
            settings: dict[str, Any] = dict(self.setting.lbp_wht or {})
            imported = "LoraConfig, get_peft_model" if self.setting.lora else "get_peft_model"
            lines = [f"from peft import {imported}", "from lbp_peft import LBPWHTConfig", ""]
            if self.setting.lora:
                beneath = next(iter(config.stack_on.values()))
                lines += _adaptation("lora", "model", "LoraConfig", _of_lora(beneath))
                settings["train_base_weight"] = False
                lines += _adaptation("model", "lora", "LBPWHTConfig", settings)
            else:
                settings |= {"modules_to_save": self.heads} if self.heads else {}
                lines += _adaptation("model", "model", "LBPWHTConfig", settings)
        if self.setting.checkpointing:
            lines += [f"model.{self.checkpointing_call}"]
        if self.setting.compiled:
            lines += ["model.compile()"]
        return "\n".join(lines)

    @property
    def options(self) -> dict[str, Any]:
        """The recommended setting as options of the example programs (`--config FILE.yaml`)."""
        assert self.setting is not None
        lbp_wht = self.setting.lbp_wht
        method = ("lora" if self.setting.lora else "full") if lbp_wht is None else "lbp-wht"
        if lbp_wht is not None and self.setting.lora:
            method = "lora+lbp-wht"
        options: dict[str, Any] = {"methods": [method], **(lbp_wht or {})}
        if self.setting.lora:
            options |= {"lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"]}
        if self.setting.checkpointing:
            options["gradient_checkpointing"] = True
        if self.precision != "float32":
            options["mixed_precision"] = self.precision
        return options

    @property
    def yaml(self) -> str:
        """The attribute `options` as YAML."""
        return "\n".join(f"{key}: {json.dumps(value)}" for key, value in self.options.items())

    def to_dict(self) -> dict[str, Any]:
        """The recommendation in plain types, with sizes in bytes and times in seconds."""
        assert self.setting is not None
        config = None if self.config is None else json.loads(json.dumps(self.config.to_dict(), default=_plain))
        return {
            "recommended": self.setting.label,
            "reason": self.reason,
            "config": config,
            "gradient_checkpointing": self.setting.checkpointing,
            "compile": self.setting.compiled,
            "options": self.options,
            "python": self.python,
            "bounds": asdict(self.bounds),
            "device": self.device,
            "precision": self.precision,
            "libraries_bytes": self.libraries_bytes,
            "seconds": self.seconds,
            "trials": [trial.as_dict() for trial in self.trials.values()],
            "left_out": self.left_out,
            "notes": self.notes,
            "environment": environment(),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The recommendation as JSON, which is written to a file if a path is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def pareto_front(trials: list[Trial]) -> list[Trial]:
    """The trials with better gradients than all others that need no more memory, sorted by memory."""
    front: list[Trial] = []
    best = -math.inf
    for trial in sorted(trials, key=lambda one: (one.peak_bytes, -(one.cosine or 0.0))):
        if trial.cosine is not None and trial.cosine > best:
            front.append(trial)
            best = trial.cosine
    return front


def _place(trial: Trial) -> tuple[float, float]:
    """Where the figure shows a trial."""
    return trial.peak_bytes / _MIB, trial.cosine or 0.0


def _outline(front: list[Trial], axes: Any) -> tuple[list[float], list[float]]:
    """The edge of all that some setting of the front matches or beats, up to the borders of the figure."""
    if not front:
        return [], []
    right, low = axes.get_xlim()[1], axes.get_ylim()[0]
    axes.autoscale(False)
    xs, ys = zip(*map(_place, front), strict=True)
    return [xs[0], *xs, right], [low, *ys, ys[-1]]


def _close_ones(places: list[tuple[float, float]]) -> list[list[int]]:
    """Indices of points, those together that lie so close that one label serves them."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*places, strict=True))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(places):
        for group in groups:
            other_x, other_y = places[group[0]]
            if abs(x - other_x) < 0.03 * wide and abs(y - other_y) < 0.03 * tall:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "-"


def _two_lines(heading: str) -> tuple[str, str]:
    upper, _, lower = heading.rpartition(" ")
    return upper, lower


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _of_lora(config: Any) -> dict[str, Any]:
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    shown = {**LORA, "target_modules": targets}
    return shown | ({"modules_to_save": list(config.modules_to_save)} if config.modules_to_save else {})


def _adaptation(result: str, model: str, kind: str, settings: dict[str, Any]) -> list[str]:
    """Lines of Python, not too long, that put an adapter on a model."""
    arguments = [
        f"{name}={json.dumps(value) if isinstance(value, (str, list)) else value}" for name, value in settings.items()
    ]
    line = f"{result} = get_peft_model({model}, {kind}({', '.join(arguments)}))"
    if len(line) <= WIDTH:
        return [line]
    indented = (
        textwrap.fill(f"{argument},", WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
        for argument in arguments
    )
    return [f"config = {kind}(", *indented, ")", f"{result} = get_peft_model({model}, config)"]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
