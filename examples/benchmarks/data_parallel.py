"""Measures the time and traffic of a data-parallel step on CPU processes, beside the predictions of docs/scaling.md.

    python examples/benchmarks/data_parallel.py

Each process has one thread. The prediction is the sum of a step without exchange and an exchange of as many bytes, each
measured by itself. PyTorch overlaps the two, so a step may take less. The traffic is counted in the exchange itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from lbp_peft import LBPWHTConfig

HEAD = ["classifier"]
LORA = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], modules_to_save=HEAD)
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full fine-tuning": lambda model: model,
    "LBP-WHT r=10": lambda model: get_peft_model(model, LBPWHTConfig(modules_to_save=HEAD)),
    "LoRA r=8": lambda model: get_peft_model(model, LORA),
    "LoRA r=8 + LBP-WHT r=10": lambda model: get_peft_model(
        model, LBPWHTConfig(train_base_weight=False, stack_on=LORA)
    ),
}


def vit(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    width = options.width
    config = ViTConfig(
        image_size=options.image_size, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
        num_hidden_layers=options.layers, num_labels=100,
    )  # fmt: skip
    return ViTForImageClassification(config)


def count(sent, bucket):  # PyTorch refuses annotations that are strings
    """A communication hook that does what PyTorch does without one, and notes the bytes."""
    sent.append(bucket.buffer().nbytes)
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def milliseconds(action: Callable[[], object]) -> float:
    """The milliseconds of the slowest process."""
    dist.barrier()
    start = time.perf_counter()
    action()
    took = torch.tensor(1000 * (time.perf_counter() - start))
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(options: argparse.Namespace) -> list[dict[str, float | str]]:
    batch = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    labels = torch.zeros(options.batch_size, dtype=torch.long)
    rows = []
    for name, adapt in METHODS.items():
        sent: list[int] = []
        model = DistributedDataParallel(adapt(vit(options)).train())
        model.register_comm_hook(sent, count)

        def step(together: bool, model: nn.Module = model) -> None:
            with nullcontext() if together else model.no_sync():
                model(batch, labels=labels).loss.backward()
            model.zero_grad()

        for _ in range(2):  # the first pass settles the buckets
            step(True)
        sent.clear()
        step(True)
        buckets = [torch.zeros(size // 4) for size in sent]

        def exchange(buckets: list[torch.Tensor] = buckets) -> None:
            for bucket in buckets:
                dist.all_reduce(bucket)

        times = [
            (milliseconds(lambda: step(False)), milliseconds(exchange), milliseconds(lambda: step(True)))
            for _ in range(options.rounds)
        ]
        alone, exchanged, measured = (statistics.median(column) for column in zip(*times, strict=True))
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        rows.append(
            {
                "method": name, "trained MiB": trained / 2**20, "sent MiB": sum(b.nbytes for b in buckets) / 2**20,
                "buckets": len(buckets), "alone ms": alone, "exchange ms": exchanged,
                "predicted ms": alone + exchanged, "measured ms": measured,
            }
        )  # fmt: skip
    return rows


def process(rank: int, options: argparse.Namespace, port: int, answer: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=options.processes)
    rows = measure(options)
    if rank == 0:
        Path(answer).write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="images of each process")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = str(Path(folder) / "rows.json")
        torch.multiprocessing.spawn(process, (options, port, answer), nprocs=options.processes)
        rows = json.loads(Path(answer).read_text())
    print("| " + " | ".join(rows[0]) + " |\n| --- " + "| ---: " * (len(rows[0]) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    print(
        f"\n{options.processes} processes of one thread, {options.batch_size} images of {options.image_size} px each, "
        f"ViT of {options.layers} layers, width {options.width}, medians of {options.rounds} rounds; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{platform.machine()}, {datetime.date.today()}."
    )


if __name__ == "__main__":
    main()
