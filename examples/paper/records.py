"""One JSON record for each run, from which runs are resumed and tables and figures are made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoints import write_whole

COSTS = "costs.json"


@dataclass(frozen=True)
class Experiment:
    """The records of one model, one protocol and one data set: the rows of a table.

    Args:
        root: The folder of all records.
        table: The kind of task.
        name: The name of the experiment, unique in the table.
    """

    root: Path
    table: str
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.table / self.name

    def file(self, method: str, run: str) -> Path:
        """The file of one run of a method. The run is a seed, such as `seed-0`, or a trial of the search."""
        return self.folder / method / f"{run}.json"

    def read(self, method: str, run: str, config: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a finished run; None if there is none.

        Raises:
            SystemExit: the record has another configuration.
        """
        file = self.file(method, run)
        if not file.exists():
            return None
        record: dict[str, Any] = json.loads(file.read_text())
        plain = json.loads(json.dumps(config, default=str))
        differing = sorted(key for key in {*plain, *record["config"]} if plain.get(key) != record["config"].get(key))
        if differing:
            raise SystemExit(
                f"{file} was made with other options ({', '.join(differing)}): give another --output or --name"
            )
        return record

    def write(self, method: str, run: str, record: dict[str, Any]) -> None:
        """Write a record atomically: if the program is killed, the file is complete or absent."""
        file = self.file(method, run)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record, indent=1, default=str) + "\n")


def experiments(root: Path) -> Iterator[Experiment]:
    """All experiments in a folder of records."""
    for folder in sorted(path for path in root.glob("*/*") if path.is_dir()):
        yield Experiment(root, folder.parent.name, folder.name)


def records_of(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """The records of an experiment's runs, by method."""
    found = {
        folder.name: [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        for folder in sorted(experiment.folder.iterdir())
        if folder.is_dir()
    }
    return {method: records for method, records in found.items() if records}
