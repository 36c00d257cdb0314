"""Several processes on the CPU, for tests of what they do together."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def on_processes(count: int, function: Callable[[], Any], folder: Path) -> list[Any]:
    """Run a function of a module on each of `count` processes that form a group (gloo), as `torchrun` starts them.

    To start them costs seconds, so give them a lot to do.

    Returns:
        What each of them returned, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Threads of two processes on one core would wait for each other.
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    try:
        torch.multiprocessing.spawn(_process, (count, port, function, str(folder)), nprocs=count)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, port: int, function: Callable[[], Any], folder: str) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.save(function(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
