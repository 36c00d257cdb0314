"""Tables of what was aimed for and what was reached, see docs/measurements.md.

A ratio of times is the median of the ratios within the rounds of a run, as in training_step.py. Where several runs or
methods count, the table has the lowest and the highest figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.tables import markdown

from benchmarks.records import label, read
from benchmarks.step_tables import MISSING
from benchmarks.tables import number

LBP, STACK = "lbp-wht:r=10", "lora-all+lbp-wht:r=10"
_COMPRESSED = f"{STACK},compress_activations=all"
_ADAPTIVE = tuple(f"grad_input_basis=adaptive,grad_input_rank={rank}" for rank in (16, 24, 32))
SEVERAL = "¹"  # marks figures of several runs


@dataclass(frozen=True)
class Aim:
    """One aim: the highest ratio that reaches it.

    Attributes:
        name: What is compared.
        limit: The highest ratio.
        pairs: The methods that are compared, each with its reference.
        only: The machine that it was set for, the heading of a column; None: every machine.
        forward_only: Whether forward passes are compared instead of steps.
    """

    name: str
    limit: float
    pairs: tuple[tuple[str, str], ...]
    only: str | None = None
    forward_only: bool = False

    @property
    def text(self) -> str:
        return f"{self.limit:.2f}" + (f" ({self.only})" if self.only else "")


AIMS = (
    Aim("LBP-WHT / full fine-tuning", 0.75, ((LBP, "full"),), "AVX2"),
    Aim("LoRA + LBP-WHT / LoRA", 0.62, ((STACK, "lora-all"),), "AMX"),
    Aim("LBP-WHT, adaptive / full fine-tuning", 0.66, tuple((f"{LBP},{basis}", "full") for basis in _ADAPTIVE), "AVX2"),
    Aim("LBP-WHT, adaptive / LoRA", 0.78, tuple((f"{LBP},{basis}", "lora-all") for basis in _ADAPTIVE), "AVX2"),
    Aim("LoRA + LBP-WHT, checkpointing / full fine-tuning", 1.05, ((f"{STACK}+checkpointing", "full"),)),
    Aim("LoRA + LBP-WHT's forward pass / the plain model's", 1.10, ((STACK, "full"),), forward_only=True),
    Aim("the same under `torch.compile`", 1.10, ((f"{STACK}+compile", "full+compile"),), forward_only=True),
    Aim("LoRA + LBP-WHT, compressed / not compressed", 1.03, ((_COMPRESSED, STACK),)),
    Aim("the same under `torch.compile`", 1.03, ((f"{_COMPRESSED}+compile", f"{STACK}+compile"),)),
)
AIMS_BF16 = (
    Aim("LoRA + LBP-WHT / LoRA", 0.74, ((STACK, "lora-all"),), "AMX"),
    Aim("LBP-WHT's forward pass / the plain model's", 1.05, ((LBP, "full"),), forward_only=True),
    *(aim for aim in AIMS if aim.forward_only or aim.pairs[0][0].startswith(_COMPRESSED)),
)
PEAK_AIMS = (
    Aim("LBP-WHT / full fine-tuning", 0.80, ((LBP, "full"),)),
    Aim("LBP-WHT, compressed / full fine-tuning", 0.60, ((f"{LBP},compress_activations=all", "full"),)),
    Aim("LoRA + LBP-WHT / LoRA", 0.50, ((STACK, "lora-all"),)),
    Aim("LoRA + LBP-WHT, compressed / LoRA", 0.40, ((_COMPRESSED, "lora-all"),)),
    Aim("LoRA + LBP-WHT, checkpointing / LoRA", 0.28, ((f"{STACK}+checkpointing", "lora-all"),)),
)


def steps_aimed_for(machines: dict[str, tuple[str, ...]], machines_bf16: dict[str, tuple[str, ...]]) -> str:
    """The aims for steps.

    Args:
        machines: The records of each machine in float32, by the heading of its column.
        machines_bf16: The same under bf16 autocast.
    """
    cells = []
    for dtype, aims, records in (("float32", AIMS, machines), ("bf16", AIMS_BF16, machines_bf16)):
        cells.append([f"**{dtype}, batch 8: step of**", *[""] * (len(machines) + 1)])
        for aim in aims:
            line = [aim.name, aim.text]
            for heading in machines:
                found = [_times(read(name), aim) for name in records.get(heading, ())]
                line.append(_text(aim, heading, [values for values in found if values]))
            cells.append(line)
    return markdown(["", "aim", *machines], cells)


def peaks_aimed_for(columns: dict[str, tuple[str, str]]) -> str:
    """The aims for the peak memory of a process.

    Args:
        columns: By its heading, the record of a column and its size of batches.
    """
    cells = []
    for aim in PEAK_AIMS:
        line = [aim.name, aim.text]
        for heading, (name, batch) in columns.items():
            found = {label(method): own["peak_mib"] for method, own in read(name)["peaks"][batch].items()}
            pairs = [(found.get(label(one)), found.get(label(other))) for one, other in aim.pairs]
            line.append(_text(aim, heading, [[one / other for one, other in pairs if one and other]]))
        cells.append(line)
    return markdown(["peak memory of a process, float32", "aim", *columns], cells)


def saved_aimed_for(columns: dict[str, tuple[str, float]]) -> str:
    """The aims for saved activations.

    Args:
        columns: By its heading, the record of a column and the highest ratio to full fine-tuning.
    """
    line, aims = [label(f"{LBP},compress_activations=all")], []
    for heading, (name, limit) in columns.items():
        found = {row["method"]: row["saved_over_full"] for row in read(name)["rows"]}
        aims.append(f"{heading}: {limit:.2f}")
        values = [[found[f"{LBP},compress_activations=all"]]]
        line.append(_text(Aim("", limit, ()), heading, values))
    line.insert(1, ", ".join(aims))
    return markdown(["saved activations / full fine-tuning's", "aim", *columns], [line])


def _times(record: dict[str, Any], aim: Aim) -> list[float]:
    """The ratio of each pair that is in a record."""
    rounds = {row["method"]: row["rounds_ms"] for row in record["rows"]}
    return [
        statistics.median(a / b for a, b in zip(_parts(rounds[one], aim), _parts(rounds[other], aim), strict=True))
        for one, other in aim.pairs
        if one in rounds and other in rounds
    ]


def _parts(rounds: Iterable[tuple[float, float]], aim: Aim) -> list[float]:
    return [forward if aim.forward_only else forward + backward for forward, backward in rounds]


def _text(aim: Aim, heading: str, runs: list[list[float]]) -> str:
    """The lowest and the highest ratio, bold if the highest misses the aim and the aim is one for this column."""
    values = [value for run in runs for value in run]
    if not values:
        return MISSING
    ends = list(dict.fromkeys(number(value, 2) for value in (min(values), max(values))))
    is_missed = max(values) > aim.limit and aim.only in (None, heading)
    # A figure that only looks as if it reached the aim has one more digit.
    if is_missed and float(ends[-1]) <= aim.limit:
        ends = list(dict.fromkeys(number(value, 3) for value in (min(values), max(values))))
    text = " to ".join(ends)
    return (f"**{text}**" if is_missed else text) + (f" {SEVERAL}" if len(runs) > 1 else "")
