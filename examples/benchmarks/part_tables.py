"""Tables of what is measured beside whole training steps: single layers, gradients, accuracies, layouts."""

from __future__ import annotations

import statistics

from common.tables import markdown

from benchmarks.records import RESULTS, VERSION, read, renamed, source
from benchmarks.tables import number


def layers(float32: str, bf16: str) -> str:
    """Single layers, their forward and backward pass relative to the plain layer."""
    modes = ("full", "auto", "10")
    lines: dict[str, list[str]] = {}
    records = [read(name) for name in (float32, bf16)]
    for record in records:
        for row in record["rows"]:
            height, width = row["grid"]
            tokens = row["batch"] * (height * width + row["prefix"])
            line = lines.setdefault(row["layer"], [" x ".join(map(str, (tokens, *row["features"])))])
            if row["mode"] in modes:
                line.append(number(row["over_plain"][1], 2))
    header = ["layer", "tokens x C_in x C_out", *(f"float32: {mode}" for mode in modes), *(f"bf16: {m}" for m in modes)]
    cells = [[layer, *line] for layer, line in lines.items()]
    sources = "\n".join(f"- {source(n, record)}" for n, record in zip((float32, bf16), records, strict=True))
    return f"{markdown(header, cells, text_columns=2)}\n\n{sources}"


def cosines(name: str) -> str:
    """The cosines of a record of gradient_fidelity.py, without settings that no longer exist."""
    record = read(name)
    cells = []
    for setting, *values in record["rows"]:
        setting = renamed(setting)
        if "compress_activations=int8" not in setting:
            cells.append([f"`{setting}`", *(number(value, 4 if value is values[0] else 3) for value in values)])
    return f"{markdown(['setting', 'all', 'first block', 'middle', 'last'], cells)}\n\n{source(name, record)}"


def adaptive_variants(name: str) -> str:
    """The cosines, the fits and their time in a record of adaptive_variants.py."""
    record = read(name)
    cells = [
        [variant, *(number(value, 3) for value in cosines), str(count), number(ms, 0)]
        for variant, *cosines, count, ms in record["rows"]
    ]
    header = ["variant", "all", "first block", "middle", "last", "fits", "fits, ms"]
    return f"{markdown(header, cells)}\n\n{source(name, record)}"


def summed_weights(name: str, layer: str) -> str:
    """The errors of one layer in a record of summed_weights.py, relative to float64, and the times of all layers."""
    record = read(name)
    ways = ("branch", "one product")
    errors = [
        [row["weights"], f"{row['share']:g}", *(f"{row['errors'][way][part]:.1e}" for part in (0, 1) for way in ways)]
        for row in record["rows"]
        if row["layer"] == layer and "share" in row
    ]
    parts = ("error of the output", "of the update")
    header = ["weights", "update / W", *(f"{part}: {way}" for part in parts for way in ways)]
    times = [
        [row["layer"], number(row["plain_ms"], 1), *(number(row[f"{way} / plain"][1], 2) for way in ways)]
        for row in record["rows"]
        if "plain_ms" in row
    ]
    both = markdown(header, errors), markdown(["layer", "plain, ms", *(f"{way} / plain" for way in ways)], times)
    return "\n\n".join((*both, source(name, record)))


def call_overhead(name: str) -> str:
    """What calling a layer costs, from a record of call_overhead.py."""
    record = read(name)
    cells = [
        [row["way"], *(number(part[1], 0) for part in row["us"]), number(row["extra_us"][1], 0)]
        for row in record["rows"]
    ]
    header = ["layer", "forward, us", "backward, us", "more than the plain layer or LoRA, us"]
    return f"{markdown(header, cells)}\n\n{source(name, record)}"


def calibrated(name: str, heading: str, part: str, rows: dict[str, tuple[str, bool]]) -> str:
    """Cosines of weight gradients by block, from a record of calibration.py.

    Args:
        name: The record.
        heading: That of the first column.
        part: "rows", for bases at one rank, or "allocated", for ranks by a budget.
        rows: By its name in the table, the selection of a row and whether its ranks were allocated.
    """
    record = read(name)
    found = {(row[0], bool(row[4:] and row[4])): (row[2], row[3]) for row in record[part]}
    cells = []
    for text, key in rows.items():
        blocks, worst = found[key]
        cells.append([text, *(number(value, 2) for value in (blocks[0], blocks[1], blocks[5], blocks[-1], worst))])
    header = [heading, "first block", "second", "sixth", "last", "worst layer"]
    return f"{markdown(header, cells)}\n\n{source(name, record)}"


