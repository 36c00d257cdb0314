"""Time and memory of a training step, each method in a process of its own.

    python examples/benchmarks/steps_by_process.py --bf16 --batch-size 64 --methods full+compile lora-all+compile

Compiling a model takes a minute or more. Here the methods are set up side by side, as many at once as `--at-once` says,
and then take turns to be timed: while one process runs, the others wait. The rows are those of training_step.py, whose
options this program takes. Two more words can end a method:

    full+cuda-graph         forward and backward pass are captured in one CUDA graph, and a step is a replay of it
    lbp-wht+triton          LBP-WHT runs the Triton kernels of the package
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import training_step
from benchmarks.models import Batch, Model
from benchmarks.training_step import Step
from lbp_peft.environment import environment, in_words
from lbp_peft.measure.timing import now, run_interleaved, touch

CUDA_GRAPH, TRITON = "+cuda-graph", "+triton"


class CapturedStep(Step):
    """A step that is captured in a CUDA graph. Its time is given as that of the forward pass, the backward's as 0.

    Raises:
        RuntimeError: the step waits for a value on the GPU, which cannot be captured, or the gradients of a replay are
            not those of an ordinary step after the weights have changed.
    """

    def __init__(self, model: nn.Module, kind: Model, batch: Batch, bf16: bool):
        super().__init__(model, kind, batch, bf16)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as the documentation of torch.cuda.CUDAGraph demands
            for _ in range(3):
                super().timed()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.forward().backward()
        self.captured = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.check()

    @torch.no_grad()
    def check(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.mul_(1.01)
        self.graph.replay()
        replayed = {name: grad.clone() for name, grad in self.captured.items() if grad.dim() > 1}
        with torch.enable_grad():
            self.model.zero_grad(set_to_none=True)
            difference = 1 - (training_step._cosine(replayed, self.gradients()) or 0)
        for parameter in trained:
            parameter.div_(1.01)
        if not difference < 1e-3:
            raise RuntimeError(f"a replayed step has other gradients: 1 - cosine is {difference:.1g}")

    def timed(self) -> tuple[float, float]:
        touch(self.model)
        start = now()
        self.graph.replay()
        return now() - start, 0.0


@dataclass
class Worker:
    """The process of one method, seen from the main process."""

    method: str
    process: BaseProcess
    connection: Connection

    def timed(self) -> tuple[float, float]:
        """Seconds of forward and of backward."""
        self.connection.send("time")
        times: tuple[float, float] = self.connection.recv()
        return times


def serve(method: str, options: argparse.Namespace, connection: Connection, slots: Any) -> None:
    """Set up a method and send what does not vary; then time a step as often as the main process asks."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with slots:
            step, counts, cosine = set_up(method, options)
            torch.cuda.empty_cache()
        connection.send((counts, cosine))
        while connection.recv() == "time":
            step.timed()  # so that the memory is PyTorch's again, and the caches are warm
            connection.send(step.timed())
            torch.cuda.empty_cache()
        connection.send(Step.optimizer_seconds(step, options.rounds))
    except BaseException as error:
        print(f"{method}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        connection.send(error if isinstance(error, SystemExit) else RuntimeError(str(error)))


def set_up(method: str, options: argparse.Namespace) -> tuple[Step, training_step.Counts, float | None]:
    base = _without_suffixes(method)
    training_step.warm_up(options.device)
    prepared = training_step.prepared(argparse.Namespace(**vars(options) | {"methods": [base]}))
    if base not in prepared:
        raise SystemExit("see above")
    step = prepared[base]
    counts, cosine = step.counted(), step.cosine(base, {})
    for _ in range(3):  # torch.compile's CUDA graphs are recorded in the second and third step
        step.timed()
    if method.endswith(CUDA_GRAPH):
        step = CapturedStep(step.model, step.kind, step.batch, step.bf16)
    return step, counts, cosine


def started(options: argparse.Namespace, slots: Any) -> list[Worker]:
    """The workers of all methods. Each waits for one of the slots before it is set up."""
    context = get_context("spawn")
    workers = []
    for method in options.methods:
        here, there = context.Pipe()
        os.environ["LBP_PEFT_KERNELS"] = "triton" if TRITON in method else ""
        process = context.Process(target=serve, args=(method, options, there, slots), daemon=True)
        process.start()
        there.close()
        workers.append(Worker(method, process, here))
    return workers


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    ready, constant = [], {}
    slots = get_context("spawn").Semaphore(options.at_once)
    for worker in tqdm(started(options, slots), desc="set-up", leave=False):
        try:
            answer = worker.connection.recv()
        except EOFError:
            answer = RuntimeError("the process has died")
        if isinstance(answer, BaseException):
            print(f"left out {worker.method}: {str(answer)[-600:]}", flush=True)
        else:
            ready.append(worker)
            constant[worker.method] = answer
    while options.wait_for and not options.wait_for.exists():
        time.sleep(0.1)
    times = run_interleaved([worker.timed for worker in ready], range(options.rounds))
    rows = []
    for worker, own in zip(ready, times, strict=True):
        worker.connection.send("end")
        optimizer = worker.connection.recv()
        rows.append(training_step.row(worker.method, *constant[worker.method], own, optimizer))
        worker.process.join()
    return training_step.compared(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = training_step.parser(__doc__)
    parser.add_argument("--at-once", type=int, default=1, help="processes that are set up at the same time")
    parser.add_argument("--wait-for", type=Path, metavar="FILE", help="do not time anything before this file exists")
    options = training_step.completed(parser.parse_args(arguments), parser)
    training_step.check_methods([_without_suffixes(method) for method in options.methods], parser)
    if any(method.endswith(CUDA_GRAPH) for method in options.methods) and options.device != "cuda":
        parser.error(f"{CUDA_GRAPH} needs a CUDA GPU")
    where = environment()
    print(in_words(where), training_step.title(options), sep="\n")
    rows = measured(options)
    if not rows:
        raise SystemExit("No method could be set up.")
    training_step.report(rows, where, options)


def _without_suffixes(method: str) -> str:
    return method.removesuffix(CUDA_GRAPH).removesuffix(TRITON)


if __name__ == "__main__":
    main()
