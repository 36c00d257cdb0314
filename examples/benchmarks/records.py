"""The records of the benchmarks, and how tables name their methods, machines and versions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VERSION = "0.1.0"
ON_TOP = ("compile", "checkpointing", "cuda-graph", "triton")  # words that are no method of their own
WORDS = {
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
# Names of settings in records that are older than the settings.
_RENAMED = (
    (re.compile(r"grad_input=(\d+)"), r"grad_input_rank=\1"),
    (re.compile(r"grad_input=(\w+)"), r"grad_input_dtype=\1"),
    (re.compile(r"rotation=(\d+)"), r"hadamard_size=\1"),
)


def read(name: str) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = json.loads((RESULTS / VERSION / name).read_text())
    return record


def exists(name: str) -> bool:
    """Whether there is a record of this name."""
    return (RESULTS / VERSION / name).exists()


def renamed(text: str) -> str:
    """A method or setting with today's names of its settings."""
    for old, new in _RENAMED:
        text = old.sub(new, text)
    return text


def label(method: str) -> str:
    """The name of a method in tables, such as "LoRA + LBP-WHT, compressed".

    Args:
        method: In the notation of methods.py.
    """
    names, details = [], []
    for part in renamed(method).split("+"):
        word, _, text = part.partition(":")
        settings = dict(pair.split("=") for pair in text.split(",") if pair)
        if word in ON_TOP:
            details.append(_on_top(word, settings))
        else:
            names.append(WORDS.get(word, word))
            details += _settings(settings)
    return ", ".join([" + ".join(names), *details])


def emphasised(method: str) -> str:
    """The label, bold for LoRA + LBP-WHT with default, compressed or recomputed activations."""
    is_stack = method.startswith("lora-all+lbp-wht") and "grad_input" not in method and "compile" not in method
    return f"**{label(method)}**" if is_stack else label(method)


def _on_top(word: str, settings: dict[str, str]) -> str:
    if word == "checkpointing":
        return "checkpointing of every second block" if settings.get("every") == "2" else "checkpointing"
    return WORDS[word] + "".join(f" (`{key}={value}`)" for key, value in settings.items())


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


def dtype_of(record: dict[str, Any]) -> str:
    return "bf16 autocast" if record["options"]["bf16"] else "float32"