def accuracies_by_seed(records: dict[str, tuple[str, int]]) -> str:
    """The scores after the last epoch, by seed, from records of image_classification.py.

    Args:
        records: By the heading of its row, a record and which of its methods. The rows are pairs: each second one is
            compared with the one before it.
    """
    cells: list[list[str]] = []
    means: list[float] = []
    for heading, (name, index) in records.items():
        histories = read(name)["results"][index]["histories"]
        scores = [100 * history[-1]["score"] for history in histories]
        means.append(statistics.mean(scores))
        difference = f"{means[-1] - means[-2]:+.1f}" if len(means) % 2 == 0 else ""
        mean = f"{means[-1]:.1f} ± {statistics.stdev(scores):.1f} %"
        cells.append([heading, *(f"{score:.2f} %" for score in scores), mean, difference])
    seeds = [f"seed {seed}" for seed in read(next(iter(records.values()))[0])["results"][0]["seeds"]]
    return markdown(["", *seeds, "mean", "difference of means"], cells)


def tracing(rows: dict[str, tuple[str, str]]) -> str:
    """The price of tracing a forward pass, from records of tracing_cost.py.

    Args:
        rows: By its name in the table, the record of a row and the record of its peaks.
    """
    cells, names = [], []
    for heading, (name, of_peaks) in rows.items():
        record, model = read(name), heading.partition(",")[0]
        row = _of_model(name, model)
        peaks = _of_model(of_peaks, model)
        ratios = [number(row[key][1], 2) for key in ("traced_forward_ratio", "traced_step_ratio")]
        line = [heading, str(record["options"]["batch_size"]), str(record["options"]["rounds"]), *ratios]
        line += [number(100 * row["look_ups_of_step"][1], 1)]
        cells.append(line + [number(peaks[key]) if key in peaks else "" for key in ("peak_mib", "traced_peak_mib")])
        names += [name, of_peaks]
    header = ["model", "images", "rounds", "traced / forward", "traced step / step", "look-ups, % of a step"]
    table = markdown([*header, "peak of a step, MiB", "of a traced step, MiB"], cells)
    sources = [
        f"{', '.join(read(name)['options']['models'])}: {source(name, read(name))}" for name in dict.fromkeys(names)
    ]
    return table + "\n\n" + "\n".join(f"- {line}" for line in sources)


def _of_model(name: str, model: str) -> dict[str, list[float]]:
    row: dict[str, list[float]] = next(row for row in read(name)["rows"] if row["model"] == model)
    return row


def day_and_dusk(name: str, labels: dict[str, str]) -> str:
    """The scores of a record of domain_shift.py.

    Args:
        name: The record.
        labels: The names of methods in the table.
    """
    record = read(name)
    cells = []
    for method, label in labels.items():
        rows = [row for row in record["rows"] if row["method"] == method]
        scores = [mean_and_deviation([mean_iou(row[part]) for row in rows]) for part in ("day", "dusk")]
        cells.append([label, f"{rows[0]['trained']:,}", str(len(rows)), *scores])
    header = ["", "trained weights", "seeds", "mean IoU by day", "at dusk"]
    return f"{markdown(header, cells)}\n\n{source(name, record)}"


def mean_and_deviation(scores: list[float]) -> str:
    """The mean of the scores of some seeds, with their standard deviation if there are several."""
    deviation = f" ± {number(statistics.stdev(scores), 3)}" if len(scores) > 1 else ""
    return number(statistics.mean(scores), 3) + deviation


def mean_iou(confusion: list[list[int]]) -> float:
    """The mean over the classes that occur of intersection over union.

    Args:
        confusion: The numbers of pixels by true class and predicted class.
    """
    found = [
        confusion[index][index] / union
        for index, row in enumerate(confusion)
        if (union := sum(row) + sum(other[index] for other in confusion) - confusion[index][index])
    ]
    return statistics.mean(found)


def related(fidelity: tuple[str, ...], costs: tuple[str, ...]) -> str:
    """Related methods beside LBP-WHT, from records of rivals_table.py."""
    from benchmarks.rivals_table import markdown_table

    sources = "\n".join(
        f"- {kind}, on {threads} thread{'s' if threads > 1 else ''}: {source(name, record)}"
        for kind, names in (("cosines", fidelity), ("costs", costs))
        for name, record in ((name, read(name)) for name in names)
        for threads in (record["environment"]["threads"],)
    )
    return f"{markdown_table(RESULTS / VERSION)}\n\n{sources}"


def calculated_on_gpus() -> str:
    """What roofline.py calculates for its default sizes; nothing of it is measured."""
    from benchmarks.roofline import HEADER, parsed, rows_of

    return markdown(HEADER, rows_of(parsed([])), text_columns=2)
