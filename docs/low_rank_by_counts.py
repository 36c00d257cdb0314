"""Measure the column "by counts" of docs/models.md with the version that recognised a grid by its number of tokens.

    git worktree add /tmp/by-counts f1e1f4b    # the version of 2026-11-23
    PYTHONPATH=/tmp/by-counts python docs/low_rank_by_counts.py

By default it measures the vision-language and encoder-decoder models. For each model it writes the number of layers
that the default configuration of that version adapted, and the number of these that were low-rank on the right tokens:
whose weight gradient is the one computed from the plain model's inputs and gradients with bases of the true grid. In
these models the layers have to belong to the vision tower as well, since a language model is not to be trained unasked.
A model that raised an error has the error's name and text instead.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "examples" / "benchmarks" / "results" / "0.1.0" / "low_rank_by_counts.json"
sys.path += [str(ROOT / "tests" / "support")]

import architectures  # noqa: E402
import recorded  # noqa: E402
import timm_architectures  # noqa: E402
import vlm_architectures  # noqa: E402

import lbp_peft  # noqa: E402

PREFIX = "base_model.model."
# The models of each table, and what the keys of their figures begin with.
LISTS = {
    "vlm": (vlm_architectures.ARCHITECTURES, "vlm "),
    "transformers": (architectures.ARCHITECTURES, ""),
    "timm": (timm_architectures.ARCHITECTURES, "timm "),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*LISTS, []], help="which models to measure; vlm if left out")
    parser.add_argument("--check", action="store_true", help="compare with the kept figures, and write nothing")
    arguments = parser.parse_args()
    print(f"{lbp_peft.__file__}, transformers {transformers.__version__}, torch {torch.__version__}")
    figures = json.loads(FIGURES.read_text())
    for models in arguments.models or ["vlm"]:
        of, prefix = LISTS[models]
        for architecture in sorted(of, key=lambda architecture: architecture.name):
            key = f"{prefix}{architecture.name}"
            if hasattr(architecture, "why_not_here") and (why := architecture.why_not_here()):
                print(f"{key}: {why}")
                continue
            found = measured(architecture, vlm_architectures.TOWERS if models == "vlm" else {})
            differs = "" if figures.get(key) == found else f", not {figures.get(key)}"
            print(f"{key}: {found}{differs if arguments.check else ''}", flush=True)
            figures[key] = found
    if not arguments.check:
        FIGURES.write_text(json.dumps(dict(sorted(figures.items())), indent=1) + "\n")


def measured(architecture: Any, towers: dict[str, str]) -> list[int] | str:
    """The number of adapted layers and of those that are low-rank on the right tokens; or the error that was raised."""
    base, batch = architecture.build(), architecture.batch()
    try:
        model = get_peft_model(copy.deepcopy(base), lbp_peft.LBPWHTConfig(r=recorded.R)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded.loss(model, batch).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    layers = {m.layer_name: m for m in model.modules() if isinstance(m, lbp_peft.LBPWHTLayer)}
    report = lbp_peft.layout_report(model).layers
    in_tower = re.compile(towers.get(getattr(architecture, "model_type", ""), ""))
    low_rank = [name for name, ran in report.items() if ran is not None and not ran.why_exact and in_tower.match(name)]
    for name, parameter in base.named_parameters():  # the same ones, by which torch.matmul folds batches
        parameter.requires_grad_(name.rpartition(".")[0] in report)
    record = recorded.Record(base, low_rank)
    recorded.loss(base, batch).backward()
    expected = {name: record.weight_gradient(name, architecture) for name in low_rank if record.gradients[name]}
    scale = max((float(e.norm()) for e in expected.values()), default=0.0)
    num_right = 0
    for name in low_rank:
        if name in expected:
            e, found = expected[name], layers[name].lbpwht_weight["default"].grad.flatten(1).double()
            num_right += bool((found - e).norm() < 1e-3 * (e.norm() + 1e-2 * scale))
        else:  # its output is not used: by the layout that it would have had
            x = record.inputs[name][-1]
            num_right += is_layout(report[name], recorded.layout_of(architecture, name, record.layers[name], x))
    return [len(report), num_right]


def is_layout(ran: Any, expected: Any) -> bool:
    """Whether a backward pass ran on this grid, whose tokens come row by row after those before it."""
    if not isinstance(expected, tuple):
        return False
    height, width, before, after = recorded.sides_and_others(expected)
    found = (*ran.layout.grid, ran.layout.num_prefix_tokens, ran.num_tokens)
    return found == (height, width, before, before + height * width + after)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
