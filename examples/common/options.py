"""The options of an example: one dataclass, set by flags, by a YAML file (`--config`), or both; flags win."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


def option(default: Any, help: str) -> Any:
    """A dataclass field that the parser turns into a flag with this default and help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Options:
    """The options that all tasks share; each adds its own."""

    config: str | None = option(None, "YAML file of options, named as here; flags override it.")
    output: str = option("runs", "Folder for adapters, checkpoints, results and the plot.")

    # Methods
    methods: list[str] = option(
        ["full", "lora", "lora+lbp-wht", "lbp-wht", "lbp-wht-paper"],
        "What to compare: full, lora, lora+lbp-wht, lbp-wht, lbp-wht-paper. A method may carry options of its own: "
        "lbp-wht:r=3 or lora:lora_r=4,lora_learning_rate=2e-3.",
    )
    r: int = option(10, "LBP-WHT: Walsh-Hadamard bases per block.")
    grad_input: str = option(
        "auto",
        "LBP-WHT: `full` for exact input gradients, `int8` or `bf16` for rounded ones, `auto` for the fastest, or "
        "their rank. (lbp-wht-paper always takes r.)",
    )
    compress_activations: str = option("", "LBP-WHT: `int8` has activation functions and norms keep less.")
    block_size: int = option(8, "LBP-WHT: order of the transform, in patches.")
    selection: str = option("lp_l1", "LBP-WHT: which bases are kept, lp_l1 or lp_linf.")
    boundary: str = option("orthogonal", "LBP-WHT: grids that are no multiple of the block, orthogonal or reflect.")
    lora_r: int = option(8, "LoRA: rank.")
    lora_alpha: int = option(16, "LoRA: scale of the update, times its rank.")
    lora_target_modules: list[str] | None = option(None, "LoRA: what to adapt (default: all linear but the head).")
    head_modules: list[str] | None = option(None, "Modules trained in full (default: all outside the base model).")

    # Model and data
    model: str | None = option(None, "Checkpoint to adapt: hub id or local folder.")
    dataset: str | None = option(None, "Hub id or data folder, as `datasets` loads it.")
    dataset_config: str | None = option(None, "Configuration of the dataset, where it has several.")
    train_files: list[str] | None = option(None, "Parquet files to train on, in place of --dataset.")
    test_files: list[str] | None = option(None, "Parquet files to test on, with --train-files.")
    train_split: str = option("train", "Split to train on.")
    test_split: str | None = option(None, "Split to test on (default: test, else validation, else part of train).")
    held_out: float = option(0.2, "Part of the training split held out where there is nothing to test on.")
    image_column: str | None = option(None, "Column of images (default: the first of that kind).")
    test_images: int | None = option(None, "Test on the first so many images (default: all).")
    data_seed: int = option(0, "Chooses the images held out and those of the small-data protocol.")
    image_size: list[int] | None = option(
        None, "Input in pixels: the side of a square, or height and width (default: what the checkpoint says)."
    )
    horizontal_flip: bool = option(True, "Augmentation: mirror half of the training images.")
    min_crop: float = option(0.6, "Augmentation: smallest part of the area that a random crop keeps; 1 crops nothing.")
    workers: int = option(0, "Processes that load images.")

    # Training
    seeds: list[int] = option([0], "Seeds; several give mean and standard deviation.")
    epochs: int = option(8, "Passes over the training images.")
    batch_size: int = option(20, "Training images per process and step.")
    eval_batch_size: int = option(64, "Test images per process and step.")
    gradient_accumulation_steps: int = option(1, "Batches per update.")
    learning_rate: float = option(3e-5, "Peak learning rate of full fine-tuning and LBP-WHT.")
    lora_learning_rate: float = option(1e-3, "Peak learning rate of LoRA, whose factors need a larger one.")
    scheduler: str = option("cosine", "Learning-rate schedule, as `transformers.get_scheduler` names it.")
    warmup_ratio: float = option(0.1, "Part of the updates over which the learning rate rises to its peak.")
    warmup_steps: int | None = option(None, "The same in updates; overrides --warmup-ratio.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    max_grad_norm: float | None = option(None, "Clip the norm of the gradient at this value (default: no clipping).")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(None, "Default: what `accelerate launch` says.")
    metric: str | None = option(None, "A metric of `evaluate`, by hub id or folder (default: one that is built in).")
    metric_options: list[str] = option([], "Arguments of the metric, as in average=macro; values are YAML.")
    report_to: str | None = option(None, "Tracker known to accelerate: tensorboard, wandb, trackio, all...")
    checkpoint_every: int | None = option(None, "Updates between checkpoints (default: none are written).")
    resume: bool = option(False, "Go on from the checkpoints in --output; ends exactly as an unbroken run does.")
    timing_rounds: int = option(7, "Steps per method over which step times are compared.")

    # Which weights are kept
    keep_best: bool = option(
        False,
        "Keep the weights of the epoch that is best on validation images (default: those of the last epoch). They are "
        "the split `validation` where it is not tested on, else held out of the training images (--held_out).",
    )
    patience: int | None = option(None, "Stop after so many epochs without a better validation score (--keep_best).")
    validation_split: str | None = option(None, "Split for --keep_best and --patience.")
    ema_decay: float | None = option(
        None, "Keep, and test, a moving average of the weights over the updates with this decay, such as 0.99."
    )

    @property
    def embedded(self) -> bool:
        """Whether to run the example's own data, because no other is named."""
        return not (self.model or self.dataset or self.train_files)

    def with_overrides(self, text: str) -> Options:
        """These options with some replaced, as given by `text`: `r=3,learning_rate=1e-4`."""
        values = dict(part.split("=", 1) for part in text.split(",") if part)
        for name, value in values.items():
            current = getattr(self, name)
            if not isinstance(current, (int, float, str)):
                raise ValueError(f"a method cannot set {name!r} for itself")
            values[name] = type(current)(value)
        return dataclasses.replace(self, **values)


def _as_flags(path: Path) -> list[str]:
    """A YAML file as command-line flags, so that its names, types and choices are checked as those of flags are."""
    flags = []
    for name, value in (yaml.safe_load(path.read_text()) or {}).items():
        if value is not None and value != []:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def as_size(sides: int | list[int] | tuple[int, ...] | None) -> tuple[int, int] | None:
    """(height, width) of the side of a square or of two sides."""
    if sides is None:
        return None
    height, *rest = [sides] if isinstance(sides, int) else sides
    return height, rest[0] if rest else height


def parse(kind: type[Options], defaults: Path, description: str, arguments: list[str] | None = None) -> Options:
    """Read the options: flags, over `--config`, over the embedded example where no model or data is named.

    Args:
        kind: The task's dataclass of options.
        defaults: YAML file of the embedded example.
        description: Of the program.
        arguments: Flags; None takes those of the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(kind, description=description)

    def read(flags: list[str]) -> Options:
        return kind(**vars(parser.parse_args(flags)))

    options = read(arguments)
    if options.config:
        arguments = [*_as_flags(Path(options.config)), *arguments]
        options = read(arguments)
    if options.embedded:
        options = read([*_as_flags(defaults), *arguments])
    elif not options.model or bool(options.dataset) == bool(options.train_files):
        parser.error(
            "give --model together with either --dataset or --train-files (or none of them for the embedded example)"
        )
    if options.image_size and len(options.image_size) > 2:
        parser.error("--image_size takes one side or two, height and width")
    return options
