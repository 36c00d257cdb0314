"""Show what the backward pass of each layer of a model would do, and how good its gradients are.

    lbp-peft report --model facebook/dinov2-base --random_images 224
    lbp-peft report --model my_model/ --dataset my_images/ --settings r=21 selection=lp_linf

It runs one batch, and prints a table of layers, the gradients that are furthest from the exact
ones, and what a training step costs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from textwrap import fill
from typing import Any

import torch
import yaml
from peft import get_peft_model

from ..head import head_modules
from ..loading.options import did_you_mean, option, parse
from ..loading.terminal import in_one_line
from ..measure import gradient_quality, step_cost
from ..measure.running import device_of
from ..tuner.config import LBPWHTConfig
from ..tuner.report import WIDTH, layout_report
from .inputs import InputOptions, load_inputs


@dataclass
class ReportOptions(InputOptions):
    config: str | None = option(None, "YAML file of options, named as here; flags override it. (default: none)")
    settings: list[str] = option(
        [], "Settings of LBPWHTConfig, as in r=21 compress_activations=all. (default: its own)"
    )
    verbose: bool = option(False, "One row for each layer, instead of one for each group of like layers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lbp_wht()

    def lbp_wht(self) -> dict[str, Any]:
        """The settings, checked.

        Raises:
            ValueError: they cannot be read, or `LBPWHTConfig` refuses them.
        """
        if wrong := [pair for pair in self.settings if "=" not in pair]:
            raise ValueError(f"--settings takes NAME=VALUE, as in r=21, got {' '.join(wrong)}")
        known = [field.name for field in fields(LBPWHTConfig)]
        for name in (pair.split("=", 1)[0] for pair in self.settings):
            if name not in known:
                question = did_you_mean(name, known, "", otherwise="docs/configuration.md lists all")
                raise ValueError(f"--settings: LBPWHTConfig has no setting {name}{question}")
        try:
            settings = {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in self.settings)}
            LBPWHTConfig(**settings)
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"--settings {' '.join(self.settings)}: {in_one_line(error)}") from None
        return settings


def main(arguments: Sequence[str]) -> None:
    options: ReportOptions = parse(ReportOptions, None, __doc__, list(arguments), prog="lbp-peft report")
    inputs = load_inputs(options)
    heads = head_modules(inputs.model)
    try:
        model = get_peft_model(inputs.model, LBPWHTConfig(modules_to_save=heads or None, **options.lbp_wht())).train()
        device = device_of(model)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.mixed_precision)
        batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.batches[0].items()}
        with warnings.catch_warnings(), torch.autocast(device.type, dtype) if dtype else nullcontext():
            warnings.simplefilter("ignore")  # the report says the same
            loss = inputs.loss_fn(model, batch) if inputs.loss_fn else model(**batch).loss
            report = layout_report(model)
            del loss
            quality = gradient_quality(model, batch, inputs.loss_fn)
            cost = step_cost(model, batch, inputs.loss_fn, steps=1)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"{options.model}: {in_one_line(error)}") from None
    print(report.as_text(verbose=options.verbose), quality, fill(str(cost), WIDTH), sep="\n\n")
