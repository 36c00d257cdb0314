"""Measures how close the gradients of LBP-WHT are to the exact ones, by the cosine between them, on real images.

    python examples/benchmarks/gradient_fidelity.py --model dinov2-small-saliency --train-files cifar100/train.parquet
    python examples/benchmarks/gradient_fidelity.py --model google/vit-base-patch16-224-in21k --dataset my_images/

For each setting, the table has the cosine of the gradients of all adapted weights together, and the lowest cosine of a
layer in the first, the middle and the last block. Settings are those of `LBPWHTConfig`, as in
`r=10,grad_input_dtype=int8`. Words of examples/benchmarks/methods.py may follow, as in `r=10+compile`. A related method
of examples/benchmarks/rivals is a setting too, as in `hosvd:energy=0.8`; it calibrates on the batch itself.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import send_to_device
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.classification import ClassificationOptions
from common.models import head_modules

from benchmarks.methods import WORDS, NotAvailable, applied, setting, words
from benchmarks.real_images import experiment_for, file_for_record
from benchmarks.rivals import RIVALS
from benchmarks.tables import aligned
from lbp_peft import LBPWHTConfig, LBPWHTLinear, exact_backward
from lbp_peft.encoder import encoder_linears
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.loading.classification import ClassificationData
from lbp_peft.loading.options import option, parse
from lbp_peft.loading.terminal import plain_messages

WORDS_OF_COMPRESSION = ("all", "activation", "norm", "attention", "projection")
SETTINGS = [
    *(f"r=10,grad_input_basis=adaptive,grad_input_rank={rank}" for rank in (8, 16, 24, 32)),
    *(f"r={r},grad_input_{more}"
    for r in (3, 10, 21)
    for more in (
        f"rank={r}", "dtype=full", "dtype=bf16", "dtype=int8", "dtype=int8,hadamard_size=16", "dtype=auto",
        *(f"dtype=full,compress_activations={word}" for word in WORDS_OF_COMPRESSION),
    )),
]  # fmt: skip


def gradients(model: nn.Module, batch: dict[str, Any], plain: list[str] | None = None) -> list[Tensor]:
    """The gradients of the adapted weights, in the order of the layers; or of the weights of these plain layers."""
    model.zero_grad()
    model(**batch).loss.backward()
    if plain is not None:
        return [model.get_submodule(name).weight.grad.clone() for name in plain]
    layers = [module for module in model.modules() if isinstance(module, LBPWHTLinear)]
    return [layer.lbpwht_weight["default"].grad.clone() for layer in layers]


def both_gradients(base: nn.Module, batch: dict[str, Any], text: str, heads: list[str]) -> tuple[list, list]:
    """The gradients that a setting gives the adapted weights, and the exact ones."""
    if is_rival(text):
        names = encoder_linears(base)
        exact = gradients(base.train(), batch, names)
        return gradients(applied(base, text, heads).train(), batch, names), exact
    settings, more = in_parts(text)
    model = get_peft_model(base, LBPWHTConfig(modules_to_save=heads, **settings)).train()
    for word in more:
        model = WORDS[word](model, [], {})
    found = gradients(model, batch)
    with exact_backward(model):
        return found, gradients(model, batch)


def is_rival(text: str) -> bool:
    return re.split("[:+]", text)[0] in RIVALS


def cosine(found: list[Tensor], exact: list[Tensor]) -> float:
    dot = sum((f * e).sum().item() for f, e in zip(found, exact, strict=True))
    lengths = [sum(g.square().sum().item() for g in gradients) ** 0.5 for gradients in (found, exact)]
    return dot / (lengths[0] * lengths[1])


def least(found: list[Tensor], exact: list[Tensor]) -> float:
    return min(cosine([f], [e]) for f, e in zip(found, exact, strict=True))


@dataclass
class OneBatch(ClassificationData):
    """The options for a batch of real images. Data is named as in the example programs; training images are drawn."""

    images: int = option(40, "How many images the batch has.")
    head_modules: list[str] | None = option(None, "Modules that hold the head. (default: all outside the base model)")
    image_size: list[int] | None = option([112], "Input in pixels: the side of a square, or height and width.")

    def for_experiment(self) -> ClassificationOptions:
        """The same model and data, in one batch without augmentation."""
        known = {field.name for field in dataclasses.fields(ClassificationOptions)} - {"output"}
        shared = {name: value for name, value in vars(self).items() if name in known}
        if not self.train_images_per_class:
            shared["train_images"] = min(self.train_images or self.images, self.images)
        shared["test_images"] = 1  # no image is used for testing
        return ClassificationOptions(**shared, batch_size=self.images, min_crop=1.0, horizontal_flip=False)


@dataclass
class FidelityOptions(OneBatch):
    """The options: the batch, and what is measured with it."""

    settings: list[str] = option(SETTINGS, "What to measure. (default: r of 3, 10 and 21 with every precision)")
    output: str = option("runs/benchmarks/fidelity.json", "File for the figures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.settings:
            words(text) if is_rival(text) else in_parts(text)


def in_parts(text: str) -> tuple[dict[str, Any], list[str]]:
    """ "r=10,grad_input_dtype=int8+compile" -> ({"r": 10, "grad_input_dtype": "int8"}, ["compile"])

    Raises:
        ValueError: it cannot be read, or `LBPWHTConfig` refuses it.
    """
    pairs, *more = text.split("+")
    if unknown := [word for word in more if word not in WORDS]:
        raise ValueError(f"--settings {text}: unknown word {unknown[0]!r}, choose from {', '.join(WORDS)}")
    try:
        settings = {key: setting(value) for key, value in (pair.split("=", 1) for pair in pairs.split(","))}
        LBPWHTConfig(**settings)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--settings {text}: settings are written as r=10,grad_input_dtype=int8 ({error})") from None
    return settings, more


def main(arguments: list[str] | None = None) -> None:
    given = parse(FidelityOptions, None, __doc__, arguments)
    file = file_for_record(given.output)
    experiment = experiment_for(given.for_experiment())
    device = experiment.accelerator.device
    batch = send_to_device(next(iter(experiment.loaders(seed=0)[0])), device)
    rows = []
    for text in tqdm(given.settings, leave=False):
        base = experiment.base(seed=0).to(device)
        blocks = base.config.num_hidden_layers
        try:
            found, exact = both_gradients(base, batch, text, head_modules(base, experiment.options))
        except NotAvailable as why:
            raise SystemExit(f"--settings {text}: {why}") from None
        each = len(exact) // blocks
        parts = [slice(block * each, (block + 1) * each) for block in (0, blocks // 2, blocks - 1)]
        rows.append([text, cosine(found, exact), *(least(found[part], exact[part]) for part in parts)])
    where = environment()
    print(in_words(where))
    lines = [[text, *(f"{value:.4f}" for value in values)] for text, *values in rows]
    print(aligned(["setting", "all layers", "first block", "middle", "last"], lines))
    write_record(file, where, vars(given), rows=rows)
    print(f"written to {file}")


if __name__ == "__main__":
    with plain_messages():
        main()
