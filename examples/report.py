"""Every table and figure that follows from records, on the pages in docs/ and in the README.

    python examples/report.py --docs docs

examples/benchmarks/report.py writes the tables of what was measured, and examples/paper/report.py those of accuracies
and their figures. The records are in the folders `results` of both. Needs Matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import report as of_benchmarks
from benchmarks.figures import draw_steps
from benchmarks.records import dtype_of, read, renamed
from paper import report as of_paper


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="the folder of the pages, beside the README")
    docs = parser.parse_args(arguments).docs
    of_benchmarks.main(["--docs", str(docs)])
    of_paper.main(["--docs", str(docs)])
    for figure, name in of_benchmarks.FIGURES.items():
        record = read(name)
        options = record["options"]
        rows = [row | {"method": renamed(row["method"])} for row in record["rows"]]
        size = " x ".join(map(str, options["image_size"]))
        title = f"{options['model']}, {size} px, batch {options['batch_size']}, {dtype_of(record)}"
        draw_steps(docs / "images" / figure, rows, title)


if __name__ == "__main__":
    main()
