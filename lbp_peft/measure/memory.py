"""The most memory that a training step needs at once.

Two figures are of use. [`peak_memory`] is the real one, weights and all: on a GPU what PyTorch's allocator has handed
out, on a CPU the largest resident set of the process. [`allocated`] counts what tensors alone need beyond what was
there before, exactly and repeatably, which tells two programs apart by a few kilobytes; memory that libraries use
beside PyTorch, and memory that was freed but stays with the process, are not in it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces each start and stop

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Bytes in use at the fullest moment of a block, all that was there before included."""

    bytes: int = 0

    @property
    def mib(self) -> float:
        return self.bytes / 2**20


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Read the peak of a device's memory while the block runs.

    On a GPU it is what PyTorch's allocator has handed out at once. On a CPU it is the resident set of this process, so
    that Python and its libraries count, and whatever else the program holds.

    Yields:
        [`PeakMemory`], complete when the block ends.
    """
    result = PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        torch.cuda.synchronize(device)
        result.bytes = torch.cuda.max_memory_allocated(device)
    elif _reset_high_water_mark():
        yield result
        result.bytes = resident_now()["VmHWM"]
    else:  # another system than Linux
        with _sampled(result):
            yield result


def resident_now() -> dict[str, int]:
    """The resident set of this process in bytes: VmRSS and its peak VmHWM.

    On Linux also its parts, RssAnon and RssFile.
    """
    if _STATUS.exists():
        lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
        return {
            key: 1024 * int(value.split()[0]) for key, _, value in lines if key.startswith(("VmRSS", "VmHWM", "Rss"))
        }
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"VmRSS": psutil.Process().memory_info().rss, "VmHWM": peak * (1 if sys.platform == "darwin" else 1024)}


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def _sampled(result: PeakMemory) -> Iterator[None]:
    """The resident set, looked at every five milliseconds."""
    process, over = psutil.Process(), threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            result.bytes = max(result.bytes, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        result.bytes = max(result.bytes, process.memory_info().rss)


@dataclass
class Allocated:
    """Bytes beyond what was allocated when the block began.

    Attributes:
        peak: The most at any moment.
        left: When the block ended.
    """

    peak: int = 0
    left: int = 0


@contextmanager
def allocated(device: torch.device) -> Iterator[Allocated]:
    """Follow the memory that PyTorch allocates on one device while the block runs.

    On a GPU PyTorch's allocator keeps that figure. On a CPU it does not; every allocation and release of a tensor is
    read from PyTorch's profiler there, and summed up in order.

    Yields:
        [`Allocated`], complete when the block ends.

    Release of memory from before the block is not seen on a CPU.
    """
    result = Allocated()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        gc.collect()
        torch.cuda.synchronize(device)
        result.peak = torch.cuda.max_memory_allocated(device) - before
        result.left = torch.cuda.memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
        gc.collect()
    totals = list(itertools.accumulate(_allocations(profiler), initial=0))
    result.peak, result.left = max(totals), totals[-1]


def _allocations(profiler: profile) -> list[int]:
    """Bytes of every allocation, negative for a release, in the order in which they happened."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(os.fspath(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    of_memory = [event for event in events if event.get("name") == "[memory]"]
    on_cpu = [event for event in of_memory if event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(on_cpu, key=lambda event: event["ts"])]
