"""Runs everything that needs a GPU within a time limit: the tests, the kernels and the training steps.

    python examples/benchmarks/on_gpu.py
    python examples/benchmarks/on_gpu.py --minutes 20 --output runs/gpu --only tests vit-b-bf16

Each part is a program of its own, so that a part that fails or runs out of time does not affect the others. A part that
would begin after the limit is skipped and named at the end. Output goes to the terminal and, with the JSON records, to
the folder `--output`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

EAGER = (
    "full", "full+checkpointing", "float8", "lora-qv", "lora-all", "lora-all+checkpointing",
    "lbp-wht:r=10,grad_input_dtype=full", "lbp-wht:r=10,grad_input_dtype=fp8", "lbp-wht:r=10,grad_input_dtype=int8",
    "lbp-wht:r=10,grad_input_dtype=auto", "lbp-wht:r=10,grad_input_rank=10", "lbp-wht:r=10,compress_activations=all",
    "lbp-wht:r=10+checkpointing", "lora-all+lbp-wht:r=10", "lora-all+lbp-wht:r=10,compress_activations=all",
    "lora-all+lbp-wht:r=10+checkpointing",
)  # fmt: skip
_SETTINGS = (
    "full", "lora-all", "lbp-wht:r=10", "lbp-wht:r=10,grad_input_rank=10", "lora-all+lbp-wht:r=10",
    "lora-all+lbp-wht:r=10,grad_input_rank=10", "lora-all+lbp-wht:r=10,compress_activations=all",
)  # fmt: skip
_SHORT = ("full", "lora-all", "lora-all+lbp-wht:r=10")
_TRITON = ("lbp-wht:r=10,grad_input_rank=10+triton", "lora-all+lbp-wht:r=10+triton")


def _each(methods: tuple[str, ...], word: str) -> list[str]:
    return [f"{method}+{word}" for method in methods]


# Eager steps come first, to compare with.
COMPILED = (*_SHORT, *_each(("float8", *_SETTINGS), "compile"), *_each(_SHORT, "compile:mode=reduce-overhead"))
CUDA_GRAPHS = (*_SHORT, *_each(_SETTINGS + _TRITON, "cuda-graph"))


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        command: The arguments of the Python interpreter.
        seconds: The time after which the program is stopped.
        environment: Environment variables in addition to those of this process.
    """

    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


def steps(
    name: str, output: Path, model: str, methods: tuple[str, ...], seconds: int, *options: str, **env: str
) -> Part:
    """Steps in eager mode, in one process."""
    return Part(["training_step.py", *_arguments(name, output, model, methods), *options], seconds, env)


def steps_by_process(name: str, output: Path, model: str, methods: tuple[str, ...], seconds: int) -> Part:
    """Steps that take long to set up, each method in a process of its own."""
    at_once = str(max(1, (os.cpu_count() or 1) // 2))
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "1"}
    command = ["steps_by_process.py", *_arguments(name, output, model, methods), "--at-once", at_once]
    return Part(command, seconds, environment)


def _arguments(name: str, output: Path, model: str, methods: tuple[str, ...]) -> list[str]:
    record = str(output / f"{name}.json")
    return [
        "--model", model, "--batch-size", "64", "--bf16", "--rounds", "10", "--output", record, "--methods", *methods,
    ]  # fmt: skip


def parts(output: Path) -> dict[str, Part]:
    """All parts by name, the most important ones first."""
    tests = ["-m", "pytest", "-q", "-n", str(min(16, os.cpu_count() or 1)), str(ROOT / "tests")]
    kernels = [str(HERE / "gpu_kernels.py"), "--output", str(output / "gpu-kernels.json")]
    of_training = {
        "vit-b-bf16": steps("vit-b-bf16", output, "vit-b", EAGER, 150),
        "vit-b-bf16-cuda-graphs": steps_by_process("vit-b-bf16-cuda-graphs", output, "vit-b", CUDA_GRAPHS, 240),
        "vit-b-bf16-compiled": steps_by_process("vit-b-bf16-compiled", output, "vit-b", COMPILED, 300),
        "vit-b-bf16-kernels": steps("vit-b-bf16-kernels", output, "vit-b", EAGER, 150, LBP_PEFT_KERNELS="triton"),
        "vit-l-bf16": steps("vit-l-bf16", output, "vit-l", EAGER, 240),
        "dinov2-l-bf16": steps("dinov2-l-bf16", output, "dinov2-l", EAGER, 240),
    }
    programs = {
        name: replace(part, command=[str(HERE / part.command[0]), *part.command[1:]])
        for name, part in of_training.items()
    }
    return {"tests": Part(tests, 300), "kernels": Part(kernels, 90), **programs}


def run(name: str, part: Part, seconds: float, output: Path) -> str:
    """Run one part, show and write its output, and return in a word how it ended."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | part.environment
    print(f"\n== {name}", flush=True)
    log = output / f"{name}.log"
    with log.open("w") as file:
        command = [sys.executable, *part.command]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(line[:400] for line in lines[-60:] if "it/s" not in line and "s/it" not in line), flush=True)
    return "stopped: out of time" if status is None else "done" if status == 0 else f"failed with status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of the parts to run")
    parser.add_argument("--output", type=Path, default=Path("runs", "gpu"), help="folder of logs and records")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    known = parts(output)
    if unknown := set(options.only or ()) - known.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    end = time.monotonic() + 60 * options.minutes
    outcomes = {}
    for name in options.only or known:
        left = end - time.monotonic()
        outcomes[name] = run(name, known[name], min(left, known[name].seconds), output) if left > 20 else "left out"
    print("\n" + "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
