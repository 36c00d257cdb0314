"""The least time that a computation can take on a machine, from its work and the measured rates of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lbp_peft.measure.timing import now

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Rates:
    """The highest rates of the machine, per second.

    Attributes:
        multiply_adds: The multiply-adds of matrix products, by precision; a precision that the device lacks is missing.
        bytes: The bytes read and written in main memory.
    """

    multiply_adds: dict[str, float]
    bytes: float


@dataclass(frozen=True)
class Work:
    """The work that a computation has to do in any case.

    Attributes:
        multiply_adds: The multiply-adds of its matrix products, by precision.
        bytes: The bytes that it reads or writes, each counted once.
    """

    multiply_adds: dict[str, int]
    bytes: int

    def seconds(self, rates: Rates) -> tuple[float, float] | None:
        """The seconds for the multiply-adds and for the bytes; None if the device lacks a precision."""
        if not self.multiply_adds.keys() <= rates.multiply_adds.keys():
            return None
        multiplying = sum(count / rates.multiply_adds[precision] for precision, count in self.multiply_adds.items())
        return multiplying, self.bytes / rates.bytes


def measure_rates(device: torch.device, side: int | None = None, mib: int = 512) -> Rates:
    """Measure the rates of a machine: the best of several runs each.

    Args:
        side: The side of the square matrices that are multiplied; None: large enough to keep the device busy.
        mib: The MiB that are copied.
    """
    side = side or (8192 if device.type == "cuda" else 1536)
    products = {}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randint(-100, 100, (side, side), device=device).to(dtype) for _ in range(2))
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        try:
            seconds = [_best(partial(multiply, a, each)) for each in (b, b.t())]
        except (RuntimeError, NotImplementedError):
            continue
        products[name] = side**3 / min(seconds)
    source = torch.ones(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    return Rates(products, 2 * source.nbytes / _best(partial(target.copy_, source)))


def _best(run: Callable[[], object], times: int = 7) -> float:
    """The seconds of the fastest run. The first run does not count, since it may set something up."""
    run()
    seconds = []
    for _ in range(times):
        start = now()
        run()
        seconds.append(now() - start)
    return min(seconds)
