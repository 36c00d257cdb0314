"""Tables of the pages in docs/ and of the README, from the records of the benchmarks.

    python examples/benchmarks/report.py                 # prints every table
    python examples/benchmarks/report.py --docs docs     # puts the tables into the pages, and the README beside docs

examples/report.py writes these, the tables of docs/paper.md and all figures.

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a key of `TABLES`. To add
a table, write its record with a benchmark, and add an entry to `TABLES`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.tables import with_table

from benchmarks.aim_tables import peaks_aimed_for, saved_aimed_for, steps_aimed_for
from benchmarks.comparisons import MEMORY
from benchmarks.part_tables import (
    accuracies_by_seed,
    adaptive_variants,
    calculated_on_gpus,
    calibrated,
    call_overhead,
    cosines,
    day_and_dusk,
    layers,
    related,
    summed_weights,
    tracing,
)
from benchmarks.step_tables import (
    ALL,
    BACKWARD,
    FORWARD,
    OVER_LORA,
    PEAK,
    SAVED,
    models,
    peaks,
    profiles,
    step_by_mode,
    steps,
    steps_and_peaks,
    times_and_peaks_over_lora,
)

_GPU = (
    "full", "full+checkpointing", "lora-qv", "lora-all", "lora-all+checkpointing",
    "lbp-wht:r=10", "lbp-wht:r=10,grad_input_rank=10",
    "lora-all+lbp-wht:r=10", "lora-all+lbp-wht:r=10,grad_input_rank=10",
    "lora-all+lbp-wht:r=10,compress_activations=all", "lora-all+lbp-wht:r=10+checkpointing",
)  # fmt: skip
# The columns of two tables without saved activations: their records count too many for compiled steps, since those of
# the pass that found the patches were counted with the first step's.
_WITHOUT_SAVED = tuple(column for column in ALL if column is not SAVED)
TABLES: dict[str, Callable[[], str]] = {
    "AVX2, float32": partial(steps, "vit-b-float32-avx2.json"),
    "AVX2, peaks": partial(peaks, "vit-b-peak-avx2.json", ("16", "8")),
    "restricted to AVX2": partial(steps, "vit-b-float32-restricted-to-avx2.json"),
    "AVX-512, float32": partial(steps, "vit-b-float32-avx512.json"),
    "AVX-512, bf16": partial(steps, "vit-b-bf16-avx512.json"),
    "compressed by word, bf16": partial(
        steps, "vit-b-bf16-words-avx512.json", (FORWARD, BACKWARD, OVER_LORA, SAVED, PEAK)
    ),
    "AVX-512, compiled, float32": partial(steps, "vit-b-float32-compiled-avx512.json", _WITHOUT_SAVED),
    "AVX-512, compiled, bf16": partial(steps, "vit-b-bf16-compiled-avx512.json", _WITHOUT_SAVED),
    "AVX-512, steps and peaks": partial(
        steps_and_peaks,
        ("vit-b-float32-avx512.json",),
        "vit-b-peak-avx512.json",
        ("32", "8"),
        MEMORY,
    ),
    "AMX, float32": partial(steps, "vit-b-float32-amx.json"),
    "AMX, bf16": partial(steps, "vit-b-bf16-amx.json"),
    "AMX, peaks": partial(peaks, "vit-b-peak-amx-batch-32.json", ("32",)),
    "H200": partial(
        step_by_mode,
        ("h200-vit-b-bf16-cuda-graphs.json", "h200-vit-b-bf16-compiled.json"),
        {"eager": "", "CUDA graph": "+cuda-graph", "compiled": "+compile"},
        _GPU,
    ),
    "AMX, compiled, float32": partial(steps, "vit-b-float32-compiled-amx.json"),
    "AMX, compiled, bf16": partial(steps, "vit-b-bf16-compiled-amx.json"),
    "where the time goes, float32": partial(profiles, "profile-vit-b-float32-amx.json"),
    "where the time goes, AVX2": partial(profiles, "profile-vit-b-float32-avx2.json"),
    "AVX2, compiled, float32": partial(steps, "vit-b-float32-compiled-avx2.json"),
    "where the time goes, bf16": partial(profiles, "profile-vit-b-bf16-amx.json"),
    "other models": partial(
        models,
        tuple(f"{model}-{dtype}.json" for model in ("vit-s", "dinov2-b", "vit-l") for dtype in ("float32", "bf16")),
    ),
    "other architectures": partial(models, ("swinv2-s.json", "segformer-b0.json", "efficientformer-l1.json")),
    "single layers": partial(layers, "layers-float32.json", "layers-bf16.json"),
    "cosines": partial(cosines, "fidelity.json"),
    "call overhead": partial(call_overhead, "call-overhead.json"),
    "adaptive variants": partial(adaptive_variants, "adaptive-variants.json"),
    "summed weights": partial(summed_weights, "summed-weights.json", "q, k, v or out"),
    "low precision": partial(
        accuracies_by_seed,
        {
            'float32, grad_input_dtype="full"': ("cifar-float32-full.json", 0),
            'float32, grad_input_dtype="auto" (bf16 here)': ("cifar-float32-auto.json", 0),
            'bf16 autocast, grad_input_dtype="full"': ("cifar-bf16.json", 0),
            'bf16 autocast, grad_input_dtype="int8"': ("cifar-bf16.json", 1),
        },
    ),
    "calibrated bases": partial(
        calibrated,
        "calibration.json",
        "`selection`, r = 3",
        "rows",
        {
            '`"lp_l1"`': ("lp_l1", False),
            '`"lhe"`': ("lhe", False),
            '`"klt"`': ("klt", False),
            '`"klt"` of x alone': ("klt-x", False),
            '`"klt"` of g alone': ("klt-g", False),
        },
    ),
    "allocated ranks": partial(
        calibrated,
        "calibration.json",
        "At the memory of r = 8",
        "allocated",
        {
            f'`"{selection}"`, {text}': (selection, by_budget)
            for selection in ("lp_l1", "klt")
            for text, by_budget in (("one rank", False), ("ranks by the budget", True))
        },
    ),
    "tracing": partial(
        tracing,
        {
            "vit-b, 224 px": ("tracing-vit-b-swinv2-s-avx512.json",) * 2,
            "swinv2-s, 256 px": ("tracing-vit-b-swinv2-s-avx512.json",) * 2,
            "vit-s, 224 px": ("tracing-vit-s.json",) * 2,
            "vit-s, 224 px, two images": ("tracing-vit-s-batch-2.json",) * 2,
            "segformer-b0, 512 px": ("tracing-segformer-b0.json", "tracing-segformer-b0-peaks.json"),
        },
    ),
    "day and dusk": partial(
        day_and_dusk,
        "domain-shift.json",
        {
            "frozen": "frozen backbone, linear head",
            "lora": "LoRA, r=8",
            "lora+lbp-wht": "LoRA with LBP-WHT, r=10",
        },
    ),
    "related methods": partial(
        related, ("rivals-fidelity.json", "rivals-fidelity-8-bits.json"), ("rivals-costs.json",)
    ),
    "roofline": calculated_on_gpus,
    "aims, steps": partial(
        steps_aimed_for,
        {
            "AVX-512, VNNI": (
                "vit-b-float32-avx512.json",
                "vit-b-float32-avx512-again.json",
                "vit-b-float32-compiled-avx512.json",
            ),
            "AVX2": (
                "vit-b-float32-avx2.json",
                "vit-b-float32-restricted-to-avx2.json",
                "vit-b-float32-compiled-avx2.json",
            ),
            "AMX": ("vit-b-float32-amx.json", "vit-b-float32-compiled-amx.json"),
        },
        {
            "AVX-512, VNNI": (
                "vit-b-bf16-avx512.json",
                "vit-b-bf16-avx512-short.json",
                "vit-b-bf16-compiled-avx512.json",
            ),
            "AMX": ("vit-b-bf16-amx.json", "vit-b-bf16-compiled-amx.json"),
        },
    ),
    "aims, peaks": partial(
        peaks_aimed_for,
        {
            "batch 8, AVX-512": ("vit-b-peak-avx512.json", "8"),
            "batch 16, AVX2": ("vit-b-peak-avx2.json", "16"),
            "batch 32, AVX-512": ("vit-b-peak-avx512.json", "32"),
            "batch 32, AMX": ("vit-b-peak-amx-batch-32.json", "32"),
        },
    ),
    "aims, saved activations": partial(
        saved_aimed_for,
        {"float32": ("vit-b-float32-avx512.json", 0.25), "bf16": ("vit-b-bf16-avx512.json", 0.22)},
    ),
    "LoRA with and without": partial(
        times_and_peaks_over_lora,
        ("vit-b-peak-avx2.json", "16"),
        {
            "step, CPU with AMX": "vit-b-float32-amx.json",
            "step, CPU with AVX-512 and VNNI": "vit-b-float32-avx512.json",
            "step, CPU with AVX2": "vit-b-float32-restricted-to-avx2.json",
        },
        {
            "LoRA on all linear layers": "lora-all",
            "**LoRA with LBP-WHT on top**": "lora-all+lbp-wht:r=10",
            'LoRA with LBP-WHT and `compress_activations="all"`': "lora-all+lbp-wht:r=10,compress_activations=all",
            "LoRA with LBP-WHT and gradient checkpointing": "lora-all+lbp-wht:r=10+checkpointing",
            "LoRA with gradient checkpointing, without LBP-WHT": "lora-all+checkpointing",
        },
    ),
}

# Figures of docs/images, each with the record of training_step.py that it shows.
FIGURES = {"vit-b-float32.png": "vit-b-float32-amx.json", "vit-b-bf16.png": "vit-b-bf16-amx.json"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="the folder of the pages, which get the tables")
    options = parser.parse_args(arguments)
    contents = {name: table() for name, table in TABLES.items()}
    if options.docs is None:
        for name, content in contents.items():
            print(f"{name}\n\n{content}\n")
        return
    readme = options.docs.resolve().parent / "README.md"
    for page in sorted(options.docs.glob("*.md")) + [readme] * readme.exists():
        text = page.read_text()
        for name, content in contents.items():
            text = with_table(text, f"table: {name}", content)
        page.write_text(text)


if __name__ == "__main__":
    main()
