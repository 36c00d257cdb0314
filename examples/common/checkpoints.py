"""Checkpoints that appear whole or not at all, and are not believed blindly.

A checkpoint is written under another name, a manifest of its files' sizes and checksums last, and then takes its own
name in one step. So a run that is killed at any moment keeps the last whole one. A checkpoint that does not agree with
its manifest, as after a power cut or on a full disk, is refused, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

KEPT = 2  # the last, and the one to fall back on
MANIFEST, PROGRESS = "manifest.json", "progress.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, number: int, progress: dict[str, Any]) -> None:
    """Write `folder`/checkpoint-`number`: all that the accelerator prepared, random states, and the progress.

    All processes take part; they share the folder.
    """
    new, old, name = folder / "checkpoint.new", folder / "checkpoint.old", folder / f"checkpoint-{number:08d}"
    if accelerator.is_main_process:
        for left_behind in (new, old):
            shutil.rmtree(left_behind, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(new)
    accelerator.wait_for_everyone()  # each process writes its own random state
    if accelerator.is_main_process:
        (new / PROGRESS).write_text(json.dumps(progress))
        files = {str(file.relative_to(new)): _fingerprint(file) for file in sorted(new.rglob("*")) if file.is_file()}
        (new / MANIFEST).write_text(json.dumps({"processes": accelerator.num_processes, "files": files}, indent=1))
        others = [path for path in checkpoints(folder) if path != name]
        refused = [name] if name.exists() else []  # or training would not have come here again
        for outdated in [*refused, *others[: 1 - KEPT]]:
            outdated.rename(old)  # half removed, it would look like a broken one
            shutil.rmtree(old)
        new.rename(name)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Restore the last sound checkpoint into what the accelerator prepared.

    Returns:
        The progress that was saved with it; None where there is no checkpoint yet.

    Raises:
        SystemExit: there are checkpoints, but none is sound; or the sound one is of another number of processes.
    """
    choice: list[Any] = [None]
    if accelerator.is_main_process:
        choice = [_choose(folder)]
    path, refused = broadcast_object_list(choice)[0]
    for why in refused:
        accelerator.print(f"Refused: {why}")
    if path is None and refused:
        raise SystemExit(f"No checkpoint in {folder} is sound. Remove them to start from the beginning.")
    if path is None:
        return None
    written_by = json.loads((path / MANIFEST).read_text())["processes"]
    if written_by != accelerator.num_processes:
        raise SystemExit(
            f"{path} was written by {written_by} processes and cannot go on exactly with {accelerator.num_processes}."
        )
    accelerator.load_state(path)
    return json.loads((path / PROGRESS).read_text())


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*"))


def remove_checkpoints(folder: Path) -> None:
    for path in [*checkpoints(folder), folder / "checkpoint.new", folder / "checkpoint.old"]:
        shutil.rmtree(path, ignore_errors=True)


def what_is_wrong(path: Path) -> str:
    """Why a checkpoint is not to be used, "" if it is sound."""
    try:
        expected = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{path / MANIFEST} cannot be read ({error})"
    for name, fingerprint in expected.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != fingerprint["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {fingerprint['bytes']}"
        if _fingerprint(file) != fingerprint:
            return f"{file} is not what was written: its checksum differs"
    return ""


def write_whole(file: Path, text: str) -> None:
    """Write a text file so that it is there with all of the text, or as it was before."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    os.replace(new, file)


def _choose(folder: Path) -> tuple[Path | None, list[str]]:
    """The last sound checkpoint, and what is wrong with those after it."""
    refused = []
    for path in reversed(checkpoints(folder)):
        if not (wrong := what_is_wrong(path)):
            return path, refused
        refused.append(wrong)
    return None, refused


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
