"""What each adapted layer does in the backward pass, for people to read."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..bases.basis_set import TokenLayout
from ..bases.packed import PackedLayout
from ..layout import LayoutFinder
from .layers.base import BackwardPass, LBPWHTLayer


@dataclass(frozen=True)
class LayoutReport:
    """How the backward pass of each adapted layer ran last; print it for a table.

    Attributes:
        layers: Name of the layer -> its last [`BackwardPass`], None if it has not run in training mode yet.
    """

    layers: dict[str, BackwardPass | None]

    @property
    def exact(self) -> dict[str, str]:
        """Layers that fell back to, or were meant for, exact backpropagation -> why."""
        return {name: ran.why_exact for name, ran in self.layers.items() if ran is not None and ran.why_exact}

    def __str__(self) -> str:
        header = ("layer", "grid", "followed through", "outside", "tokens", "k for dW", "k for dx", "dx in", "backward")
        rows = [header, *(_row(name, ran) for name, ran in self.layers.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _row(name: str, ran: BackwardPass | None) -> tuple[str, ...]:
    if ran is None:
        return (name, *["-"] * 7, "not called in training mode yet")
    grid = _words_for_grids(ran.layout) if ran.layout else "-"
    outside = str(ran.layout.num_outside) if ran.layout else "-"
    kept = [str(ran.kept_for_weight), str(ran.kept_for_input)] if not ran.why_exact else ["-", "-"]
    how = f"exact: {ran.why_exact}" if ran.why_exact else "low-rank"
    return (name, grid, ran.known_by or "-", outside, str(ran.num_tokens), *kept, ran.precision, how)


def _words_for_grids(layout: TokenLayout) -> str:
    """The grids of a layout, such as "8 x 12" or "8 x 12, 4 x 8"; of many, the first ones."""
    grids = layout.grids if isinstance(layout, PackedLayout) else (layout.grid,)
    shown = ", ".join(f"{height} x {width}" for height, width in grids[:3])
    return shown if len(grids) <= 3 else f"{shown} and {len(grids) - 3} more"


def layout_report(model: nn.Module) -> LayoutReport:
    """List, for each layer with LBP-WHT adapters, its grid, prefix tokens, k of L, and why it is exact where it is.

    The column "followed through" says through how many operations the grid was followed from the model's input.

    Args:
        model: Any model with LBP-WHT layers. They report their last forward pass in training mode.

    Example:
        >>> model(pixel_values=images, labels=labels).loss.backward()
        >>> print(layout_report(model))
    """
    return LayoutReport(
        {module.layer_name: module.last_backward for module in model.modules() if isinstance(module, LBPWHTLayer)}
    )


@contextmanager
def exact_backward(model: nn.Module) -> Iterator[None]:
    """Within the block, forward passes prepare for exact backpropagation, with the same weights.

    Example:
        >>> with exact_backward(model):
        ...     loss = model(**batch).loss
        >>> loss.backward()
    """
    layers = [(module.finder, module.layer_name) for module in model.modules() if isinstance(module, LBPWHTLayer)]
    _count_blocks(layers, 1)
    try:
        yield
    finally:
        _count_blocks(layers, -1)


# How many blocks of exact_backward hold each layer at the moment. Blocks of several threads, or of parts of a model,
# may end in another order than they began in.
_num_blocks: weakref.WeakKeyDictionary[LayoutFinder, Counter[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _count_blocks(layers: list[tuple[LayoutFinder, str]], change: int) -> None:
    with _lock:
        for finder, name in layers:
            _num_blocks.setdefault(finder, Counter())[name] += change
        for finder in dict.fromkeys(finder for finder, _ in layers):
            finder.exact = frozenset(+_num_blocks[finder])
