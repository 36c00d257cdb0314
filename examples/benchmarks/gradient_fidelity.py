"""How near the gradients of LBP-WHT are to the exact ones: the cosine between them, on one batch of real images.

    python examples/benchmarks/gradient_fidelity.py --model dinov2-small-saliency --train-files cifar100/train.parquet

For each setting: the cosine over the gradients of all adapted weights together, and those of the first, the middle and
the last block alone, the least of its layers. Settings are those of `LBPWHTConfig`, as in `r=10,grad_input=int8`; what
examples/benchmarks/methods.py does to a model may follow, as in `compress_activations=int8+norms-only`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.classification import Classification, ClassificationOptions
from common.experiment import Experiment
from common.models import head_modules

from benchmarks.environment import environment, in_words, write_record
from benchmarks.methods import WORDS
from benchmarks.tables import aligned
from lbp_peft import LBPWHTConfig, LBPWHTLinear, exact_backward

SETTINGS = [
    f"r={r},grad_input={grad_input}{more}"
    for r in (3, 10, 21)
    for grad_input, more in (
        (r, ""), ("full", ""), ("bf16", ""), ("int8", ""), ("int8", ",rotation=16"), ("auto", ""),
        *(("full", f",compress_activations=int8{only}") for only in ("", "+norms-only", "+functions-only")),
    )
]  # fmt: skip


def gradients(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Of each adapted weight, in the order of the layers."""
    model.zero_grad()
    model(**batch).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, LBPWHTLinear)]
    return [layer.lbpwht_weight["default"].grad.clone() for layer in layers]


def cosine(found: list[Tensor], exact: list[Tensor]) -> float:
    dot = sum((f * e).sum().item() for f, e in zip(found, exact, strict=True))
    lengths = [sum(g.square().sum().item() for g in gradients) ** 0.5 for gradients in (found, exact)]
    return dot / (lengths[0] * lengths[1])


def least(found: list[Tensor], exact: list[Tensor]) -> float:
    return min(cosine([f], [e]) for f, e in zip(found, exact, strict=True))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--train-files", nargs="+", required=True, help="Parquet files of labelled images")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks", "fidelity.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = Classification()
    options = ClassificationOptions(
        model=given.model,
        train_files=given.train_files,
        image_size=[given.image_size],
        batch_size=given.images,
        min_crop=1.0,
        horizontal_flip=False,
    )
    experiment = Experiment(task, options, Accelerator(), task.load(options))
    batch = next(iter(experiment.loaders(seed=0)[0]))
    rows = []
    for text in tqdm(given.settings, leave=False):
        pairs, *more = text.split("+")
        settings = {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in pairs.split(","))}
        base = experiment.base(seed=0)
        model = get_peft_model(base, LBPWHTConfig(modules_to_save=head_modules(base, options), **settings)).train()
        for word in more:
            model = WORDS[word](model, [], {})
        found = gradients(model, batch)
        with exact_backward(model):
            exact = gradients(model, batch)
        blocks = model.config.num_hidden_layers
        each = len(exact) // blocks
        parts = [slice(block * each, (block + 1) * each) for block in (0, blocks // 2, blocks - 1)]
        rows.append([text, cosine(found, exact), *(least(found[part], exact[part]) for part in parts)])
    where = environment()
    print(in_words(where))
    lines = [[text, *(f"{value:.4f}" for value in values)] for text, *values in rows]
    print(aligned(["setting", "all layers", "first block", "middle", "last"], lines))
    write_record(given.output, where, vars(given), rows=rows)
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
