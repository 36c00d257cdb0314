"""What calibrated bases and ranks by a budget do for the gradients: their cosine with the exact ones, block by block.

    python examples/benchmarks/calibration.py --model dinov2-small-saliency --train-files cifar100/train.parquet
    python examples/benchmarks/calibration.py --model google/vit-base-patch16-224-in21k --dataset my_images/

The head is trained first, on frozen features, since the gradients of a random head say little. Then the bases are
calibrated on some batches, and the gradients of all adapted weights are compared on other batches, with exact input
gradients. A block's cosine is the mean over its layers and the batches. "lhe-x", "lhe-g", "klt-x" and "klt-g" weigh one
factor of the weight gradient alone, the inputs or the gradients of the outputs. Finally, ranks are allocated at the
memory that one rank for all layers takes, and compared with that rank.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.classification import ClassificationOptions
from common.models import head_modules

from benchmarks.real_images import experiment_for, file_for_record
from benchmarks.tables import aligned
from lbp_peft import Basis, LBPWHTConfig, LBPWHTLinear, allocate_ranks, calibrate, exact_backward
from lbp_peft.calibration import TokenStatistics
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.loading.classification import ClassificationData
from lbp_peft.loading.options import option, parse
from lbp_peft.loading.terminal import plain_messages
from lbp_peft.tuner.calibrate import collect

ALONE = {"x": "inputs", "g": "gradients"}


@dataclass
class CalibrationOptions(ClassificationData):
    """The options. Data is named as in the example programs; all images are drawn from the training images."""

    batch_size: int = option(32, "Images in a batch.")
    head_batches: int = option(12, "Batches that the head is trained on.")
    calibration_batches: int = option(4, "Batches that the bases are calibrated by.")
    test_batches: int = option(1, "Batches that the gradients are compared on.")
    ranks: list[int] = option([3, 4, 8, 10], "Ranks to compare the selections at.")
    budget: int = option(8, "Rank r: allocate ranks at the memory that r takes in all layers.")
    head_modules: list[str] | None = option(None, "Modules that hold the head. (default: all outside the base model)")
    image_size: list[int] | None = option([112], "Input in pixels: the side of a square, or height and width.")
    output: str = option("runs/benchmarks/calibration.json", "File for the figures.")

    def for_experiment(self) -> ClassificationOptions:
        """The same model and data, in batches without augmentation."""
        known = {field.name for field in dataclasses.fields(ClassificationOptions)} - {"output"}
        shared = {name: value for name, value in vars(self).items() if name in known}
        batches = self.head_batches + self.calibration_batches + self.test_batches
        shared |= {"train_images": batches * self.batch_size, "test_images": 1, "train_images_per_class": None}
        return ClassificationOptions(**shared, min_crop=1.0, horizontal_flip=False)


def train_head(model: nn.Module, names: list[str], batches: list[dict[str, Any]], steps: int = 300) -> float:
    """Train the head on what it receives from the frozen model, and return the last loss."""
    if len(names) != 1 or not isinstance(head := model.get_submodule(names[0]), nn.Linear):
        raise SystemExit(
            f"--head-modules: to be trained on frozen features, the head must be one linear layer: {names}"
        )
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    x, labels = torch.cat(features), torch.cat([batch["labels"] for batch in batches])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = F.cross_entropy(head(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


Gradients = dict[str, Tensor]


def gradients(model: nn.Module, batch: dict[str, Any]) -> Gradients:
    """The gradient of each adapted weight, by the name of its layer."""
    model.zero_grad()
    model.train()(**batch).loss.backward()
    return {layer.layer_name: layer.lbpwht_weight["default"].grad.clone() for layer in layers_of(model)}


def layers_of(model: nn.Module) -> list[LBPWHTLinear]:
    return [module for module in model.modules() if isinstance(module, LBPWHTLinear)]


def rules_of(model: nn.Module) -> dict[str, Any]:
    """The rule of each adapted layer, by name."""
    return {layer.layer_name: layer.lbpwht_rule["default"] for layer in layers_of(model)}


def set_bases(model: nn.Module, bases: dict[str, Basis]) -> None:
    """Give each layer a basis for its weight gradient."""
    for layer in layers_of(model):
        rule = layer.lbpwht_rule["default"]
        layer.lbpwht_rule["default"] = replace(rule, weight_basis=bases[layer.layer_name])


def by_one_factor(seen: TokenStatistics, factor: str) -> TokenStatistics:
    """The statistics, changed so that bases are chosen by one factor alone, "x" or "g"; "": unchanged."""
    if not factor:
        return seen
    own = getattr(seen, ALONE[factor])
    return TokenStatistics(own, own)


def by_block(values: list[tuple[str, float]]) -> list[float]:
    """The mean over each block. The number of a block is the first number in the names of its layers."""
    blocks: dict[int, list[float]] = {}
    for name, value in values:
        blocks.setdefault(int(re.findall(r"\.(\d+)\.", name)[0]), []).append(value)
    return [statistics.fmean(blocks[block]) for block in sorted(blocks)]


def main(arguments: list[str] | None = None) -> None:
    given = parse(CalibrationOptions, None, __doc__, arguments)
    file = file_for_record(given.output)
    experiment = experiment_for(given.for_experiment())
    device = experiment.accelerator.device
    loader = iter(experiment.loaders(seed=0)[0])
    batches = [
        [send_to_device(next(loader), device) for _ in range(number)]
        for number in (given.head_batches, given.calibration_batches, given.test_batches)
    ]
    for_head, for_calibration, for_test = batches
    base = experiment.base(seed=0).to(device)
    head = head_modules(base, experiment.options)
    print(f"head trained to a loss of {train_head(base, head, for_head):.3f}")

    def adapted(selection: str, r: int, **settings: Any) -> nn.Module:
        config = LBPWHTConfig(r=r, selection=selection, grad_input_dtype="full", modules_to_save=head, **settings)
        return get_peft_model(copy.deepcopy(base), config)

    model = adapted("lp_l1", 1)
    with exact_backward(model):
        exact = [gradients(model, batch) for batch in for_test]

    def compare(model: nn.Module) -> tuple[list[float], float]:
        """The cosine of each block, and the lowest cosine of any layer."""
        found = [gradients(model, batch) for batch in for_test]
        values = {
            name: statistics.fmean(
                F.cosine_similarity(one[name].flatten(), other[name].flatten(), dim=0).item()
                for one, other in zip(found, exact, strict=True)
            )
            for name in exact[0]
        }
        return by_block(list(values.items())), min(values.values())

    rows: list[list[Any]] = []
    for r in tqdm(given.ranks, leave=False):
        set_bases(model, {name: replace(rule.weight_basis, r=r) for name, rule in rules_of(model).items()})
        rows.append(["lp_l1", r, *compare(model)])
    most = max(given.ranks)
    for selection in ("lhe", "klt"):
        model = adapted(selection, most)
        rules = rules_of(model)
        wanted = {name: [rule.chosen_by] for name, rule in rules.items()}
        seen = collect(model, for_calibration, None, wanted).statistics
        for factor, r in tqdm([*(("", r) for r in given.ranks), *((factor, most) for factor in ALONE)], leave=False):
            bases = {
                name: replace(rule.chosen_by, r=r).choose(by_one_factor(seen[name, selection], factor))
                for name, rule in rules.items()
            }
            set_bases(model, bases)
            rows.append([f"{selection}-{factor}" if factor else selection, r, *compare(model)])
    allocated: list[list[Any]] = []
    for selection in ("lp_l1", "klt"):
        ranks = allocate_ranks(adapted(selection, given.budget), for_calibration, memory="1x")
        for pattern in ({}, ranks.rank_pattern):
            model = adapted(selection, given.budget, rank_pattern=pattern)
            if selection == "klt":
                calibrate(model, for_calibration)
            allocated.append([selection, given.budget, *compare(model), pattern])
    where = environment()
    print(in_words(where))
    header = ["selection", "r", *(str(block) for block in range(len(rows[0][2]))), "worst layer"]
    print(aligned(header, [[name, str(r), *_text([*blocks, worst])] for name, r, blocks, worst in rows]))
    print(f"ranks allocated at the memory of r={given.budget}:")
    lines = [
        [name, "by budget" if ranks else str(r), *_text([*blocks, worst])]
        for name, r, blocks, worst, ranks in allocated
    ]
    print(aligned(header, lines))
    write_record(file, where, vars(given), rows=rows, allocated=allocated)
    print(f"written to {file}")


def _text(values: list[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


if __name__ == "__main__":
    with plain_messages():
        main()
