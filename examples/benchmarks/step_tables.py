"""Tables of whole training steps: their times, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from common.tables import markdown

from benchmarks.records import ON_TOP, WORDS, dtype_of, emphasised, exists, label, read, source
from benchmarks.tables import number

Row = dict[str, Any]
MISSING = "-"  # in place of a figure that no record has


@dataclass(frozen=True)
class Column:
    """A column of a table of steps: its heading, and its text for one row of a record."""

    heading: str
    cell: Callable[[Row], str]


def _median(key: str, digits: int = 0) -> Callable[[Row], str]:
    return lambda row: number(row[key][1], digits) if key in row else ""


def _ratio(key: str) -> Callable[[Row], str]:
    """Of a figure that does not vary, or the median of one that does."""

    def text(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else number(value[1] if isinstance(value, list) else value, 2)

    return text


FORWARD = Column("forward ms", _median("forward_ms"))
BACKWARD = Column("backward ms", _median("backward_ms"))
ADAMW = Column("AdamW ms", _median("optimizer_ms"))
STEP = Column("step ms", _median("step_ms"))
OVER_FULL = Column("step / full", _ratio("step_over_full"))
OVER_LORA = Column("/ LoRA", _ratio("step_over_lora_all"))
COSINE = Column("cosine", lambda row: "" if row.get("cosine") is None else number(row["cosine"], 3))
SAVED = Column("saved / full", _ratio("saved_over_full"))
PEAK = Column("tensors at the peak / full", _ratio("peak_over_full"))
ALL = (
    FORWARD,
    BACKWARD,
    ADAMW,
    OVER_FULL,
    OVER_LORA,
    COSINE,
    SAVED,
    PEAK,
)  # those that no record of a table has vanish


def steps(name: str, columns: tuple[Column, ...] = ALL, methods: Iterable[str] | None = None) -> str:
    """The rows of a record of training_step.py, in its order.

    Args:
        name: The record.
        columns: The columns beside the first, which has the names of the methods.
        methods: The methods that are shown; None: all of them.
    """
    record = read(name)
    rows = [row for row in record["rows"] if methods is None or row["method"] in methods]
    cells = [[emphasised(row["method"]), *(column.cell(row) for column in columns)] for row in rows]
    runs = max(len(row.get("rounds_ms", ())) for row in rows)
    caption = f"{_caption(record)}; medians of {runs} rounds; {source(name, record)}"
    return f"{markdown(['method', *(column.heading for column in columns)], cells)}\n\n{caption}"


def _caption(record: dict[str, Any]) -> str:
    """The model and the batch of a record."""
    options = record["options"]
    size = " x ".join(map(str, options["image_size"] or ()))
    return f"{options['model']}{f', {size} px' if size else ''}, batch {options['batch_size']}, {dtype_of(record)}"


def profiles(name: str) -> str:
    """Where the time of a step goes in milliseconds, from a record of step_profile.py."""
    record = read(name)
    phases = ("forward", "backward")
    cells = []
    for phase in phases:
        for row in record["rows"]:
            times = [*row[phase].values(), sum(row[phase].values())]
            cells.append([emphasised(row["method"]), phase, *(number(milliseconds) for milliseconds in times)])
    header = ["method", "pass", *record["rows"][0][phases[0]], "together"]
    caption = f"{_caption(record)}; medians of {record['rows'][0]['rounds']} rounds; {source(name, record)}"
    return f"{markdown(header, cells, text_columns=2)}\n\n{caption}"


def step_by_mode(names: tuple[str, ...], modes: dict[str, str], methods: tuple[str, ...]) -> str:
    """The medians of the steps of methods, a column for each way to run them: eager, compiled, or as a CUDA graph.

    Args:
        names: The records; a figure is taken from the first that has it.
        modes: By heading, what is appended to a method's name.
        methods: The methods, without what is appended.
    """
    records = [read(name) for name in names]
    found: dict[str, Row] = {}
    for record in records:
        for row in record["rows"]:
            found.setdefault(row["method"], row)
    reference = {name: found[name] for name in ("full", "lora-all")}
    cells = []
    for method in methods:
        times = [STEP.cell(found.get(method + suffix, {})) for suffix in modes.values()]
        peak = found[method]["peak_mib"]
        ratios = [number(peak / other["peak_mib"], 2) for other in reference.values()]
        cells.append([emphasised(method), *times, number(peak), *ratios])
    header = ["method", *(f"{heading} ms" for heading in modes), "peak MiB", "/ full", "/ LoRA"]
    return f"{markdown(header, cells)}\n\n{_sources(names)}"


def peaks(name: str, batches: tuple[str, ...]) -> str:
    """The rows of a record of peak_memory_table.py.

    Args:
        name: The record.
        batches: The sizes of batches, a group of columns each.
    """
    record = read(name)
    methods = {method for batch in batches for method in record["peaks"][batch]}
    cells = [
        [emphasised(method), *(text for batch in batches for text in _peak_cells(record["peaks"][batch], method, ""))]
        for method in sorted(methods, key=_in_order)
    ]
    caption = (
        f"{record['options']['model']}, {dtype_of(record)}, with AdamW's state and "
        f"{_libraries(record, batches):.0f} MiB of libraries; {source(name, record)}"
    )
    return f"{markdown(['method', *_peak_headings(batches)], cells)}\n\n{caption}"


def steps_and_peaks(names: tuple[str, ...], of_peaks: str, batches: tuple[str, ...], methods: tuple[str, ...]) -> str:
    """Times and peak memory side by side, from records of training_step.py and of peak_memory_table.py.

    Records need not write a method alike: `lbp-wht` and `lbp-wht:r=10` are the same one, see [`label`].

    Args:
        names: The records of steps; a row is taken from the first that has it. Those that do not exist are left out.
        of_peaks: The record of peaks.
        batches: The sizes of batches of the peaks.
        methods: The methods, in the order of the table. What no record has is marked by `MISSING`.

    Raises:
        ValueError: the records are not from one machine and one model.
    """
    names = tuple(name for name in names if exists(name))
    memory, times = read(of_peaks), [read(name) for name in names]
    if any(_setting(record) != _setting(memory) for record in times):
        raise ValueError(f"{', '.join(names)} and {of_peaks} were not measured with one model on one machine")
    found: dict[str, Row] = {}
    for record in times:
        for row in record["rows"]:
            found.setdefault(label(row["method"]), row)
    by_label = {
        batch: {label(method): own for method, own in memory["peaks"].get(batch, {}).items()} for batch in batches
    }
    shown = (STEP, OVER_FULL, OVER_LORA, SAVED)
    cells = []
    for method in methods:
        line = [emphasised(method), *(column.cell(found.get(label(method), {})) or MISSING for column in shown)]
        line += [text for rows in by_label.values() for text in _peak_cells(rows, label(method), MISSING)]
        cells.append(line)
    header = ["method", *(column.heading for column in shown), *_peak_headings(batches)]
    options = times[0]["options"]
    caption = (
        f"{options['model']}, {dtype_of(memory)}. Steps of a batch of {options['batch_size']} without the optimiser. "
        f"Peaks in MiB with AdamW's state and {_libraries(memory, batches):.0f} MiB of libraries."
    )
    headings = ["steps"] * len(names) + ["peaks"]
    return f"{markdown(header, cells)}\n\n{caption}\n\n{_sources((*names, of_peaks), headings)}"


def times_and_peaks_over_lora(of_peaks: tuple[str, str], names: dict[str, str], methods: dict[str, str]) -> str:
    """A short table of peaks and steps relative to LoRA's.

    Args:
        of_peaks: The record of peaks, and its size of batches.
        names: By the heading of its column, a record of steps.
        methods: By its name in the table, the method of a row. Ratios are bold in rows whose name is bold.
    """
    record = read(of_peaks[0])
    memory = {label(method): own["peak_mib"] for method, own in record["peaks"][of_peaks[1]].items()}
    times = [{row["method"]: row for row in read(name)["rows"]} for name in names.values()]
    cells = []
    for name, method in methods.items():
        line = [number(memory[label(method)] / memory["LoRA"], 2), *(OVER_LORA.cell(rows[method]) for rows in times)]
        cells.append([name, *(f"**{text}**" if name.startswith("**") else text for text in line)])
    return markdown([f"ViT-B/16, {dtype_of(record)}", "peak memory", *names], cells)


def _setting(record: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be the same if records are to stand in one table."""
    machine, options = record["environment"], record["options"]
    return *(machine[key] for key in ("processor", "instructions", "gpu")), options["model"], options["bf16"]


