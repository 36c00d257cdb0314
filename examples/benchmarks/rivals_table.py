"""Compares LBP-WHT with related methods: gradients, memory, work and time on the same layers of the same models.

    python examples/benchmarks/rivals_table.py fidelity --model MODEL --train-files cifar100/train.parquet
    python examples/benchmarks/rivals_table.py costs --train-files cifar100/train.parquet
    python examples/benchmarks/rivals_table.py table

The first two commands write the records `rivals-fidelity.json` and `rivals-costs.json`. `table` prints all records
whose names begin like these, as the table of docs/relatives.md. The related methods are in examples/benchmarks/rivals.
Each of them trains all weights.

`fidelity` measures cosines with the exact gradients, for a pretrained model with a new head and a batch of real images.
Bases and scales that a method calibrates come from another batch. "dW" is the gradient of the weights of all linear
layers of the encoder, and "dx" the gradient that arrives before the first block. "One block" is the middle block: each
of its linear layers gets the exact x and g, so that no error comes from other layers, and the mean over the layers is
shown.

`costs` measures the saved activations of the forward pass, the multiply-adds of the matrix products of both passes, and
the time of steps, in which the methods take turns after calibration. Weights are random. Images should be real ones,
since the ranks of some methods depend on the data. Decompositions (those of HOSVD in every step) do not count as
multiply-adds, but their time counts.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gradient_fidelity import FidelityOptions, cosine
from benchmarks.methods import applied, words
from benchmarks.models import MODELS
from benchmarks.real_images import experiment_for
from benchmarks.tables import aligned
from benchmarks.training_step import Step, prepared
from lbp_peft.encoder import encoder_linears
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.loading.terminal import plain_messages
from lbp_peft.measure import multiply_adds, saved_activations
from lbp_peft.measure.timing import quartiles, ratios, rounds_within, run_interleaved

RECORDS = Path("examples", "benchmarks", "results", "0.1.0")


@dataclasses.dataclass(frozen=True)
class Row:
    """A method in the table: the name that is shown, its words for methods.py, and what its paper claims."""

    name: str
    method: str
    claim: str


ROWS = (
    Row("exact backpropagation", "full", ""),
    Row(
        "LBP-WHT, paper's setting, r=10",
        "lbp-wht:r=10,grad_input_rank=10",
        "10.4 points above the best baseline at 9 MFLOPs less (EfficientFormer-L1, CIFAR-100)",
    ),
    Row("LBP-WHT, r=10, exact dx", "lbp-wht:r=10,grad_input_dtype=full", ""),
    Row("the same, activations compressed", "lbp-wht:r=10,grad_input_dtype=full,compress_activations=all", ""),
    Row("gradient filtering, 2 x 2", "gradient-filter", "up to 19x faster, 77.1 % less memory, 0.1 % accuracy lost"),
    Row("HOSVD, 90 % of the energy", "hosvd", "a better trade of accuracy for memory than earlier methods"),
    Row("HLQ, 4 bits", "hlq", "up to 2.5x faster backward pass, 78.5 % less memory"),
    Row("HLQ, 8 bits", "hlq:bits=8", ""),
    Row("HLQ, [CLS] apart (our addition)", "hlq:prefix=1", ""),
    Row("HOT, 4 bits", "hot", "up to 2.6x faster, 75 % less memory"),
    Row("INSTANT, 95 % of the energy", "instant", "15x less computation, 32x less activation memory, about 1 % lost"),
    Row("LowMemoryBP", "lowmemory-bp", "up to about 30 % less peak memory, no slower"),
)  # fmt: skip


# Fidelity


def with_heads(model: nn.Module, method: str) -> nn.Module:
    return applied(copy.deepcopy(model), method, ["classifier"]).train()


def part_named(model: nn.Module, name: str) -> nn.Module:
    """A module by its name in the base model, which may be wrapped."""
    return next(module for own, module in model.named_modules() if own == name or own.endswith(f".{name}"))


def trained_weight(layer: nn.Module) -> Tensor:
    return layer.lbpwht_weight["default"] if hasattr(layer, "lbpwht_weight") else layer.weight


@contextmanager
def first_input(block: nn.Module) -> Iterator[list[Tensor]]:
    """Yields the block's input, detached from what came before. It has a gradient after the backward pass."""
    found: list[Tensor] = []

    def cut(_: nn.Module, args: tuple) -> tuple:
        found.append(args[0].detach().requires_grad_())
        return (found[0], *args[1:])

    hook = block.register_forward_pre_hook(cut)
    try:
        yield found
    finally:
        hook.remove()


