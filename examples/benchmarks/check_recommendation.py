"""Train the recommended setting in a process of its own, and measure from outside whether it keeps within the budget.

    lbp-peft recommend --model vit-b/ --random-images 224 --memory 0.8x --output runs/recommendation
    python examples/benchmarks/check_recommendation.py --recommendation runs/recommendation/recommendation.json \
        --model vit-b/ --random-images 224

It loads the same model and the same batches, trains with AdamW, and compares the step time (the median, after two steps
to warm up) and the peak memory with the recommendation. On a CPU, the peak is that of the resident set, which another
process reads every five milliseconds; on a GPU, it is the most that PyTorch's allocator handed out. The exit status is
1 if the peak exceeds the budget, or the prediction if there was no budget, by more than 5 %.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lbp_peft.cli.inputs import InputOptions, load_inputs
from lbp_peft.head import head_modules
from lbp_peft.loading.options import option, parse
from lbp_peft.loading.terminal import plain_messages
from lbp_peft.measure.running import device_of, loss_of_output, to_device
from lbp_peft.measure.timing import now
from lbp_peft.recommendation.candidates import CANDIDATES, SETTINGS, Candidate, with_compile

MIB = 2**20
TOLERANCE = 1.05
_WARMING_UP = 2


@dataclass
class CheckOptions(InputOptions):
    recommendation: str = option("runs/recommendation/recommendation.json", "What `lbp-peft recommend` wrote.")
    setting: str | None = option(None, "Train this setting instead, by its name in the table. (default: recommended)")
    steps: int = option(50, "Training steps.")
    learning_rate: float = option(1e-5, "Of AdamW.")
    drop_loss: bool = option(False, "Delete the loss after each step, as transformers' Trainer does.")
    in_child: bool = option(False, "Used by the program itself: train, and print what was measured.")


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options: CheckOptions = parse(CheckOptions, None, __doc__, given)
    record = json.loads(Path(options.recommendation).expanduser().read_text())
    label = options.setting or record["recommended"]
    if options.in_child:
        train(options, label, record["precision"])
        return
    predicted = next(trial for trial in record["trials"] if trial["label"] == label)
    child = subprocess.Popen([sys.executable, __file__, *given, "--in_child"], stdout=subprocess.PIPE, text=True)
    peak = watched(child)
    if child.returncode:
        raise SystemExit(f"training {label} failed")
    assert child.stdout is not None
    measured = json.loads(child.stdout.read().splitlines()[-1])
    peak = measured["peak_bytes"] or peak
    bounds = record["bounds"]
    budget = predicted["peak_bytes"]
    if bounds["memory"]:
        full = next((trial["peak_bytes"] for trial in record["trials"] if trial["label"] == SETTINGS[0].label), None)
        budget = bounds["memory"] * (full if bounds["memory_is_relative"] else 1)
    print(f"{label}, {options.steps} steps")
    print(
        f"peak memory: {peak / MIB:.0f} MiB; predicted {predicted['peak_bytes'] / MIB:.0f} MiB "
        f"({100 * peak / predicted['peak_bytes'] - 100:+.1f} %); budget {budget / MIB:.0f} MiB "
        f"({100 * peak / budget - 100:+.1f} %)"
    )
    print(
        f"step time: {1e3 * measured['seconds']:.0f} ms; predicted {1e3 * predicted['seconds']:.0f} ms "
        f"({100 * measured['seconds'] / predicted['seconds'] - 100:+.1f} %)"
    )
    if peak > TOLERANCE * budget:
        raise SystemExit("the peak exceeds the budget by more than 5 %")


def watched(child: subprocess.Popen[str]) -> int:
    """The largest resident set of a process, which is watched until it ends."""
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.005)
    child.wait()
    return peak


def train(options: CheckOptions, label: str, precision: str) -> None:
    """Train, and print as JSON the step time and, on a GPU, the peak memory."""
    candidates = {one.label: one for one in (*CANDIDATES, *with_compile(SETTINGS))}
    candidate: Candidate = candidates[label]
    inputs = load_inputs(options)
    device = device_of(inputs.model)
    batches = to_device(inputs.batches, device)
    torch.manual_seed(0)
    model = candidate.apply_to(inputs.model, head_modules(inputs.model)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.learning_rate, fused=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    seconds = []
    for step in range(options.steps):
        start = now()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = (inputs.loss_fn or loss_of_output)(model, batches[step % len(batches)])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if options.drop_loss:
            del loss
        seconds.append(now() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    typical = statistics.median(seconds[_WARMING_UP:] or seconds)
    print(json.dumps({"seconds": typical, "peak_bytes": peak}))


if __name__ == "__main__":
    with plain_messages():
        main()
