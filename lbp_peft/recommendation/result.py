"""The result of a search, for people (table, figure) and for programs (configuration, JSON, YAML)."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from ..environment import environment
from .bounds import Bounds, BudgetError
from .candidates import LORA, Candidate
from .choice import LORA_INSTEAD, Reference, choose, choose_timed, lora_hint, verdict
from .code import as_python
from .figure import plot
from .table import as_table, wrapped
from .trial import NO_TIME, TOO_LONG, Trial


@dataclass
class Recommendation:
    """The recommended setting, and all measurements. Printed, it is a full report.

    Attributes:
        config: For `peft.get_peft_model`: an [`lbp_peft.LBPWHTConfig`], a `LoraConfig`, or None where full fine-tuning
            is best.
        setting: The [`Candidate`] that is recommended. It says whether gradient checkpointing goes with the
            configuration.
        reason: The reason, in one or two sentences.
        trials: The trial of each candidate, by its label.
        left_out: The reason why each other candidate was not tried, by its label.
        notes: Further remarks.
        libraries_bytes: The resident set of a process with Python and the libraries alone; peaks on a CPU include it.
        seconds: The duration of the search.
        checkpointing_call: The Python code that enables gradient checkpointing, from the attribute of the model on; ""
            if there is no gradient checkpointing.
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
        eligible = [trial for label, trial in self.trials.items() if self.candidates[label].lora is lora]
        untried = self._why_untried(lora)
        try:
            chosen, rule = choose_timed(eligible, self.bounds, self.reference)
        except BudgetError as error:
            raise BudgetError(f"{untried}{error}{self._remedies(lora)}", self.table) from None
        self.setting = self.candidates[chosen.label]
        self.config = self.setting.config(model, self.heads)
        reason = verdict(chosen, lora, rule, self.reference, self.device, without_lbp_wht=bool(untried))
        if not lora:
            of_lora = [trial for label, trial in self.trials.items() if self.candidates[label].lora]
            reason += lora_hint(chosen, of_lora, self.bounds)
        self.reason = f"{reason} {untried}".strip()

    def _remedies(self, lora: bool) -> str:
        """What may help if no setting keeps within the bounds: more time, or LoRA."""
        text = ""
        eligible = [label for label, candidate in self.candidates.items() if candidate.lora is lora]
        late = sum(self.left_out.get(label) == NO_TIME for label in eligible)
        late += sum(label in self.trials and self.trials[label].failure == TOO_LONG for label in eligible)
        if late:
            text = f" There was no time for {late} other setting{'s' * (late > 1)}: give more minutes."
        if not lora:
            others = [trial for label, trial in self.trials.items() if self.candidates[label].lora]
            with suppress(ValueError):
                best, _ = choose(others, self.bounds, self.reference)
                text += f" {best.label}, which trains fewer weights, keeps within the bounds: {LORA_INSTEAD}."
        return text

    def _why_untried(self, lora: bool) -> str:
        """A sentence that says why no setting with LBP-WHT could be measured; "" if one was."""
        labels = [
            label for label, candidate in self.candidates.items() if candidate.lora is lora and not candidate.is_exact
        ]
        if not labels or any(label in self.trials and not self.trials[label].failure for label in labels):
            return ""
        why = {self.trials[label].failure if label in self.trials else self.left_out.get(label, "") for label in labels}
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
        return as_table(self)

    def __str__(self) -> str:
        assert self.setting is not None
        reason = wrapped(f"Recommended: {self.setting.label}. {self.reason}")
        return "\n".join([self.table, "", *reason, "", self.python])

    def plot(self, path: str | Path) -> None:
        """Plot cosines against peak memory with the Pareto front. The size of a point is its step time.

        Raises:
            ImportError: matplotlib is not installed; the message says how to install it.
        """
        plot(self, path)

    # For programs

    @property
    def python(self) -> str:
        """Python code that prepares the model as recommended."""
        return as_python(self)

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


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
