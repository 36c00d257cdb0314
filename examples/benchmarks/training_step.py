"""Measures the time and memory of a training step, for several methods side by side in one process.

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --model vit-s --batch-size 16 --methods full lora-all lbp-wht:r=21
    python examples/benchmarks/training_step.py --model segformer-b0 --image-size 512 1024 --batch-size 1 --bf16
    python examples/benchmarks/training_step.py --methods comparison memory

A step is a forward and a backward pass on one batch. The methods take turns, round after round, so that other work on
the machine affects all of them. In each turn a method runs two steps, of which the second counts, since the step after
another method's is longer. The table shows medians and, for times, medians of the ratios within a round. The time
of the optimiser, fused AdamW, is measured separately and is not part of a step. The cosine is that of the angle between
the gradients of all trained matrices and those of exact backpropagation, here with random weights and images.
examples/benchmarks/methods.py describes how methods are written, comparisons.py names sets of them, and
docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparisons import SETS, expanded
from benchmarks.methods import NotAvailable, adapted, default_methods, words
from benchmarks.models import MODELS, Batch, Model
from benchmarks.tables import aligned, number
from lbp_peft import exact_backward
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.measure import multiply_adds, saved_activations
from lbp_peft.measure.memory import allocated
from lbp_peft.measure.timing import now, quartiles, ratios, rounds_within, run_interleaved, touch

# What others are compared with, where it is among the methods: key in the JSON file, method, heading.
REFERENCES = (("full", "full", "/ full"), ("lora_all", "lora-all", "/ LoRA all"), ("lora_qv", "lora-qv", "/ LoRA qv"))
MIB = 2**20


@dataclass(frozen=True)
class Counts:
    """The figures that do not vary from one step to the next.

    Attributes:
        saved_mib: The memory that the forward pass keeps for the backward pass.
        peak_mib: The most memory that is allocated at once, with the weights.
        weights_mib: The memory of parameters and buffers, and what the first step leaves behind.
        trained_mib: The trained part of the parameters. Its gradients are as large, and AdamW's state is twice as
            large.
        backward_gmacs: The multiply-adds of the backward pass, in 1e9.
    """

    saved_mib: float
    peak_mib: float
    weights_mib: float
    trained_mib: float
    backward_gmacs: float


class Step:
    """One method's training step on a fixed batch, run again and again."""

    def __init__(self, model: nn.Module, kind: Model, batch: Batch, bf16: bool):
        self.model, self.kind, self.batch, self.bf16 = model.train(), kind, batch, bf16
        self.device = batch["pixel_values"].device

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.kind.loss(self.model, self.batch)

    def timed(self) -> tuple[float, float]:
        """The seconds of the forward pass and of the backward pass."""
        touch(self.model)
        start = now()
        loss = self.forward()
        middle = now()
        loss.backward()
        end = now()
        self.model.zero_grad(set_to_none=True)
        return middle - start, end - middle

    def counted(self) -> Counts:
        """Run two steps, and count in the second one: the first may leave tables and converted weights behind."""
        with allocated(self.device) as first:
            with saved_activations(self.model) as saved:
                loss = self.forward()
            with multiply_adds() as backward:
                loss.backward()
            del loss
            self.model.zero_grad(set_to_none=True)
        with allocated(self.device) as second:
            self.timed()
        weights = _bytes([*self.model.parameters(), *self.model.buffers()]) - _offloaded(self.model) + first.left
        trained = _bytes([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        return Counts(saved.mib, (weights + second.peak) / MIB, weights / MIB, trained / MIB, backward.total / 1e9)

    def optimizer_seconds(self, rounds: int) -> list[float]:
        """The seconds of each step of AdamW on a batch's gradients. At a learning rate of 0, no weight changes."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.forward().backward()
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
        optimizer.step()  # makes its state
        seconds = []
        for _ in range(rounds):
            start = now()
            optimizer.step()
            seconds.append(now() - start)
        self.model.zero_grad(set_to_none=True)
        return seconds

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of all trained matrices, by name, with the same random numbers in each call."""
        torch.manual_seed(0)
        self.forward().backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None and p.dim() > 1}
        self.model.zero_grad(set_to_none=True)
        return found

    def cosine(self, method: str, others: dict[str, Step]) -> float | None:
        """The cosine of the angle between the gradients of all trained matrices and those of exact backpropagation.

        Args:
            method: The method of this step.
            others: The steps by method. The step of "lora-all" has the exact gradients for VeLoRA.

        Returns:
            None if there is nothing to compare with.
        """
        kinds = {word for word, _ in words(method)}
        if not kinds & {"lbp-wht", "velora"}:
            return 1.0
        if "velora" in kinds:
            return _cosine(self.gradients(), others["lora-all"].gradients()) if "lora-all" in others else None
        found = self.gradients()
        with exact_backward(self.model), torch.compiler.set_stance("force_eager"):
            return _cosine(found, self.gradients())


def _cosine(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    both = [(found[name], grad) for name, grad in exact.items() if name in found]
    product, square, expected = (
        sum(float((one * other).sum()) for one, other in pairs)
        for pairs in (both, [(one, one) for one, _ in both], [(other, other) for _, other in both])
    )
    return product / (square * expected) ** 0.5 if square and expected else float("nan")


def _bytes(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _offloaded(model: nn.Module) -> int:
    """Bytes of base weights that are offloaded."""
    offloaded = [m.get_base_layer().weight for m in model.modules() if getattr(m, "base_weight_is_offloaded", False)]
    return _bytes([weight for weight in offloaded if weight is not None])


def prepared(options: argparse.Namespace) -> dict[str, Step]:
    """The step of each method that is available; for each other method, a line says why it is not."""
    kind, device = MODELS[options.model], torch.device(options.device)
    torch.manual_seed(0)
    base = kind.build(options.image_size).to(device)
    batch = {name: tensor.to(device) for name, tensor in kind.batch(options.batch_size, options.image_size).items()}
    steps = {}
    for method in options.methods:
        torch.manual_seed(0)  # so that all adapters of a method start from the same weights
        try:
            model = adapted(base, method, list(kind.heads))
        except NotAvailable as why:
            print(f"left out {method}: {why}")
        else:
            steps[method] = Step(model, kind, batch, options.bf16)
    return steps


def warm_up(device: str) -> None:
    """Have a GPU's BLAS library allocate its workspace, so that this does not count for the first method."""
    x = torch.ones(64, 64, device=device, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        (x.to(dtype) @ x.to(dtype)).sum().backward()


def measured(steps: dict[str, Step], rounds: int, minutes: float) -> list[dict[str, Any]]:
    """A row for each method, see [`compared`]."""
    gc.freeze()  # searching the libraries' and models' many objects for garbage would take longer than small steps
    counts = {method: step.counted() for method, step in tqdm(steps.items(), desc="memory", leave=False)}
    taking_turns = tqdm(rounds_within(minutes, rounds), desc="rounds", total=rounds, leave=False)
    times = run_interleaved([step.timed for step in steps.values()], taking_turns, unmeasured=1)
    rows = [
        row(method, counts[method], step.cosine(method, steps), own, step.optimizer_seconds(len(own)))
        for (method, step), own in zip(steps.items(), times, strict=True)
    ]
    return compared(rows)


def row(
    method: str, counts: Counts, cosine: float | None, times: list[tuple[float, float]], optimizer: list[float]
) -> dict[str, Any]:
    """The figures of one method: counts, the times of all rounds, and their quartiles [first, median, third].

    Args:
        method: The method.
        counts: The figures that do not vary.
        cosine: See [`Step.cosine`].
        times: The seconds of the forward and the backward pass in each round.
        optimizer: The seconds of the optimiser's steps.
    """
    result: dict[str, Any] = {"method": method, **asdict(counts)}
    for name, seconds in zip(("forward", "backward"), zip(*times, strict=True), strict=True):
        result[f"{name}_ms"] = [1e3 * value for value in quartiles(seconds)]
    result["optimizer_ms"] = [1e3 * value for value in quartiles(optimizer)]
    result["cosine"] = cosine
    result["step_ms"] = [1e3 * value for value in quartiles([sum(pair) for pair in times])]
    result["rounds_ms"] = [[1e3 * value for value in pair] for pair in times]
    return result


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the ratios to the methods of `REFERENCES` that are among them."""
    by_method = {row["method"]: row for row in rows}
    for key, method, _ in REFERENCES:
        if (reference := by_method.get(method)) is None:
            continue
        for row in rows:
            own, other = ([sum(pair) for pair in one["rounds_ms"]] for one in (row, reference))
            row[f"step_over_{key}"] = quartiles(ratios(own, other))
            for memory in ("saved", "peak"):
                row[f"{memory}_over_{key}"] = row[f"{memory}_mib"] / reference[f"{memory}_mib"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    references = [(key, heading) for key, _, heading in REFERENCES if f"step_over_{key}" in rows[0]]
    headings = [heading for _, heading in references]
    header = ["method", "forward ms", "backward ms", "AdamW ms", "step ms", "(quartiles)", *headings, "cosine"]
    header += ["saved MiB", *headings, "peak MiB", *headings[:1], "backward G MACs"]
    lines = []
    for row in rows:
        low, middle, high = row["step_ms"]
        line = [row["method"], number(row["forward_ms"][1]), number(row["backward_ms"][1])]
        line += [number(row["optimizer_ms"][1]), number(middle)]
        line += [f"{low:.0f}-{high:.0f}", *(number(row[f"step_over_{key}"][1], 3) for key, _ in references)]
        line += ["" if row["cosine"] is None else number(row["cosine"], 3)]
        line += [number(row["saved_mib"], 1), *(number(row[f"saved_over_{key}"], 3) for key, _ in references)]
        line += [number(row["peak_mib"]), *(number(row[f"peak_over_{key}"], 3) for key, _ in references[:1])]
        lines.append([*line, number(row["backward_gmacs"], 1)])
    return aligned(header, lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit-b")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", default=default_methods(), help=f"or a set: {', '.join(SETS)}"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, nargs="+", help="side, or height and width (default: the model's)")
    parser.add_argument("--bf16", action="store_true", help="everything under bf16 autocast")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each method, after two to count memory")
    parser.add_argument("--minutes", type=float, default=60, help="for the rounds; what would end later is left out")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file, the figure beside it (default: in runs/benchmarks)")
    return parser


def completed(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, completed by those that depend on the model and the precision."""
    sides = options.image_size or MODELS[options.model].size
    if len(sides) > 2:
        parser.error("--image-size takes one side, or height and width")
    options.image_size = (sides[0], sides[-1])
    options.methods = expanded(options.methods)
    if options.output is None:
        precision = "bf16" if options.bf16 else "float32"
        options.output = Path("runs", "benchmarks", f"{options.model}-{precision}.json")
    return options


def check_methods(methods: list[str], parser: argparse.ArgumentParser) -> None:
    for method in methods:
        try:
            words(method)
        except ValueError as error:
            parser.error(str(error))


def main(arguments: list[str] | None = None) -> None:
    of_command_line = parser(__doc__)
    options = completed(of_command_line.parse_args(arguments), of_command_line)
    check_methods(options.methods, of_command_line)
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment()
    print(in_words(where), title(options), sep="\n")
    warm_up(options.device)
    steps = prepared(options)
    if not steps:
        raise SystemExit("None of the methods can be had.")
    report(measured(steps, options.rounds, options.minutes), where, options)


def title(options: argparse.Namespace) -> str:
    height, width = options.image_size
    precision = "bf16 autocast" if options.bf16 else "float32"
    return f"{options.model}, {height} x {width} px, batch {options.batch_size}, {precision}, {options.device}"


def report(rows: list[dict[str, Any]], where: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table, write the record, and draw the figure beside it."""
    print(table(rows))
    write_record(options.output, where, vars(options), rows=rows)
    print(f"written to {options.output}", end="")
    try:
        from benchmarks.figures import draw_steps
    except ImportError:
        print('; the figure needs matplotlib: pip install ".[examples]"')
    else:
        figure = options.output.with_suffix(".png")
        draw_steps(figure, rows, title(options))
        print(f" and {figure.name}")


if __name__ == "__main__":
    main()