def _peak_headings(batches: tuple[str, ...]) -> list[str]:
    return [heading for batch in batches for heading in (f"batch {batch}: MiB", "/ full", "/ LoRA")]


def _peak_cells(rows: dict[str, Row], method: str, missing: str) -> list[str]:
    """The peak of a method, and its ratios to full fine-tuning's and LoRA's, of one size of batches."""
    if method not in rows:
        return [missing] * 3
    own = rows[method]["peak_mib"]
    others = [rows.get(other) or rows.get(label(other)) for other in ("full", "lora-all")]
    return [number(own), *(number(own / other["peak_mib"], 2) if other else missing for other in others)]


def _libraries(record: dict[str, Any], batches: tuple[str, ...]) -> float:
    return min(own["libraries_mib"] for batch in batches for own in record["peaks"].get(batch, {}).values())


def _in_order(method: str) -> tuple[Any, ...]:
    """A key that sorts methods: stacks after what they consist of, and what is added after the method itself."""
    words = [part.partition(":")[0] for part in method.split("+")]
    plain = [word for word in words if word not in ON_TOP]
    return len(plain), list(WORDS).index(plain[0]), "checkpointing" in words, method


def models(names: tuple[str, ...]) -> str:
    """Several models, each with some methods, in a table."""
    cells, headings = [], []
    for name in names:
        record = read(name)
        options = record["options"]
        dtype = "bf16" if options["bf16"] else "float32"
        for row in record["rows"]:
            first = [options["model"], str(options["batch_size"]), dtype] if row is record["rows"][0] else [""] * 3
            shown = (STEP, OVER_FULL, OVER_LORA, SAVED, PEAK)
            cells.append([*first, label(row["method"]), *(column.cell(row) for column in shown)])
        headings.append(f"{options['model']}, {dtype}")
    header = ["model", "batch", "dtype", "method", "step ms", "/ full", "/ LoRA", "saved / full", "peak / full"]
    return f"{markdown(header, cells, text_columns=4)}\n\n{_sources(names, headings)}"


def _sources(names: Iterable[str], headings: Iterable[str] | None = None) -> str:
    """A list of records, with what each of them is for."""
    lines = [source(name, read(name)) for name in names]
    if headings is not None:
        lines = [f"{heading}: {line}" for heading, line in zip(headings, lines, strict=True)]
    return "\n".join(f"- {line}" for line in lines)
