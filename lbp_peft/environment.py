"""The machine and the versions with which a measurement was made, for its record."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .instructions import of_cpu

PACKAGES = ("torch", "transformers", "peft", "timm", "lbp-peft")


def environment() -> dict[str, Any]:
    """The date, the machine and the versions of packages; None for each that is missing."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # The load average of one minute. If it is well above zero at the start, the machine was not quiet.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def in_words(record: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if value is not None)


def write_record(path: Path, environment: dict[str, object], options: dict[str, object], **results: object) -> None:
    """Write the environment, the options and the results of a run as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment, "options": options, **results}
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # the metadata do not say which build it is
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _instructions() -> str:
    """The instruction set that PyTorch uses, and those for products in few bits, under oneDNN's limit if it has one."""
    cpu = of_cpu()
    names = {"vnni": cpu.int8, "avx512_bf16": cpu.bf16, "amx_tile": cpu.amx}
    return " + ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, is_used in names.items() if is_used)])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
