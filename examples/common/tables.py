"""Tables for the terminal and for pages in Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

WIDTH = 120


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """A table whose columns are as wide as their widest cell; the first is left-aligned, the others right-aligned.

    If a line would exceed `width`, long cells of the first column are put on lines of their own, above the rest of
    their row, and headings are broken into several lines.
    """
    body = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else [0] * len(header)
    widths = [max(len(heading), cells) for heading, cells in zip(header, body, strict=True)]
    gaps = 2 * (len(header) - 1)

    def narrow_the_first(least: int) -> None:
        widths[0] = max(min(least, widths[0]), min(widths[0], width - gaps - sum(widths[1:])))

    narrow_the_first(least=40)
    while sum(widths) + gaps > width:  # the widest heading that can still be broken gives way
        breakable = [
            (own, index)
            for index, own in enumerate(widths)
            if index and own > max(body[index], *map(len, header[index].split()))
        ]
        if not breakable:
            break
        widths[max(breakable)[1]] -= 1
    narrow_the_first(least=20)
    lines = _broken(header, widths)
    lines.append("-" * (sum(widths) + gaps))
    for first, *others in rows:
        if len(first) > widths[0]:
            lines += textwrap.wrap(first, width)
            first = ""
        lines += _broken([first, *others], widths)
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table in Markdown, without the columns that are empty in all rows.

    Args:
        header: The headings.
        rows: The cells of each row.
        text_columns: The number of left-aligned columns; those after them are right-aligned.
    """
    alignment = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    used = [index for index in range(len(header)) if any(row[index] for row in rows)]
    lines = [[line[index] for index in used] for line in (header, alignment, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(text: str, name: str, content: str) -> str:
    """A page with the content between its markers `<!-- NAME -->` and `<!-- end -->`; unchanged without markers."""
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text, flags=re.DOTALL)


def _broken(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A row of a table as one line, or as several where cells are wider than their columns."""
    parts = [textwrap.wrap(cell, own) or [""] for cell, own in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, parts))):
        line = [part[number] if number < len(part) else "" for part in parts]
        lines.append("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
    return lines
