"""Reports what each adapted layer does in the backward pass."""

from __future__ import annotations

import html
import math
import re
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..bases.grids import TokenLayout
from ..bases.packed import PackedLayout
from ..layout import LayoutFinder
from .layers.base import LBPWHTLayer
from .layers.recording import BackwardPass

WIDTH = 100  # the width of the report as text
# Columns of the report, and what they mean.
COLUMNS = {
    "layer": "name in the model; {0..11} stands for the layers of that name with each of these numbers",
    "grid": "rows and columns of patches that the layer's input was recognised as",
    "outside": "tokens outside the grid, such as [CLS]; they are kept exactly",
    "tokens": "L, the number of tokens of each image (or window)",
    "dW from": "k, the number of rows that the gradient of the weight is computed from, instead of L",
    "dx from": "the same for the gradient of the input, which is exact up to the precision if this is L",
    "dx in": "precision of the product that gives the gradient of the input",
    "found by": "the patch embedding or model input that the grid was followed from, or the setting",
    "backward": "low-rank, or exact and why",
}


@dataclass(frozen=True)
class LayoutReport:
    """How the backward pass of each adapted layer last ran. Printed, it shows totals and a table.

    Attributes:
        layers: The last [`BackwardPass`] of each layer, by the layer's name; None if the layer has not run in training
            mode yet.
        features: C_in, the number of input channels, by the layer's name; None where it is not known.
    """

    layers: dict[str, BackwardPass | None]
    features: dict[str, int | None] = field(default_factory=dict, repr=False)

    @property
    def exact(self) -> dict[str, str]:
        """The reasons for exact backpropagation, by the layer's name."""
        return {name: last.why_exact for name, last in self.layers.items() if last is not None and last.why_exact}

    @property
    def low_rank(self) -> list[str]:
        """The names of the layers whose backward pass was low-rank or in low precision."""
        return [name for name, last in self.layers.items() if last is not None and not last.why_exact]

    def as_text(self, verbose: bool = False) -> str:
        """Totals, and a table of the layers, at most 100 columns wide.

        Args:
            verbose: One row for each layer, all columns, and what they mean; else one row for each group of like
                layers, whose names differ in numbers alone.
        """
        heading, *rows = self._heading_and_rows(verbose)
        meanings = [f"{name}: {COLUMNS[name]}" for name in heading if verbose or name in _TO_EXPLAIN]
        below: list[str] = []
        if _FOUND_BY in heading:
            index = heading.index(_FOUND_BY)
            if max((len(row[index]) for row in rows), default=0) > _MOST_FOUND_BY:
                below = ["", *(row.pop(index) for row in rows)]
                heading.remove(_FOUND_BY)
        table = _align([heading, *rows], below)
        return "\n".join([*_wrap(self._totals()), "", *table, "", *_wrap(meanings)])

    def __str__(self) -> str:
        return self.as_text()

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row for each layer.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self._rows(verbose=True), columns=list(COLUMNS))

    def _repr_html_(self) -> str:
        names, *rows = self._heading_and_rows(verbose=False)
        style = 'style="text-align: left; white-space: nowrap"'
        heading = "".join(
            f'<th {style} title="{html.escape(COLUMNS[name])}">{html.escape(name)}</th>' for name in names
        )
        body = "".join(f"<tr>{''.join(f'<td {style}>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        totals = "<br>".join(map(html.escape, self._totals()))
        return f"<p>{totals}</p><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"

    def _heading_and_rows(self, verbose: bool) -> list[list[str]]:
        """The heading and the rows, in which marks stand for the reasons of exact layers."""
        marks = self._marks()
        shown = [name for name in COLUMNS if verbose or name != _FOUND_BY or not self._common_origin()]
        start = self._common_origin()  # the totals name it
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self._rows(verbose)]
        return [shown, *([marks.get(row[name], row[name]).removeprefix(f"{start} ") for name in shown] for row in rows)]

    def _marks(self) -> dict[str, str]:
        """A short mark for each text in the last column of an exact layer. The totals explain the marks."""
        reasons = [why for why, _ in Counter(self.exact.values()).most_common()]
        numbers = [f" ({number})" for number in range(1, len(reasons) + 1)] if len(reasons) > 1 else [""]
        return {f"exact: {why}": f"exact{number}" for why, number in zip(reasons, numbers, strict=False)}

    def _totals(self) -> list[str]:
        not_run = sum(last is None for last in self.layers.values())
        lines = [f"{len(self.low_rank)} of {len(self.layers)} adapted layers have a low-rank backward pass."]
        marks = self._marks()
        for why, number in Counter(self.exact.values()).most_common():
            lines.append(f"{number} {'is' if number == 1 else 'are'} {marks[f'exact: {why}']}: {why}.")
        if not_run:
            lines.append(f"{not_run} {'has' if not_run == 1 else 'have'} not been called in training mode yet.")
        with_tokens = {
            name: last for name in self.low_rank if (last := self.layers[name]) is not None and last.num_tokens
        }
        if with_tokens:
            kept = sum(last.grad_weight_rows for last in with_tokens.values())
            total = sum(last.num_tokens for last in with_tokens.values())
            lines.append(f"Tokens kept of their inputs: {kept} of {total} ({100 * kept / total:.0f} %).")
        if with_tokens and all(self.features.get(name) for name in with_tokens):
            sizes = [(last, self.features[name] or 0) for name, last in with_tokens.items()]
            kept = sum(last.grad_weight_rows * channels for last, channels in sizes)
            total = sum(last.num_tokens * channels for last, channels in sizes)
            lines.append(
                f"Values kept of their inputs, each counted once: {kept / 1e6:.2f} M of {total / 1e6:.2f} M for each "
                f"image or window ({100 * kept / total:.0f} %)."
            )
        if start := self._common_origin():
            lines.append(f"The grids were {start}.")
        return lines

    def _common_origin(self) -> str:
        """The beginning of the layers' `known_by`, if all tokens were followed from the same place; else ""."""
        starts = {last.known_by.partition(" through ")[0] for last in self.layers.values() if last and last.known_by}
        return starts.pop() if len(starts) == 1 and all(start.startswith("followed from ") for start in starts) else ""

    def _rows(self, verbose: bool) -> list[tuple[str, ...]]:
        if verbose:
            return [(name, *_cells(last)) for name, last in self.layers.items()]
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for name, last in self.layers.items():
            # The number of operations grows from block to block. It must not make groups of single layers.
            cells = tuple(_NUM_OPERATIONS.sub("", cell) for cell in _cells(last))
            groups.setdefault((re.sub(r"\d+", "#", name), cells), []).append(name)
        rows = []
        for names in groups.values():
            cells_of_ends = _cells(self.layers[names[0]]), _cells(self.layers[names[-1]])
            cells = tuple(_join_range(*pair) for pair in zip(*cells_of_ends, strict=True))
            rows += [(name, *cells) for name in _group_names(names)]
        return rows


