"""Measures the peak memory of a training step.

There are two figures. [`peak_memory`] is that of the device or the process, weights included: on a GPU the allocation
of PyTorch's allocator, on a CPU the largest resident set of the process. [`allocated`] counts the memory of tensors
that are allocated within a block. It is exact and repeatable, so that two programs can be compared to a few kilobytes,
but leaves out memory that other libraries use and freed memory that stays with the process.
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

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # so that the profiler does not print each start and stop

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """The most bytes in use at once within a block, including those from before the block."""

    bytes: int = 0

    @property
    def mib(self) -> float:
        return self.bytes / 2**20


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of a device while the block runs.

    On a GPU it is the most memory that PyTorch's allocator had allocated at once. On a CPU it is the largest resident
    set of this process, which includes Python, its libraries and all other data of the program.

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
    else:  # not Linux
        with _sample_resident_set(result):
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
def _sample_resident_set(result: PeakMemory) -> Iterator[None]:
    """Sample the resident set every five milliseconds while the block runs."""
    process, is_over = psutil.Process(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            result.bytes = max(result.bytes, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        result.bytes = max(result.bytes, process.memory_info().rss)


@dataclass
class Allocated:
    """The bytes allocated since the block began.

    Attributes:
        peak: The most at any moment.
        left: Those at the end of the block.
    """

    peak: int = 0
    left: int = 0


@contextmanager
def allocated(device: torch.device) -> Iterator[Allocated]:
    """Follow the memory that PyTorch allocates on one device while the block runs.

    On a GPU, PyTorch's allocator counts. On a CPU, all allocations and releases of tensors are read from PyTorch's
    profiler and summed up in order.

    On a CPU, releases of memory from before the block do not count.

    Yields:
        [`Allocated`], complete when the block ends.
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
    """The bytes of each allocation, negative for a release, in order."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(os.fspath(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    of_memory = [event for event in events if event.get("name") == "[memory]"]
    on_cpu = [event for event in of_memory if event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(on_cpu, key=lambda event: event["ts"])]