def gradients(
    model: nn.Module, batch: dict[str, Tensor], linears: list[str], block: str
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the linear layers' weights, and of the input of the first block."""
    model.zero_grad()
    with first_input(part_named(model, block)) as inputs:
        model(**batch).loss.backward()
    assert inputs[0].grad is not None
    return [trained_weight(part_named(model, name)).grad.clone() for name in linears], inputs[0].grad


@contextmanager
def inputs_and_outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yields the inputs and outputs of the layers with these names in forward passes within the block."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = x, y

    hooks = [
        part_named(model, name).register_forward_hook(lambda _, args, y, name=name: note(name, args[0], y))
        for name in names
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def output_gradients(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The gradient g of the output of each of the layers with these names."""
    with inputs_and_outputs(model, names) as found:
        loss = model(**batch).loss
    return dict(zip(names, torch.autograd.grad(loss, [found[name][1] for name in names]), strict=True))


def of_single_layers(
    model: nn.Module, batch: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """The cosines of dW and dx with the exact ones, for each layer by itself: every layer is given the exact g."""
    with inputs_and_outputs(model, list(exact)) as found:
        loss = model(**batch).loss  # a reference to the loss keeps the graph alive
    result = {}
    for name, g in exact.items():
        (x, y), weight = found[name], trained_weight(part_named(model, name))
        dw, dx = torch.autograd.grad(y, [weight, x], g, retain_graph=True)
        with torch.no_grad():
            exact_dw, exact_dx = g.flatten(0, -2).T @ x.flatten(0, -2), g @ weight
        result[name] = cosine([dw], [exact_dw]), cosine([dx], [exact_dx])
    del loss
    return result


def batches(given: FidelityOptions) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model with a new head, a batch for calibration and a batch for the measurement."""
    options = dataclasses.replace(given.for_experiment(), train_images=2 * given.images)
    experiment = experiment_for(options, cpu=True)
    calibration, batch, *_ = experiment.loaders(seed=0)[0]
    return experiment.base(seed=0), calibration, batch


def measured_fidelity(
    base: nn.Module, calibration: dict[str, Tensor], batch: dict[str, Tensor], rows: tuple[Row, ...]
) -> list[dict[str, Any]]:
    """For each method, the cosines that the table shows, and those of dW and dx in each layer of the middle block."""
    base.train()
    linears = encoder_linears(base)
    blocks = list(dict.fromkeys(re.match(r".*?\.\d+(?=\.)", name).group() for name in linears))
    middle = [name for name in linears if name.startswith(f"{blocks[len(blocks) // 2]}.")]
    exact = gradients(base, batch, linears, blocks[0])
    of_outputs = output_gradients(base, batch, middle)
    results = []
    for row in tqdm(rows, leave=False):
        torch.manual_seed(0)
        model = with_heads(base, row.method)
        gradients(model, calibration, linears, blocks[0])
        found = gradients(model, batch, linears, blocks[0])
        layers = of_single_layers(model, batch, of_outputs)
        dw, dx = zip(*layers.values(), strict=True)
        results.append({
            "method": row.method,
            "dw": cosine(found[0], exact[0]),
            "dx": cosine([found[1]], [exact[1]]),
            "block_dw": sum(dw) / len(dw),
            "block_dx": sum(dx) / len(dx),
            "layers": layers,
        })  # fmt: skip
    return results


# Costs


def counted(step: Step) -> dict[str, float]:
    step.timed()  # the first step calibrates, and finds the positions of the tokens
    with saved_activations(step.model) as saved, multiply_adds() as forward:
        loss = step.forward()
    with multiply_adds() as backward:
        loss.backward()
    step.model.zero_grad(set_to_none=True)
    return {"saved_mib": saved.mib, "forward_gmacs": forward.total / 1e9, "backward_gmacs": backward.total / 1e9}


def costs(steps: dict[str, Step], rounds: int, minutes: float) -> list[dict[str, Any]]:
    counts = {method: counted(step) for method, step in tqdm(steps.items(), desc="counts", leave=False)}
    taking_turns = tqdm(rounds_within(minutes, rounds), desc="rounds", total=rounds, leave=False)
    all_times = run_interleaved([step.timed for step in steps.values()], taking_turns, unmeasured=1)
    times = dict(zip(steps, all_times, strict=True))
    wholes = {method: [sum(pair) for pair in own] for method, own in times.items()}
    return [
        {
            "method": method,
            **counts[method],
            "step_ms": [1e3 * value for value in quartiles(wholes[method])],
            "step_over_full": quartiles(ratios(wholes[method], wholes["full"])),
            "rounds_ms": [[1e3 * value for value in pair] for pair in own],
        }
        for method, own in times.items()
    ]


def images_from(files: list[str], count: int, size: tuple[int, int]) -> Tensor:
    """The first images of Parquet files, with values from -1 to 1."""
    rows = Dataset.from_parquet(files).select(range(count))
    images = [np.array(row["image"].convert("RGB").resize(size[::-1])) for row in rows]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 127.5 - 1


# The table


KINDS = ("fidelity", "costs")


def records_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each kind."""
    return {
        kind: [json.loads(file.read_text()) for file in sorted(folder.glob(f"rivals-{kind}*.json"))] for kind in KINDS
    }


def markdown_table(folder: Path) -> str:
    """The records as a table in Markdown."""
    records = records_in(folder)
    by_method = {
        kind: {row["method"]: row for record in some for row in record["rows"]} for kind, some in records.items()
    }
    full = by_method["costs"]["full"]
    header = [
        "Method", "dW", "dx", "one block: dW", "dx", "saved, MiB", "of exact", "forward G MACs", "backward G MACs",
        "step, ms", "of exact", "Its paper's claim",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 2) + " --- |"]
    for row in ROWS:
        near, cost = (by_method[kind].get(row.method) for kind in KINDS)
        cells = [row.name]
        cells += [f"{near[key]:.3f}" for key in ("dw", "dx", "block_dw", "block_dx")] if near else ["-"] * 4
        if cost:
            cells += [f"{cost['saved_mib']:.0f}", f"{cost['saved_mib'] / full['saved_mib']:.2f}"]
            cells += [f"{cost[key]:.1f}" for key in ("forward_gmacs", "backward_gmacs")]
            cells += [f"{cost['step_ms'][1]:.0f}", f"{cost['step_over_full'][1]:.2f}"]
        else:
            cells += ["-"] * 6
        lines.append("| " + " | ".join([*cells, row.claim]) + " |")
    return "\n".join(lines)


def table(folder: Path) -> str:
    """The table, and for each record a line with the machine and the versions."""
    records = records_in(folder)
    machines = [f"{kind}: {in_words(record['environment'])}" for kind in KINDS for record in records[kind]]
    return "\n".join([markdown_table(folder), "", *machines])


def chosen(methods: list[str] | None) -> tuple[Row, ...]:
    known = {row.method: row for row in ROWS}
    return ROWS if methods is None else tuple(known.get(method, Row(method, method, "")) for method in methods)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("fidelity", "costs", "table"))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="(default: those of the table)")
    parser.add_argument("--model", help="fidelity: an image classifier or its folder; else a name (default: vit-b)")
    parser.add_argument("--train-files", nargs="+", help="Parquet files of labelled images")
    parser.add_argument("--images", type=int, default=40, help="fidelity: in each of the two batches")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: 112 for fidelity, else the model's)")
    parser.add_argument("--batch-size", type=int, default=4, help="of costs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=6, help="for the rounds; what would end later is left out")
    parser.add_argument("--output", type=Path, default=RECORDS, help="folder of the records")
    options = parser.parse_args(arguments)
    for row in chosen(options.methods):
        try:
            words(row.method)
        except ValueError as error:
            parser.error(str(error))
    if options.part == "fidelity" and not (options.model and options.train_files):
        parser.error("fidelity needs --model and --train-files")
    if options.part == "costs" and options.model not in (None, *MODELS):
        parser.error(f"--model {options.model}: choose from {', '.join(MODELS)}")
    if options.part == "costs" and "full" not in [row.method for row in chosen(options.methods)]:
        parser.error("costs are set against those of full: name it among --methods")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.part == "table":
        print(table(options.output))
        return
    where = environment()
    print(in_words(where))
    rows = chosen(options.methods)
    if options.part == "fidelity":
        given = FidelityOptions(
            model=options.model, train_files=options.train_files, images=options.images,
            image_size=[options.image_size or 112],
        )  # fmt: skip
        results = measured_fidelity(*batches(given), rows)
        keys = ["dw", "dx", "block_dw", "block_dx"]
    else:
        options.model = options.model or "vit-b"
        side = options.image_size
        options.image_size = (side, side) if side else MODELS[options.model].size
        options.device, options.bf16, options.methods = "cpu", False, [row.method for row in rows]
        steps = prepared(options)
        if options.train_files:
            images = images_from(options.train_files, options.batch_size, options.image_size)
            for step in steps.values():
                step.batch["pixel_values"] = images
        results = costs(steps, options.rounds, options.minutes)
        keys = ["saved_mib", "forward_gmacs", "backward_gmacs", "step_ms", "step_over_full"]
    shown = [[row["method"], *(f"{_middle(row[key]):.4g}" for key in keys)] for row in results]
    print(aligned(["method", *keys], shown))
    file = options.output / f"rivals-{options.part}.json"
    write_record(file, where, vars(options), rows=results)
    print(f"written to {file}")


def _middle(value: Any) -> float:
    return value if isinstance(value, float) else value[1]


if __name__ == "__main__":
    with plain_messages():
        main()