_TO_EXPLAIN = ("outside", "tokens", "dW from", "dx from", "dx in")
_NUM_OPERATIONS = re.compile(r"\d+ operations?$")
_FOUND_BY = "found by"
_MOST_FOUND_BY = 26  # characters of that column; what is longer stands on a line below the row


def _align(rows: list[list[str]], below: list[str]) -> list[str]:
    """The rows as lines with aligned columns. A name for which there is no room gets a line of its own.

    Args:
        below: The text below each row; empty: there is none.
    """
    widths = [max(map(len, column)) for column in zip(*(row[1:] for row in rows), strict=True)]
    room = WIDTH - sum(width + 2 for width in widths)
    names = [row[0] for row in rows]
    first = max((len(name) for name in names if len(name) <= room), default=0)
    lines = []
    for (name, *cells), text in zip(rows, below or [""] * len(rows), strict=True):
        lines += [name] if len(name) > room else []
        start = " " * first if len(name) > room else name.ljust(first)
        lines.append("  ".join([start, *(c.ljust(width) for c, width in zip(cells, widths, strict=True))]).rstrip())
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def _wrap(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]


def _cells(last: BackwardPass | None) -> tuple[str, ...]:
    """All columns but the name."""
    if last is None:
        return (*["-"] * (len(COLUMNS) - 2), "not called in training mode yet")
    grid = _format_grids(last.layout) if last.layout else "-"
    outside = str(last.layout.num_outside) if last.layout else "-"
    rows = [str(last.grad_weight_rows), str(last.grad_input_rows)] if not last.why_exact else ["-", "-"]
    how = f"exact: {last.why_exact}" if last.why_exact else "low-rank"
    return (grid, outside, str(last.num_tokens), *rows, last.precision, last.known_by or "-", how)


