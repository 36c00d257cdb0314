"""The options of a program: a dataclass that is set by flags, by a YAML file (`--config`), or both; flags win."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from .terminal import in_one_line

# The allowed values of a numeric option. Elements of lists are checked one by one. None is allowed as a default.
Limits = list[tuple[str, Callable[[float], bool], tuple[str, ...]]]
LIMITS: Limits = [
    (
        "at least 1",
        lambda value: value >= 1,
        ("batch_size", "test_images", "train_images", "train_images_per_class", "image_size", "images"),
    ),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("data_seed",)),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("held_out",)),
]


def option(default: Any, help: str) -> Any:
    """A dataclass field that the parser turns into a flag with this default and help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class DataOptions:
    """The options for the model and the images of a program."""

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
        None, "Test on this many images, drawn by --data_seed, of each class in proportion. (default: all)"
    )
    train_images: int | None = option(
        None, "Small-data protocol: train on this many images, drawn in the same way. (default: all)"
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
        for requirement, holds, names in self.limits():
            for name in names:
                value = getattr(self, name, None)
                for each in value if isinstance(value, list) else [value]:
                    if each is not None and not holds(each):
                        raise ValueError(f"--{name} must be {requirement}, not {each}")
        if self.image_size and len(self.image_size) > 2:
            raise ValueError("--image_size takes one side or two, height and width")

    @classmethod
    def limits(cls) -> Limits:
        """The allowed values of numeric options."""
        return LIMITS

    def check_together(self) -> None:
        """Refuse options that contradict each other. It is called when all of them have been read.

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
    def names_inputs(self) -> bool:
        """Whether a model and data are named."""
        return bool(self.model) and bool(self.dataset) != bool(self.train_files)

    @property
    def needs_test(self) -> bool:
        """Whether something is tested, so that images are held out where there are none to test on."""
        return True

    @property
    def needs_validation(self) -> bool:
        """Whether something is chosen by the score on validation images."""
        return False


class Parser(HfArgumentParser):
    """A parser of flags for a dataclass, without abbreviations, that raises ValueError on mistakes."""

    def __init__(self, options_class: Any, **settings: Any):
        super().__init__(
            options_class, usage="%(prog)s [options]", allow_abbrev=False, formatter_class=_HelpFormatter, **settings
        )
        self.options_class = options_class

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
        return self.options_class(**vars(values))

    def names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.options_class)]

    def flags_of(self, path: Path) -> list[str]:
        """The contents of a YAML file as flags, so that names, types and choices are checked in the same way.

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
            flags_of_option = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
            try:
                self.options(flags_of_option)
            except ValueError as error:
                message = str(error).split(": ", 1)[1] if str(error).startswith("argument ") else str(error)
                raise ValueError(f"{path}: {key}: {message}") from None
            flags += flags_of_option
        return flags


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default to its help, unless the help says it in words, and shows one spelling of each flag."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or isinstance(action, argparse._HelpAction):
            return super()._format_action_invocation(action)
        flag = copy.copy(action)
        flag.option_strings = action.option_strings[:1]  # the second has dashes in place of underscores
        return super()._format_action_invocation(flag)

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


def did_you_mean(name: str, known: list[str], prefix: str, otherwise: str = "see --help") -> str:
    """A question that names the most similar option, or where to look."""
    matches = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f": did you mean {prefix}{matches[0]}?" if matches else f": {otherwise}"


def _mapping(path: Path) -> dict[Any, Any]:
    """The contents of a YAML file of options."""
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


def parse(
    options_class: type[DataOptions],
    defaults: Path | None,
    description: str,
    arguments: list[str] | None = None,
    prog: str | None = None,
) -> Any:
    """Read the options: flags, over `--config`, over the embedded example where no model or data is named.

    Args:
        options_class: The dataclass of options.
        defaults: The YAML file of the embedded example; None: there is none, so model and data have to be named.
        description: The description of the program.
        arguments: The flags; None: those of the command line.
        prog: The program's name; None: that of its file.

    Raises:
        SystemExit: with code 2, after one line that says what is wrong, and with 0 after --help.
    """
    epilog = "Flags may be written with dashes in place of underscores."
    if defaults:
        epilog += f" The embedded example has defaults of its own: {defaults.name}."
    parser = Parser(options_class, description=description, epilog=epilog, prog=prog)
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
    if not options.names_inputs:
        otherwise = " (or none of them for the embedded example)" if defaults else ""
        parser.error(f"give --model together with either --dataset or --train_files{otherwise}")
    return options
