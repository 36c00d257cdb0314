"""The options of an example: one dataclass, set by flags, by a YAML file (`--config`), or both; flags win."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from .terminal import in_one_line

# What a numeric option may be, of which lists are checked by element. None passes, where it is a default.
LIMITS: list[tuple[str, Callable[[float], bool], tuple[str, ...]]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "r", "grad_input_rank", "block_size", "lora_r", "lora_alpha", "epochs", "batch_size", "eval_batch_size",
            "gradient_accumulation_steps", "checkpoint_every", "timing_rounds", "test_images", "train_images",
            "train_images_per_class", "image_size", "images", "patience",
        ),
    ),
    ("at least 0", lambda value: value >= 0 and math.isfinite(value), ("workers", "warmup_steps", "weight_decay")),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("seeds", "data_seed")),
    (
        "a number above 0",
        lambda value: value > 0 and math.isfinite(value),
        ("learning_rate", "lora_learning_rate", "max_grad_norm"),
    ),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("held_out", "ema_decay")),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("min_crop", "grad_input_energy")),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("warmup_ratio", "mixup", "cutmix")),
    ("from 1 to 29", lambda value: 1 <= value <= 29, ("rand_augment",)),
]  # fmt: skip
# What a method may set for itself: all else is common to the methods that are compared.
OF_METHODS = (
    "r", "grad_input_rank", "grad_input_basis", "grad_input_energy", "grad_input_dtype", "compress_activations",
    "block_size", "selection", "boundary",
    "lora_r", "lora_alpha", "learning_rate", "lora_learning_rate",
)  # fmt: skip


def option(default: Any, help: str) -> Any:
    """A dataclass field that the parser turns into a flag with this default and help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class DataOptions:
    """Which model and which images: what every program asks that has to do with real images."""

    model: str | None = option(None, "Checkpoint to adapt: hub id or local folder. (default: none)")
    dataset: str | None = option(
        None,
        "Data folder or hub id, as `datasets` loads it. A path (with ./ in front, say) is never looked for on the "
        "hub. (default: none)",
    )
    dataset_config: str | None = option(None, "Configuration of the dataset, where it has several. (default: its own)")
    train_files: list[str] | None = option(None, "Parquet files to train on, in place of --dataset. (default: none)")
    test_files: list[str] | None = option(
        None, "Parquet files to test on, with --train_files. (default: part of those to train on)"
    )
    train_split: str = option("train", "Split to train on.")
    test_split: str | None = option(
        None, "Split to test on. (default: test, else validation, else a part of the training split)"
    )
    held_out: float = option(
        0.2, "Part of the training split held out where there is nothing to test on, of each class alike."
    )
    image_column: str | None = option(None, "Column of images. (default: the first of that kind)")
    test_images: int | None = option(
        None, "Test on so many images, drawn by --data_seed, of each class in proportion. (default: all)"
    )
    train_images: int | None = option(
        None, "Small-data protocol: train on so many images, drawn in the same way. (default: all)"
    )
    data_seed: int = option(0, "Chooses the images held out and those of the small-data protocol.")
    skip_broken: bool = option(False, "Leave out images that cannot be read, and say how many, instead of stopping.")
    image_size: list[int] | None = option(
        None, "Input in pixels: the side of a square, or height and width. (default: what the checkpoint says)"
    )

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: names the option as a flag.
        """
        for requirement, holds, names in LIMITS:
            for name in names:
                value = getattr(self, name, None)
                for each in value if isinstance(value, list) else [value]:
                    if each is not None and not holds(each):
                        raise ValueError(f"--{name} must be {requirement}, not {each}")
        if self.image_size and len(self.image_size) > 2:
            raise ValueError("--image_size takes one side or two, height and width")

    def check_together(self) -> None:
        """Refuse options that contradict each other; called where they have been read completely.

        Raises:
            ValueError: names the options as flags.
        """
        if self.test_files and not self.train_files:
            raise ValueError("--test_files needs --train_files beside it")
        if self.test_split and self.test_split == self.train_split and not self.test_files:
            raise ValueError(
                f"--test_split {self.test_split} would test on the training images: leave it out to hold some out"
            )

    @property
    def needs_validation(self) -> bool:
        """Whether something is chosen by the score on validation images."""
        return False


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
        "What to compare: full, lora, lora+lbp-wht, lbp-wht, lbp-wht-paper. A method may carry options of its own: "
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
        "", "LBP-WHT: `int8` has activation functions and norms keep less. (default: they keep all)"
    )
    block_size: int = option(8, "LBP-WHT: order of the transform, in patches.")
    selection: str = option("lp_l1", "LBP-WHT: which bases are kept, lp_l1 or lp_linf.")
    boundary: str = option("orthogonal", "LBP-WHT: grids that are no multiple of the block, orthogonal or reflect.")
    lora_r: int = option(8, "LoRA: rank.")
    lora_alpha: int = option(16, "LoRA: scale of the update, times its rank.")
    lora_target_modules: list[str] | None = option(None, "LoRA: what to adapt. (default: all linear but the head)")
    head_modules: list[str] | None = option(None, "Modules trained in full. (default: all outside the base model)")

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
    warmup_steps: int | None = option(None, "The same in updates; overrides it. (default: --warmup_ratio says)")
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

    @property
    def embedded(self) -> bool:
        """Whether to run the example's own data, because no other is named."""
        return not (self.model or self.dataset or self.train_files)

    @property
    def needs_validation(self) -> bool:
        return self.keep_best or self.patience is not None

    def with_overrides(self, text: str) -> Options:
        """These options with some replaced, as given by `text`: `r=3,learning_rate=1e-4`. `none` leaves a rank out.

        Raises:
            ValueError: an option is none that a method may set for itself, or its value makes no sense.
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
            raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of the two")
        if self.validation_split and not self.dataset:
            raise ValueError("--validation_split names a split of --dataset, which is not given")
        if self.validation_split and not self.needs_validation:
            raise ValueError("--validation_split is of use only with --keep_best or --patience")


class Parser(HfArgumentParser):
    """A parser of flags for a dataclass: no abbreviations, one default each in the help, mistakes as ValueError."""

    def __init__(self, kind: type[DataOptions], **settings: Any):
        super().__init__(kind, allow_abbrev=False, formatter_class=_HelpFormatter, **settings)
        self.kind = kind

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def options(self, flags: list[str]) -> Any:
        """The dataclass that the flags describe.

        Raises:
            ValueError: a flag is unknown, or its value is of another type or makes no sense.
        """
        values, unknown = self.parse_known_args(flags)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"unexpected argument {name!r}")
            self.error(f"unknown flag {name}{did_you_mean(name, self.names(), '--')}")
        return self.kind(**vars(values))

    def names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.kind)]

    def flags_of(self, path: Path) -> list[str]:
        """A YAML file as flags, so that its names, types and choices are checked as those of flags are.

        Raises:
            ValueError: names the file and the key.
        """
        flags = []
        for key, value in _mapping(path).items():
            name = str(key).replace("-", "_")
            if name not in self.names():
                raise ValueError(f"{path}: unknown option {key}{did_you_mean(name, self.names(), '')}")
            if name == "config" and value is not None:
                raise ValueError(f"{path}: config: a file of options cannot name another")
            if value is None or value == []:
                continue
            if any(
                isinstance(each, (dict, list)) or each is None
                for each in (value if isinstance(value, list) else [value])
            ):
                raise ValueError(
                    f"{path}: {key}: must be a plain value or a list of such, not {value!r} (text with a colon and a "
                    "space in it needs quotes)"
                )
            own = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
            try:
                self.options(own)
            except ValueError as error:
                message = str(error).split(": ", 1)[1] if str(error).startswith("argument ") else str(error)
                raise ValueError(f"{path}: {key}: {message}") from None
            flags += own
        return flags


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default to its help, unless the help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if "(default: " in text or not action.option_strings or isinstance(action, argparse._HelpAction):
            return text
        if isinstance(action, argparse._StoreFalseAction):
            return f"Set {action.dest} to false."
        default = action.default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})".replace("%", "%%")


def did_you_mean(name: str, known: list[str], prefix: str) -> str:
    """A question that names the most similar option, or where to look."""
    matches = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f": did you mean {prefix}{matches[0]}?" if matches else ": see --help"


def _mapping(path: Path) -> dict[Any, Any]:
    """What a YAML file of options holds."""
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or in_one_line(error)})"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options as `name: value`, one a line, not a {type(content).__name__}")
    return content


def as_size(sides: int | list[int] | tuple[int, ...] | None) -> tuple[int, int] | None:
    """(height, width) of the side of a square or of two sides."""
    if sides is None:
        return None
    height, *rest = [sides] if isinstance(sides, int) else sides
    return height, rest[0] if rest else height


def parse(kind: type[DataOptions], defaults: Path | None, description: str, arguments: list[str] | None = None) -> Any:
    """Read the options: flags, over `--config`, over the embedded example where no model or data is named.

    Args:
        kind: The dataclass of options.
        defaults: YAML file of the embedded example; None where there is none, so that model and data must be named.
        description: Of the program.
        arguments: Flags; None takes those of the command line.

    Raises:
        SystemExit: with code 2, after one line that says what is wrong, and with 0 after --help.
    """
    epilog = f"The embedded example has defaults of its own: {defaults.name}." if defaults else None
    parser = Parser(kind, description=description, epilog=epilog)
    try:
        return _read(parser, sys.argv[1:] if arguments is None else arguments, defaults)
    except ValueError as error:
        print(f"{parser.prog}: error: {in_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _read(parser: Parser, arguments: list[str], defaults: Path | None) -> Any:
    options = parser.options(arguments)
    if file := getattr(options, "config", None):
        arguments = [*parser.flags_of(Path(file)), *arguments]
        options = parser.options(arguments)
    options.check_together()
    if defaults and not (options.model or options.dataset or options.train_files):
        return parser.options([*parser.flags_of(defaults), *arguments])
    if not options.model or bool(options.dataset) == bool(options.train_files):
        otherwise = " (or none of them for the embedded example)" if defaults else ""
        parser.error(f"give --model together with either --dataset or --train_files{otherwise}")
    return options
