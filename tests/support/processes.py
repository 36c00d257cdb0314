"""Runs functions on several processes on the CPU."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from filelock import FileLock


def on_processes(count: int, function: Callable[[], Any], folder: Path) -> list[Any]:
    """Run a function of a module on each of `count` processes that form a group (gloo), as `torchrun` starts them.

    Starting processes takes seconds, so let them do as much as possible at once.

    Returns:
        The results by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Threads of two processes on one core would wait for each other.
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # so that no library uses a GPU
    try:
        torch.multiprocessing.spawn(_process, (count, port, function, str(folder)), nprocs=count)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return _results(count, folder)


def shared_folder(tmp_path_factory: Any, name: str) -> Path:
    """A temporary folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def on_processes_once(count: int, function: Callable[[], Any], folder: Path) -> list[Any]:
    """[`on_processes`], run by one worker of pytest-xdist; the others read its results."""
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            on_processes(count, function, folder)
            (folder / "done").touch()
    return _results(count, folder)


def _results(count: int, folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, port: int, function: Callable[[], Any], folder: str) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.save(function(), Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():  # an example program leaves the group at its end
        torch.distributed.destroy_process_group()


def environment_of(checkout: Path) -> dict[str, str]:
    """The environment of a program that is to import this checkout, installed or not, and whatever the tests import."""
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
