"""Checkpoints that are written atomically and verified before use.

A checkpoint is written under another name, a manifest of its files' sizes and checksums last, and then takes its own
name in one step. So a run that is killed at any moment keeps the last whole one. A checkpoint that does not agree with
its manifest, as after a power cut or on a full disk, is refused, and the one before it is used.

transformers' Trainer writes its checkpoints under their own names from the start. With [`Manifests`] and [`last_sound`]
those that were not finished or are damaged are refused, too:

    trainer = Trainer(model, arguments, ..., callbacks=[Manifests()])
    trainer.train(resume_from_checkpoint=last_sound(PartialState(), Path(arguments.output_dir)))
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .processes import on_main

KEPT = 2  # the last one, and one to fall back on
MANIFEST, PROGRESS = "manifest.json", "progress.json"


class Part(Protocol):
    """An additional part of a checkpoint: tensors by name, the same on all processes."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> Any: ...


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    number: int,
    progress: dict[str, Any],
    parts: dict[str, Part] | None = None,
) -> None:
    """Write `folder`/checkpoint-`number`: everything that the accelerator prepared, random states, progress and parts.

    All processes take part; they share the folder.
    """
    new, old, name = folder / "checkpoint.new", folder / "checkpoint.old", folder / f"checkpoint-{number:08d}"

    def clear() -> None:
        for left_behind in (new, old):
            if left_behind.exists():
                shutil.rmtree(left_behind)

    def finish() -> None:
        for part, value in (parts or {}).items():
            save_file({key: tensor.contiguous() for key, tensor in value.state_dict().items()}, _file_of(new, part))
        (new / PROGRESS).write_text(json.dumps(progress))
        write_manifest(new, accelerator.num_processes)
        others = [path for path in checkpoints(folder) if path != name]
        refused = [name] if name.exists() else []  # damaged, since training would not be here again otherwise
        for outdated in [*refused, *others[: 1 - KEPT]]:
            outdated.rename(old)  # so that a half-removed one does not look like a damaged one
            shutil.rmtree(old)
        new.rename(name)
        _to_disk(folder)

    on_main(accelerator, clear)
    accelerator.save_state(new)
    accelerator.wait_for_everyone()  # each process writes its own random state
    on_main(accelerator, finish)


def load_checkpoint(
    accelerator: Accelerator, folder: Path, parts: dict[str, Part] | None = None
) -> dict[str, Any] | None:
    """Restore the last sound checkpoint into what the accelerator prepared, and into the parts.

    Returns:
        The progress that was saved with it; None if there is no checkpoint yet.

    Raises:
        SystemExit: there are checkpoints, but none is sound; or the sound one is of another number of processes.
    """
    path = last_sound(accelerator, folder)
    if path is None:
        return None
    accelerator.load_state(path)
    for part, value in (parts or {}).items():
        value.load_state_dict(load_file(_file_of(path, part)))
    return json.loads((path / PROGRESS).read_text())


class Manifests(TrainerCallback):
    """Writes a manifest into each checkpoint of transformers' Trainer, once it is whole.

    The Trainer removes old checkpoints before that, so with `save_total_limit` give it 2 or more.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        processes = PartialState()
        processes.wait_for_everyone()  # each process writes its own random state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        on_main(processes, write_manifest, folder, processes.num_processes)


def last_sound(processes: Accelerator | PartialState, folder: Path) -> Path | None:
    """Find the last checkpoint in the folder that agrees with its manifest, and report damaged ones after it.

    Returns:
        Its folder, the same on all processes; None if there is no checkpoint yet.

    Raises:
        SystemExit: there are checkpoints, but none is sound; or the sound one is of another number of processes.
    """
    path, refused = on_main(processes, _choose, folder)
    for why in refused:
        processes.print(f"Refused: {why}")
    if path is None and refused:
        raise SystemExit(f"No checkpoint in {folder} is sound. Remove them to start from the beginning.")
    if path is None:
        return None
    written_by = json.loads((path / MANIFEST).read_text())["processes"]
    if written_by != processes.num_processes:
        raise SystemExit(
            f"{path} was written by {written_by} processes and cannot go on exactly with {processes.num_processes}."
        )
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, number in found.items() if number.isdigit()), key=lambda path: int(found[path]))


def remove_checkpoints(folder: Path) -> None:
    for path in [*checkpoints(folder), folder / "checkpoint.new", folder / "checkpoint.old"]:
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(path: Path, processes: int) -> None:
    """Write a manifest of all files of a checkpoint, and make sure that all of them are on the disk."""
    for each in path.rglob("*"):
        _to_disk(each)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file != path / MANIFEST]
    fingerprints = {str(file.relative_to(path)): _fingerprint(file) for file in files}
    write_whole(path / MANIFEST, json.dumps({"processes": processes, "files": fingerprints}, indent=1))


def what_is_wrong(path: Path) -> str:
    """The reason why a checkpoint cannot be used; "" if it is sound."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (value["bytes"], value["sha256"]) for name, value in manifest["files"].items()}
        int(manifest["processes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} cannot be read ({error!r})"
    for name, (size, checksum) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
        if _fingerprint(file)["sha256"] != checksum:
            return f"{file} is not what was written: its checksum differs"
    return ""


def write_whole(file: Path, text: str) -> None:
    """Write a text file atomically: it has all of the text, or is as it was before."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    _to_disk(new)
    os.replace(new, file)
    _to_disk(file.parent)


def _file_of(checkpoint: Path, part: str) -> Path:
    return checkpoint / f"{part}.safetensors"


def _choose(folder: Path) -> tuple[Path | None, list[str]]:
    """The last sound checkpoint, and the faults of those after it."""
    refused = []
    for path in reversed(checkpoints(folder)):
        if not (wrong := what_is_wrong(path)):
            return path, refused
        refused.append(wrong)
    return None, refused


def _to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk: a power cut could keep a rename and lose the content."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere folders cannot be opened
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