def _join_range(first: str, last: str) -> str:
    """followed from patch_embed through 3 operations, ... 45 operations -> ... through 3 to 45 operations"""
    if first == last:
        return first
    start, number = first.removesuffix("s").removesuffix(" operation").rsplit(" ", 1)
    return f"{start} {number} to {last.removeprefix(f'{start} ')}"


def _group_names(names: list[str]) -> list[str]:
    """Names that differ in numbers alone, as one name for all combinations of these numbers.

    layers.0.fc, layers.1.fc, layers.2.fc -> layers.{0..2}.fc
    """
    if len(names) == 1:
        return names
    parts = [re.split(r"(\d+)", name) for name in names]
    columns = [sorted(set(column), key=_as_number) for column in zip(*parts, strict=True)]
    if math.prod(map(len, columns)) != len(names):  # some combinations are missing: split where the fewest differ
        split = min((index for index, column in enumerate(columns) if len(column) > 1), key=lambda i: len(columns[i]))
        subsets = [
            [name for name, words in zip(names, parts, strict=True) if words[split] == word] for word in columns[split]
        ]
        return [group for subset in subsets for group in _group_names(subset)]
    return [_with_sets(columns)]


def _with_sets(columns: list[list[str]]) -> str:
    return "".join(column[0] if len(column) == 1 else "{" + _ranges(column) + "}" for column in columns)


def _ranges(numbers: list[str]) -> str:
    """0, 1, 2, 5 -> 0..2,5"""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (-1, text)


def _format_grids(layout: TokenLayout) -> str:
    """The grids of a layout, such as "8 x 12" or "8 x 12, 4 x 8"; of many, the first ones."""
    grids = layout.grids if isinstance(layout, PackedLayout) else (layout.grid,)
    shown = ", ".join(f"{height} x {width}" for height, width in grids[:3])
    return shown if len(grids) <= 3 else f"{shown} and {len(grids) - 3} more"


def layout_report(model: nn.Module) -> LayoutReport:
    """Report the grid, the prefix tokens and k of L of each layer with LBP-WHT adapters, or why it is exact.

    Printed, it shows totals and one row for each group of like layers; `as_text(verbose=True)` has one for each layer,
    and says what the columns mean. Notebooks show it as a table; `to_pandas()` gives a data frame.

    Args:
        model: Any model with LBP-WHT layers. They report their last forward pass in training mode.

    Example:
        >>> model(pixel_values=images, labels=labels).loss.backward()
        >>> print(layout_report(model))
    """
    layers = [module for module in model.modules() if isinstance(module, LBPWHTLayer)]
    return LayoutReport(
        {layer.layer_name: layer.last_backward for layer in layers},
        {layer.layer_name: getattr(layer, "in_features", None) for layer in layers},
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


# The number of blocks of exact_backward that each layer is in. Blocks of several threads, or of parts of a model, may
# end in another order than they began in.
_num_blocks: weakref.WeakKeyDictionary[LayoutFinder, Counter[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _count_blocks(layers: list[tuple[LayoutFinder, str]], change: int) -> None:
    with _lock:
        for finder, name in layers:
            _num_blocks.setdefault(finder, Counter())[name] += change
        for finder in dict.fromkeys(finder for finder, _ in layers):
            finder.exact = frozenset(+_num_blocks[finder])
