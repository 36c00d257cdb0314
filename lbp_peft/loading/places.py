"""Distinguishes names of local folders from names on the hub, so that a mistyped folder is not looked up on the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

FILE_ENDINGS = (
    ".arrow", ".bin", ".csv", ".gz", ".jpeg", ".jpg", ".json", ".jsonl", ".parquet", ".png", ".pt", ".pth", ".py",
    ".safetensors", ".tar", ".tsv", ".txt", ".webdataset", ".yaml", ".yml", ".zip",
)  # fmt: skip


def local_folder(name: str, flag: str) -> Path | None:
    """The local folder of this name; None if the name is to be looked up on the hub.

    Args:
        name: The name that the user gave.
        flag: The flag that the user gave it with, for the message.

    Raises:
        SystemExit: the name looks like a path, but there is no such folder; or it is that of a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SystemExit(f"{flag} {name}: this is a file, not a folder.{_remedy_for_file(path, flag)}")
    if looks_like_path(name):
        raise SystemExit(f"{flag} {name}: there is no such folder.{similar(path)}")
    return None


def looks_like_path(name: str) -> bool:
    """Whether a name must be a path, because it is not a valid id on the hub, or because its parent folder exists."""
    path = Path(name).expanduser()
    return (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        or name.startswith((".", "~", "/"))
        or name.lower().endswith(FILE_ENDINGS)
        or ("/" in name and path.parent.exists())
    )


def similar(path: Path) -> str:
    """A sentence that suggests a similarly spelt name in the folder of a path that does not exist; or ""."""
    parent = path.parent
    if not parent.is_dir():
        return f" There is no folder {parent} either."
    matches = difflib.get_close_matches(path.name, [other.name for other in parent.iterdir()], n=1)
    return f" Did you mean {parent / matches[0]}?" if matches else ""


def _remedy_for_file(path: Path, flag: str) -> str:
    if flag != "--dataset":
        return ""
    return " Give Parquet files to --train_files." if path.suffix == ".parquet" else " Unpack it, or name its folder."
