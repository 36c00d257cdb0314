"""Chooses the output folder, and saves results elsewhere if they cannot be written to it."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lbp_peft.loading.terminal import cause_of

from .options import Options
from .task import Task

FAILED_WRITE = re.compile("no space left|i/o error|write failed|failed writing|read-only file system", re.IGNORECASE)
OPTIONS = "options.yaml"  # the options of the run in the folder; without other files, nothing was trained


def default_output(task: Task, options: Options) -> Path:
    """The folder for results if the options name none; the embedded example has one for its data."""
    return Path("runs", task.defaults.stem if options.embedded else task.folder)


def output_folder(options: Options, default: Path) -> Path:
    """The folder for the results. It is not made here.

    Args:
        default: The folder if the options name none. If it holds a run, `default`-2, `default`-3, ... are tried, and
            the first free one is taken; to resume or overwrite a run, the last one that holds a run is taken.

    Raises:
        SystemExit: the folder holds a run, and the options do not say what should become of it; or it is a file.
    """
    if options.output:
        path = Path(options.output).expanduser()
        for place in (path, *path.parents):
            if place.exists() and not place.is_dir():
                raise SystemExit(f"--output {path}: {place} is a file, not a folder")
        if holds_run(path) and not (options.resume or options.overwrite):
            raise SystemExit(
                f"--output {path} is not empty: give --resume to go on with the run in it, --overwrite to replace that "
                "run, or another folder"
            )
        return path
    path, last, number = default, default, 1
    while holds_run(path) or (path.exists() and not path.is_dir()):
        last, number = path, number + 1
        path = default.with_name(f"{default.name}-{number}")
    return last if options.resume or options.overwrite else path


def holds_run(path: Path) -> bool:
    """Whether there is more in the folder than the options of a run that trained nothing."""
    return path.is_dir() and any(inner.name != OPTIONS for inner in path.iterdir())


def write_somewhere(write: Callable[[Path], None], folder: Path) -> Path:
    """Write results to a folder or, if that fails, to a temporary folder, so that they are not lost.

    Args:
        write: A function that writes the results to the folder that it is given.

    Returns:
        The folder that holds the results.

    Raises:
        SystemExit: the results could not be written to either folder.
    """
    try:
        write(folder)
        return folder
    except Exception as error:
        if not is_failed_write(error):
            raise
        reason = cause_of(error)
    try:
        other = Path(tempfile.mkdtemp(prefix=f"{folder.parent.name}-{folder.name}-"))
        write(other)
    except Exception as error:
        if not is_failed_write(error):
            raise
        raise SystemExit(
            f"{folder} could not be written ({reason}), nor could another place: {cause_of(error)}"
        ) from None
    print(f"{folder} could not be written ({reason}). The results are in {other} instead.", file=sys.stderr)
    return other


def is_failed_write(error: Exception) -> bool:
    """Whether a file could not be written, as by a full disk; safetensors and torch have errors of their own for it."""
    return isinstance(error, OSError) or bool(FAILED_WRITE.search(str(error)))
