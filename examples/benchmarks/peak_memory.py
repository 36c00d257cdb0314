"""The most memory that is allocated at once while something runs.

On a GPU PyTorch's allocator keeps that figure. On a CPU it does not, and the size of the process says little: memory
that was freed stays with it, and what the libraries keep for themselves counts too. There every allocation and release
of a tensor is read from PyTorch's profiler, and summed up in order.

What PyTorch does not allocate itself (scratch memory of a BLAS library, say) is in neither figure.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces each start and stop


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
    """Follow the memory of one device while the block runs.

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
