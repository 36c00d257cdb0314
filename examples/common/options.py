"""The options that the example programs share, in addition to those of model and data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from lbp_peft.loading.options import DataOptions, Limits, option

# In addition to those of the data, see lbp_peft/loading/options.py.
OWN_LIMITS: Limits = [
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "r", "grad_input_rank", "block_size", "lora_r", "lora_alpha", "epochs", "eval_batch_size",
            "gradient_accumulation_steps", "checkpoint_every", "timing_rounds", "patience",
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0 and math.isfinite(value),
        ("workers", "warmup_steps", "exact_steps", "weight_decay"),
    ),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("seeds",)),
    (
        "a number above 0",
        lambda value: value > 0 and math.isfinite(value),
        ("learning_rate", "lora_learning_rate", "head_learning_rate", "max_grad_norm"),
    ),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("ema_decay",)),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("min_crop", "grad_input_energy")),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("warmup_ratio", "mixup", "cutmix")),
    ("from 1 to 29", lambda value: 1 <= value <= 29, ("rand_augment",)),
]  # fmt: skip
# The options that a method may set for itself. All others are common to the methods that are compared.
OF_METHODS = (
    "r", "grad_input_rank", "grad_input_basis", "grad_input_energy", "grad_input_dtype", "compress_activations",
    "base_weights", "block_size", "selection", "boundary",
    "lora_r", "lora_alpha", "learning_rate", "lora_learning_rate",
)  # fmt: skip


@dataclass
class Options(DataOptions):
    """The options that all tasks share; each adds its own."""

    config: str | None = option(None, "YAML file of options, named as here; flags override it. (default: none)")
    output: str | None = option(
        None,
        "Folder for adapters, checkpoints, results and the plot; if it holds a run, give --resume or --overwrite. "
        "(default: a new folder, runs/NAME, runs/NAME-2, ...; the last of them with --resume or --overwrite)",
    )
    overwrite: bool = option(False, "Replace the run that --output holds.")

    # Methods
    methods: list[str] = option(
        ["full", "lora", "lora+lbp-wht", "lbp-wht", "lbp-wht-paper"],
        "What to compare: full, lora, lora+lbp-wht, lbp-wht, lbp-wht-paper, or recommended, which is what "
        "`lbp-peft recommend` found (--recommendation). A method may carry options of its own: "
        "lbp-wht:r=3 or lora:lora_r=4,lora_learning_rate=2e-3.",
    )
    r: int = option(10, "LBP-WHT: Walsh-Hadamard bases per block.")
    grad_input_rank: int | None = option(
        None,
        "LBP-WHT: rank of low-rank input gradients; lbp-wht-paper always takes r. (default: they are not low-rank)",
    )
    grad_input_basis: str = option(
        "walsh", "LBP-WHT: basis of low-rank input gradients, `walsh` or, found for each image, `adaptive`."
    )
    grad_input_energy: float | None = option(
        None, "LBP-WHT: share of the gradient's energy that an adaptive basis keeps. (default: as much as it can)"
    )
    grad_input_dtype: str = option(
        "auto",
        "LBP-WHT: `full` for exact input gradients, `int8`, `bf16` or `fp8` for rounded ones, `auto` for the fastest.",
    )
    compress_activations: str = option(
        "", "LBP-WHT: what is saved in few bits: `all`, or words joined by a slash. (default: nothing)"
    )
    base_weights: str = option(
        "auto",
        "LBP-WHT: where base weights are offloaded while copies are trained: `disk`, `cpu`, `resident`, `dropped`.",
    )
    block_size: int = option(8, "LBP-WHT: order of the transform, in patches.")
    selection: str = option("lp_l1", "LBP-WHT: which bases are kept, lp_l1 or lp_linf.")
    boundary: str = option("orthogonal", "LBP-WHT: grids that are no multiple of the block, orthogonal or reflect.")
    lora_r: int = option(8, "LoRA: rank.")
    lora_alpha: int = option(16, "LoRA: scale of the update, times its rank.")
    lora_target_modules: list[str] | None = option(None, "LoRA: what to adapt. (default: all linear but the head)")
    head_modules: list[str] | None = option(None, "Modules trained in full. (default: all outside the base model)")
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, longer steps."
    )
    recommendation: str = option(
        "runs/recommendation/recommendation.json", "What --methods recommended takes: a file of `lbp-peft recommend`."
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
    head_learning_rate: float | None = option(
        None,
        "Peak learning rate of the head, if it is to differ from that of the other weights. (default: it does not)",
    )
    scheduler: str = option("cosine", "Learning-rate schedule, as `transformers.get_scheduler` names it.")
    warmup_ratio: float = option(0.1, "Part of the updates over which the learning rate rises to its peak.")
    warmup_steps: int | None = option(None, "The same in updates; overrides it. (default: --warmup_ratio says)")
    exact_steps: int = option(0, "LBP-WHT: updates at the start with exact backpropagation.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    max_grad_norm: float | None = option(None, "Clip the norm of the gradient at this value. (default: no clipping)")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "Precision of the forward pass. (default: what `accelerate launch` says, else no)"
    )
    metric: str | None = option(None, "A metric of `evaluate`, by hub id or folder. (default: one that is built in)")
    metric_options: list[str] = option(
        [], "Arguments of the metric, as in average=macro; values are YAML. (default: none)"
    )
    report_to: str | None = option(
        None, "Tracker known to accelerate: tensorboard, wandb, trackio, all... (default: none)"
    )
    checkpoint_every: int | None = option(None, "Updates between checkpoints. (default: none are written)")
    resume: bool = option(False, "Go on from the checkpoints in --output; ends exactly as an unbroken run does.")
    timing_rounds: int = option(7, "Steps per method over which step times are compared.")

    # Which weights are kept
    keep_best: bool = option(
        False,
        "Keep the weights of the epoch that is best on validation images. (default: those of the last epoch)",
    )
    patience: int | None = option(
        None,
        "Stop after so many epochs without a better validation score, and keep the best epoch. (default: never stop)",
    )
    validation_split: str | None = option(
        None,
        "Split for --keep_best and --patience. (default: validation where it is not tested on, else a part of the "
        "training images, --held_out)",
    )
    ema_decay: float | None = option(
        None,
        "Keep, and test, a moving average of the weights over the updates with this decay, such as 0.99. "
        "(default: no average)",
    )

    @classmethod
    def limits(cls) -> Limits:
        return [*super().limits(), *OWN_LIMITS]

    @property
    def embedded(self) -> bool:
        """Whether to use the example's own data, because no other data is named."""
        return not (self.model or self.dataset or self.train_files)

    @property
    def needs_validation(self) -> bool:
        return self.keep_best or self.patience is not None

    def with_overrides(self, text: str) -> Options:
        """These options with some replaced, as given by `text`: `r=3,learning_rate=1e-4`. `none` leaves a rank out.

        Raises:
            ValueError: a method may not set the option for itself, or its value makes no sense.
        """
        values, hints = {}, get_type_hints(type(self))
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            name = name.strip().replace("-", "_")
            if not equals or name not in OF_METHODS:
                raise ValueError(
                    f"cannot read {part!r}: a method takes NAME=VALUE with a name of {', '.join(OF_METHODS)}"
                )
            kind, *or_none = get_args(hints[name]) or [hints[name]]
            try:
                values[name] = None if or_none and value == "none" else kind(value)
            except ValueError:
                raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}") from None
        return dataclasses.replace(self, **values)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "methods"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} must differ from each other: {' '.join(map(str, values))}")
        for text in self.metric_options:
            if "=" not in text:
                raise ValueError(f"--metric_options must be NAME=VALUE, not {text!r}")

    def check_together(self) -> None:
        super().check_together()
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it: give one of the two")
        if self.validation_split and not self.dataset:
            raise ValueError("--validation_split names a split of --dataset, which is not given")
        if self.validation_split and not self.needs_validation:
            raise ValueError("--validation_split is of use only with --keep_best or --patience")
