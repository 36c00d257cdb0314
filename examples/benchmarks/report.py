"""Tables of the results pages in docs/, from the records of the benchmarks.

    python examples/benchmarks/report.py                 # prints every table
    python examples/benchmarks/report.py --docs docs     # puts the tables into the pages

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a key of `TABLES`. To add
a table, write its record with a benchmark, and add an entry to `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.tables import markdown, with_table

from benchmarks.tables import number

RESULTS = Path(__file__).parent / "results"
VERSION = "0.1.0"
# Names of settings in records that are older than the settings.
_RENAMED = (
    (re.compile(r"grad_input=(\d+)"), r"grad_input_rank=\1"),
    (re.compile(r"grad_input=(\w+)"), r"grad_input_dtype=\1"),
    (re.compile(r"rotation=(\d+)"), r"hadamard_size=\1"),
)
_WORDS = {
    "full": "full fine-tuning",
    "lora-all": "LoRA",
    "lora-qv": "LoRA on q, v",
    "lora-fa": "LoRA-FA",
    "lora-one-product": "LoRA in one product",
    "velora": "VeLoRA",
    "lbp-wht": "LBP-WHT",
    "compile": "compiled",
    "cuda-graph": "CUDA graph",
    "triton": "Triton kernels",
}
_ON_TOP = ("compile", "checkpointing", "cuda-graph", "triton")  # words that are no method of their own

Row = dict[str, Any]


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
ALL = (FORWARD, BACKWARD, ADAMW, OVER_FULL, OVER_LORA, COSINE, SAVED, PEAK)
WITHOUT_OPTIMIZER = (FORWARD, BACKWARD, OVER_FULL, OVER_LORA, SAVED, PEAK)


def label(method: str) -> str:
    """The name of a method in tables, such as "LoRA + LBP-WHT, compressed".

    Args:
        method: In the notation of methods.py.
    """
    for old, new in _RENAMED:
        method = old.sub(new, method)
    names, details = [], []
    for part in method.split("+"):
        word, _, text = part.partition(":")
        settings = dict(pair.split("=") for pair in text.split(",") if pair)
        if word in _ON_TOP:
            details.append(_on_top(word, settings))
        else:
            names.append(_WORDS.get(word, word))
            details += _settings(settings)
    return ", ".join([" + ".join(names), *details])


def _on_top(word: str, settings: dict[str, str]) -> str:
    if word == "checkpointing":
        return "checkpointing of every second block" if settings.get("every") == "2" else "checkpointing"
    return _WORDS[word] + "".join(f" (`{key}={value}`)" for key, value in settings.items())


def _settings(settings: dict[str, str]) -> list[str]:
    """What differs from the default, r=10 with exact or rounded input gradients."""
    rank, basis = settings.pop("grad_input_rank", None), settings.pop("grad_input_basis", "walsh")
    r = settings.pop("r", "10")
    if basis == "adaptive":
        first = [f"adaptive, rank {rank}"]
    elif rank is not None:
        first = [f"paper's setting, r={rank}"] if rank == r else [f"r={r}", f"grad_input_rank={rank}"]
    else:
        first = [] if r == "10" else [f"r={r}"]
    compressed = settings.pop("compress_activations", None)
    if compressed is not None:
        first.append("compressed" if compressed == "all" else f"compressed ({compressed.replace('/', ', ')})")
    return first + [f"`{key}={value}`" for key, value in settings.items()]


def read(name: str) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = json.loads((RESULTS / VERSION / name).read_text())
    return record


def source(name: str, record: dict[str, Any]) -> str:
    """Where and with what a record was measured, and a link to it."""
    machine = record["environment"]
    where = machine["gpu"] or f"{machine['cores']} cores of an {machine['processor']} ({_instructions(machine)})"
    versions = ", ".join(
        f"{package} {machine[package].partition('+')[0]}" for package in ("torch", "transformers", "peft", "timm")
        if machine.get(package)
    )  # fmt: skip
    link = f"[record](../examples/benchmarks/results/{VERSION}/{name})"
    return f"{where}, {versions}, {machine['date']}, {link}."


def _instructions(machine: dict[str, Any]) -> str:
    spelled = {"AVX2": "AVX2", "AVX512": "AVX-512", "vnni": "VNNI", "avx512_bf16": "bf16", "amx_tile": "AMX"}
    return ", ".join(spelled[word] for word in machine["instructions"].split(" + "))


def steps(name: str, columns: tuple[Column, ...], methods: Iterable[str] | None = None) -> str:
    """The rows of a record of training_step.py, in its order.

    Args:
        name: The record.
        columns: The columns beside the first, which has the names of the methods.
        methods: The methods that are shown; None: all of them.
    """
    record = read(name)
    rows = [row for row in record["rows"] if methods is None or row["method"] in methods]
    cells = [[_emphasised(row["method"]), *(column.cell(row) for column in columns)] for row in rows]
    options, runs = record["options"], max(len(row.get("rounds_ms", ())) for row in rows)
    dtype = "bf16 autocast" if options["bf16"] else "float32"
    size = " x ".join(map(str, options["image_size"] or ()))
    caption = f"{options['model']}{f', {size} px' if size else ''}, batch {options['batch_size']}, {dtype}"
    caption += f"; medians of {runs} rounds; {source(name, record)}"
    return f"{markdown(['method', *(column.heading for column in columns)], cells)}\n\n{caption}"


def _emphasised(method: str) -> str:
    """The label, bold for LoRA + LBP-WHT with default, compressed or recomputed activations."""
    is_stack = method.startswith("lora-all+lbp-wht") and "grad_input" not in method and "compile" not in method
    return f"**{label(method)}**" if is_stack else label(method)


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
        times = [_median("step_ms")(found.get(method + suffix, {})) for suffix in modes.values()]
        peak = found[method]["peak_mib"]
        ratios = [number(peak / other["peak_mib"], 2) for other in reference.values()]
        cells.append([_emphasised(method), *times, number(peak), *ratios])
    header = ["method", *(f"{heading} ms" for heading in modes), "peak MiB", "/ full", "/ LoRA"]
    sources = "\n".join(f"- {source(name, record)}" for name, record in zip(names, records, strict=True))
    return f"{markdown(header, cells)}\n\n{sources}"


def peaks(name: str, batches: tuple[str, ...]) -> str:
    """The rows of a record of peak_memory_table.py.

    Args:
        name: The record.
        batches: The sizes of batches, a group of columns each.
    """
    record = read(name)
    measured = {batch: record["peaks"][batch] for batch in batches}
    cells = []
    for method in sorted({method for rows in measured.values() for method in rows}, key=_in_order):
        line = [_emphasised(method)]
        for rows in measured.values():
            line += [""] * 3 if method not in rows else [
                number(rows[method]["peak_mib"]),
                *(number(rows[method]["peak_mib"] / rows[other]["peak_mib"], 2) for other in ("full", "lora-all")),
            ]  # fmt: skip
        cells.append(line)
    header = ["method"]
    for batch in batches:
        header += [f"batch {batch}: MiB", "/ full", "/ LoRA"]
    libraries = {rows[method]["libraries_mib"] for rows in measured.values() for method in rows}
    caption = (
        f"{record['options']['model']}, {'bf16 autocast' if record['options']['bf16'] else 'float32'}, with AdamW's "
        f"state and {min(libraries):.0f} MiB of libraries; {source(name, record)}"
    )
    return f"{markdown(header, cells)}\n\n{caption}"


def _in_order(method: str) -> tuple[Any, ...]:
    """A key that sorts methods: stacks after what they consist of, and what is added after the method itself."""
    words = [part.partition(":")[0] for part in method.split("+")]
    plain = [word for word in words if word not in _ON_TOP]
    return len(plain), list(_WORDS).index(plain[0]), "checkpointing" in words, method


def models(names: tuple[str, ...]) -> str:
    """Several models, each with some methods, in a table."""
    cells, captions = [], []
    for name in names:
        record = read(name)
        options = record["options"]
        dtype = "bf16" if options["bf16"] else "float32"
        for row in record["rows"]:
            first = [options["model"], str(options["batch_size"]), dtype] if row is record["rows"][0] else [""] * 3
            shown = (STEP, OVER_FULL, OVER_LORA, SAVED, PEAK)
            cells.append([*first, label(row["method"]), *(column.cell(row) for column in shown)])
        captions.append(f"- {options['model']}, {dtype}: {source(name, record)}")
    header = ["model", "batch", "dtype", "method", "step ms", "/ full", "/ LoRA", "saved / full", "peak / full"]
    return markdown(header, cells, text_columns=4) + "\n\n" + "\n".join(captions)


def layers(float32: str, bf16: str) -> str:
    """Single layers, their forward and backward pass relative to the plain layer."""
    modes = ("full", "auto", "10")
    lines: dict[str, list[str]] = {}
    records = [read(name) for name in (float32, bf16)]
    for record in records:
        for row in record["rows"]:
            height, width = row["grid"]
            tokens = row["batch"] * (height * width + row["prefix"])
            line = lines.setdefault(row["layer"], [" x ".join(map(str, (tokens, *row["features"])))])
            if row["mode"] in modes:
                line.append(number(row["over_plain"][1], 2))
    header = ["layer", "tokens x C_in x C_out", *(f"float32: {mode}" for mode in modes), *(f"bf16: {m}" for m in modes)]
    cells = [[layer, *line] for layer, line in lines.items()]
    sources = "\n".join(f"- {source(n, record)}" for n, record in zip((float32, bf16), records, strict=True))
    return f"{markdown(header, cells, text_columns=2)}\n\n{sources}"


def cosines(name: str) -> str:
    """The cosines of a record of gradient_fidelity.py, without settings that no longer exist."""
    record = read(name)
    cells = []
    for setting, *values in record["rows"]:
        for old, new in _RENAMED:
            setting = old.sub(new, setting)
        if "compress_activations=int8" not in setting:
            cells.append([f"`{setting}`", *(number(value, 4 if value is values[0] else 3) for value in values)])
    return f"{markdown(['setting', 'all', 'first block', 'middle', 'last'], cells)}\n\n{source(name, record)}"


_GPU = (
    "full", "full+checkpointing", "lora-all", "lora-all+checkpointing",
    "lbp-wht:r=10", "lbp-wht:r=10,grad_input_rank=10",
    "lora-all+lbp-wht:r=10", "lora-all+lbp-wht:r=10,grad_input_rank=10",
    "lora-all+lbp-wht:r=10,compress_activations=all", "lora-all+lbp-wht:r=10+checkpointing",
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    "AVX2, steps": partial(steps, "vit-b-float32-checkpointing-avx2.json", ALL),
    "AVX2, more methods": partial(steps, "vit-b-float32-avx2.json", ALL[:-1]),
    "AVX2, peaks": partial(peaks, "vit-b-peak-avx2.json", ("16", "8")),
    "restricted to AVX2": partial(steps, "vit-b-float32-restricted-to-avx2.json", ALL),
    "AVX-512, float32": partial(steps, "vit-b-float32-avx512.json", ALL),
    "AVX-512, bf16": partial(steps, "vit-b-bf16-avx512.json", ALL),
    "AVX-512, bf16, again": partial(steps, "vit-b-bf16-avx512-short.json", ALL),
    "AVX-512, compiled, float32": partial(steps, "vit-b-float32-compiled-avx512.json", WITHOUT_OPTIMIZER),
    "AVX-512, peaks": partial(peaks, "vit-b-peak-avx512.json", ("32", "8")),
    "AMX, float32": partial(steps, "vit-b-float32-amx.json", WITHOUT_OPTIMIZER),
    "AMX, bf16": partial(steps, "vit-b-bf16-amx.json", WITHOUT_OPTIMIZER),
    "AMX, peaks": partial(peaks, "vit-b-peak-amx-batch-32.json", ("32",)),
    "H200": partial(
        step_by_mode,
        ("h200-vit-b-bf16-cuda-graphs.json", "h200-vit-b-bf16-compiled.json"),
        {"eager": "", "CUDA graph": "+cuda-graph", "compiled": "+compile"},
        _GPU,
    ),
    "AMX, float32, earlier build": partial(steps, "vit-b-float32.json", WITHOUT_OPTIMIZER),
    "AMX, bf16, earlier build": partial(steps, "vit-b-bf16.json", WITHOUT_OPTIMIZER),
    "other models": partial(
        models,
        tuple(f"{model}-{dtype}.json" for model in ("vit-s", "dinov2-b", "vit-l") for dtype in ("float32", "bf16")),
    ),
    "other architectures": partial(models, ("swinv2-s.json", "segformer-b0.json", "efficientformer-l1.json")),
    "single layers": partial(layers, "layers-float32.json", "layers-bf16.json"),
    "cosines": partial(cosines, "fidelity.json"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="the folder of the pages, which get the tables")
    options = parser.parse_args(arguments)
    contents = {name: table() for name, table in TABLES.items()}
    if options.docs is None:
        for name, content in contents.items():
            print(f"{name}\n\n{content}\n")
        return
    for page in sorted(options.docs.glob("*.md")):
        text = page.read_text()
        for name, content in contents.items():
            text = with_table(text, f"table: {name}", content)
        page.write_text(text)


if __name__ == "__main__":
    main()
