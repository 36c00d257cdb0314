"""Measure ways to train a model on your images and this machine, and recommend one within your budget.

    lbp-peft recommend --model facebook/dinov2-base --dataset my_images/ --memory 6GiB
    lbp-peft recommend --model facebook/dinov2-base --random_images 224 --step_time 0.8x

It prints a table, the recommended setting and why, and the configuration as Python. It writes the
same as JSON, as YAML, which the example programs read (--config), and a figure. How it chooses:
docs/choosing-settings.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..loading.classification import ClassificationData
from ..loading.options import option, parse
from ..loading.segmentation import SegmentationData
from ..loading.terminal import in_one_line
from ..recommendation import Bounds, BudgetError, Recommendation, recommend
from .inputs import InputOptions, Inputs, load_inputs


@dataclass
class RecommendOptions(InputOptions):
    config: str | None = option(None, "YAML file of options, named as here; flags override it. (default: none)")
    memory: str | None = option(
        None, "Bound of the peak memory, such as 6GiB, or 0.6x of full fine-tuning's. (default: none)"
    )
    step_time: str | None = option(
        None, "Bound of the step time, such as 0.8x of full fine-tuning's, or 900ms. (default: none)"
    )
    min_cosine: float | None = option(None, "Bound of the cosine of the gradients with the exact ones. (default: 0.85)")
    lora: bool = option(False, "Recommend a setting that trains LoRA's factors, and not whole weights.")
    compile: bool = option(False, "Try torch.compile too.")
    minutes: float = option(2.5, "How long it may measure.")
    head_modules: list[str] | None = option(None, "Modules trained in full. (default: all outside the base model)")
    output: str = option("runs/recommendation", "Folder for recommendation.json, .yaml and .png.")

    def __post_init__(self) -> None:
        super().__post_init__()
        Bounds.parse(self.memory, self.step_time, self.min_cosine)
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, not {self.minutes}")


_DEFAULTS = RecommendOptions()


def main(arguments: Sequence[str]) -> None:
    options: RecommendOptions = parse(RecommendOptions, None, __doc__, list(arguments), prog="lbp-peft recommend")
    folder = Path(options.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    inputs = load_inputs(options)
    try:
        recommendation = recommend(
            inputs.model,
            inputs.batches,
            memory=options.memory,
            step_time=options.step_time,
            min_cosine=options.min_cosine,
            lora=options.lora,
            mixed_precision=None if options.mixed_precision == "no" else options.mixed_precision,
            minutes=options.minutes,
            loss_fn=inputs.loss_fn,
            modules_to_save=options.head_modules,
            compile=options.compile,
            progress=True,
        )
    except BudgetError as error:
        print(error.table)
        raise SystemExit(in_one_line(error)) from None
    except ValueError as error:
        raise SystemExit(f"{options.model}: {in_one_line(error)}") from None
    if made_up := [name for name in ("weights", "images") if getattr(options, f"random_{name}")]:
        recommendation.notes.append(
            f"The {' and the '.join(made_up)} are random, so the cosines say little about yours."
        )
    print(recommendation)
    written = write(recommendation, options, inputs, folder)
    print(f"\nMeasured in {recommendation.seconds:.0f} s. Written to {folder}: {', '.join(written)}.")


def write(recommendation: Recommendation, options: RecommendOptions, inputs: Inputs, folder: Path) -> list[str]:
    """Write the JSON, the YAML and the figure; return their names, or in place of the figure what it needs."""
    recommendation.to_json(folder / "recommendation.json")
    data_fields = fields(SegmentationData if inputs.task == "segmentation" else ClassificationData)
    data_settings: dict[str, object] = {field.name: getattr(options, field.name) for field in data_fields}
    settings = {name: value for name, value in data_settings.items() if value != getattr(_DEFAULTS, name)}
    settings |= {"image_size": list(inputs.size), "batch_size": options.batch_size}
    if options.head_modules is not None:
        settings["head_modules"] = options.head_modules
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    text = "\n".join(
        [f"# {line}" for line in (f"Recommended by lbp-peft: {recommendation.chosen.label}",)]
        + lines
        + [recommendation.yaml]
    )
    (folder / "recommendation.yaml").write_text(text + "\n", encoding="utf-8")
    try:
        recommendation.plot(folder / "recommendation.png")
    except ImportError as error:
        return ["recommendation.json", f"recommendation.yaml ({error})"]
    return ["recommendation.json", "recommendation.yaml", "recommendation.png"]
