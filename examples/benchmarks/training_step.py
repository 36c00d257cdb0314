"""Forward, backward and saved activations of a training step, methods side by side in one process.

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --model vit-s --batch-size 16 --methods full lora-all lbp-wht:r=21

The methods take turns, round after round, so that whatever else the machine does meets them all; the table shows
medians and, for times, medians of the ratios within a round. A method may carry settings after a colon, as in
`lbp-wht:r=10,grad_input=3` or `lora-all:r=16`. LBP-WHT on all linear layers, put on LoRA, is written with a plus:
`lora-all+lbp-wht:r=3`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, Dinov2Config, ViTConfig

import lbp_peft
from lbp_peft import LBPWHTConfig
from lbp_peft.encoder import encoder_linears
from lbp_peft.measure import multiply_adds, saved_activations

SIZES = {
    "s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
MODELS: dict[str, Callable[[int], Any]] = {
    **{
        f"vit-{size}": lambda image_size, shape=shape: ViTConfig(
            **shape, intermediate_size=4 * shape["hidden_size"], image_size=image_size, patch_size=16
        )
        for size, shape in SIZES.items()
    },
    "dinov2-b": lambda image_size: Dinov2Config(**SIZES["b"], image_size=image_size, patch_size=14),
}
METHODS = (
    "full",
    "lora-qv",
    "lora-all",
    "lbp-wht:r=3,grad_input=3",
    "lbp-wht:r=10,grad_input=10",
    "lbp-wht:r=10",
    "lora-all+lbp-wht:r=3,grad_input=3",
    "lora-all+lbp-wht:r=10,grad_input=10",
    "lora-all+lbp-wht:r=10",
    "lora-qv+lbp-wht:r=3,grad_input=3",
    "lora-qv+lbp-wht:r=10,grad_input=10",
    "lora-qv+lbp-wht:r=10",
)
REFERENCES = {"full": "full", "lora_all": "lora-all", "lora_qv": "lora-qv"}
COLUMNS = (
    "method",
    "forward ms",
    "backward ms",
    "step / full",
    "step / LoRA all",
    "step / LoRA qv",
    "saved MiB",
    "/ full",
    "/ LoRA all",
    "/ LoRA qv",
    "backward G MACs",
)


def settings_of(method: str) -> tuple[str, dict[str, Any]]:
    """ "lbp-wht:r=3,grad_input=3" -> ("lbp-wht", {"r": 3, "grad_input": 3})"""
    name, _, text = method.partition(":")
    pairs = (pair.split("=", 1) for pair in text.split(",") if pair)
    return name, {key: int(value) if value.isdigit() else value for key, value in pairs}


def adapted(model: nn.Module, method: str) -> nn.Module:
    """The model, made ready to be trained by a method; every method trains the classifier."""
    if "+" in method:
        for part in method.split("+"):
            model = adapted(model, part)
        return model
    name, settings = settings_of(method)
    head = ["classifier"]
    if name == "full":
        return model
    if name == "lbp-wht":
        stacked = isinstance(model, PeftModel)
        return get_peft_model(model, LBPWHTConfig(modules_to_save=head, train_base_weight=not stacked, **settings))
    if name in ("lora-qv", "lora-all"):
        targets = encoder_linears(model)
        if name == "lora-qv":
            targets = [target for target in targets if target.rsplit(".")[-1] in ("q_proj", "v_proj", "query", "value")]
        return get_peft_model(model, LoraConfig(**{"r": 8}, target_modules=targets, modules_to_save=head, **settings))
    raise SystemExit(f"Unknown method {method!r}, choose from full, lora-qv, lora-all, lbp-wht.")


class Step:
    """One method's training step on a fixed batch, run again and again."""

    def __init__(self, options: argparse.Namespace, base: nn.Module, method: str):
        self.method = method
        self.model = adapted(copy.deepcopy(base), method).train().to(options.device)
        self.device = torch.device(options.device)
        size = (options.batch_size, 3, options.image_size, options.image_size)
        self.batch = {
            "pixel_values": torch.randn(size, device=options.device),
            "labels": torch.randint(100, size[:1], device=options.device),
        }
        self.bf16 = options.bf16

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(**self.batch).loss

    def timed(self) -> tuple[float, float]:
        """Seconds of forward and of backward."""
        start = self._now()
        loss = self.forward()
        middle = self._now()
        loss.backward()
        end = self._now()
        self.model.zero_grad(set_to_none=True)
        return middle - start, end - middle

    def counted(self) -> tuple[float, float]:
        """MiB of saved activations, and billions of multiply-adds in the backward pass."""
        with saved_activations(self.model) as saved:
            loss = self.forward()
        del loss
        loss = self.forward()
        with multiply_adds() as backward:
            loss.backward()
        self.model.zero_grad(set_to_none=True)
        return saved.mib, backward.total / 1e9

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(steps: list[Step], rounds: int) -> list[dict[str, Any]]:
    counts = [step.counted() for step in steps]
    times: list[list[tuple[float, float]]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, own in zip(steps, times, strict=True):
            own.append(step.timed())
        print(f"  round {number} of {rounds}" + (" (warm-up)" if number == 0 else ""), end="\r", flush=True)
    print(" " * 40, end="\r")
    whole = [[sum(pair) for pair in own[1:]] for own in times]
    names = [step.method for step in steps]

    def step_over(reference: str, i: int) -> float | None:
        if reference not in names:
            return None
        return statistics.median(a / b for a, b in zip(whole[i], whole[names.index(reference)], strict=True))

    def saved_over(reference: str, i: int) -> float | None:
        return counts[i][0] / counts[names.index(reference)][0] if reference in names else None

    return [
        {
            "method": step.method,
            "forward_ms": 1e3 * statistics.median(forward for forward, _ in times[i][1:]),
            "backward_ms": 1e3 * statistics.median(backward for _, backward in times[i][1:]),
            **{f"step_over_{key}": step_over(reference, i) for key, reference in REFERENCES.items()},
            "step_ms_lowest_highest": [1e3 * min(whole[i]), 1e3 * max(whole[i])],
            "saved_mib": counts[i][0],
            **{f"saved_over_{key}": saved_over(reference, i) for key, reference in REFERENCES.items()},
            "backward_gmacs": counts[i][1],
        }
        for i, step in enumerate(steps)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    cells = [COLUMNS] + [
        (
            row["method"],
            number(row["forward_ms"], 0),
            number(row["backward_ms"], 0),
            *(number(row[f"step_over_{key}"], 3) for key in REFERENCES),
            number(row["saved_mib"], 0),
            *(number(row[f"saved_over_{key}"], 3) for key in REFERENCES),
            number(row["backward_gmacs"], 1),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, peft, lbp_peft)},
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="vit-b")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one to warm up")
    parser.add_argument("--bf16", action="store_true", help="everything under bf16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures and the environment there, as JSON")
    options = parser.parse_args()

    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    precision = "bf16 autocast" if options.bf16 else "float32"
    print(f"{options.model}, {options.image_size} px, batch {options.batch_size}, {precision}, {options.device}")
    torch.manual_seed(0)
    config = MODELS[options.model](options.image_size)
    config.num_labels = 100
    base = AutoModelForImageClassification.from_config(config)
    rows = measure([Step(options, base, method) for method in options.methods], options.rounds)
    print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        shown = {**vars(options), "output": str(options.output)}
        options.output.write_text(json.dumps({"environment": where, "options": shown, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
