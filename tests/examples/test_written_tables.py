"""Tables are made of records as they say: figures are found, put side by side, compared with aims."""

import json

import pytest
from benchmarks import records
from benchmarks.aim_tables import peaks_aimed_for, steps_aimed_for
from benchmarks.part_tables import mean_iou
from benchmarks.step_tables import steps_and_peaks

MACHINE = {
    "processor": "AMD EPYC", "instructions": "AVX2", "gpu": None, "cores": 2, "date": "2026-01-01", "torch": "2.0+cpu",
}  # fmt: skip
OPTIONS = {"model": "vit-b", "bf16": False, "batch_size": 8, "image_size": [224, 224]}
LORA, STACK = "lora-all", "lora-all+lbp-wht:r=10"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a record where reports look for records."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    (tmp_path / records.VERSION).mkdir()

    def write(name, machine=MACHINE, **content):
        record = {"environment": machine, "options": OPTIONS} | content
        (tmp_path / records.VERSION / name).write_text(json.dumps(record))

    return write


def row(method, *rounds):
    """The row of a method in a record of steps, with the seconds of the forward and the backward pass."""
    middle = sum(rounds[0])
    over = [middle / 100] * 3
    return {"method": method, "rounds_ms": rounds, "step_ms": [middle] * 3, "step_over_full": over}


def lines(table):
    """The cells of each row, by the first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {first.strip("*"): others for first, *others in rows}


def test_steps_and_peaks_stand_side_by_side(write):
    write("steps.json", rows=[row("full", (40, 60)), row("lbp-wht:r=10", (40, 20))])
    write("more.json", rows=[row("full", (90, 90)), row(STACK, (30, 20))])
    peaks = {"full": 1000, LORA: 2000, "lbp-wht": 800}  # `lbp-wht` is the method that steps have as `lbp-wht:r=10`
    of_8 = {method: {"peak_mib": peak, "libraries_mib": 300} for method, peak in peaks.items()}
    write("peaks.json", peaks={"8": of_8})
    methods = ("full", LORA, "lbp-wht:r=10", STACK)
    table = steps_and_peaks(("steps.json", "absent.json", "more.json"), "peaks.json", ("8", "32"), methods)
    found = lines(table)
    assert found["full fine-tuning"] == ["100", "1.00", "-", "-", "1000", "1.00", "0.50", "-", "-", "-"]
    assert found["LoRA"] == ["-", "-", "-", "-", "2000", "2.00", "1.00", "-", "-", "-"]
    assert found["LBP-WHT"][:2] == ["60", "0.60"] and found["LBP-WHT"][4:7] == ["800", "0.80", "0.40"]
    assert found["LoRA + LBP-WHT"][:2] == ["50", "0.50"] and set(found["LoRA + LBP-WHT"][2:]) == {"-"}
    assert "300 MiB of libraries" in table and "absent.json" not in table and "more.json" in table


@pytest.mark.parametrize("key", ["processor", "instructions"])
def test_steps_and_peaks_of_two_machines_are_not_put_side_by_side(write, key):
    write("steps.json", rows=[row("full", (40, 60))])
    write("peaks.json", MACHINE | {key: "AVX512"}, peaks={"8": {"full": {"peak_mib": 1, "libraries_mib": 1}}})
    with pytest.raises(ValueError, match="one machine"):
        steps_and_peaks(("steps.json",), "peaks.json", ("8",), ("full",))


def test_aims_are_compared_with_what_was_reached(write):
    one = [row("full", (10, 10)), row(LORA, (10, 10), (20, 20), (10, 10)), row(STACK, (12, 4), (12, 0), (12, 2))]
    write("one.json", rows=[row("full", *[(10, 10)] * 3), *one[1:]])
    write("other.json", rows=[row(LORA, (10, 10)), row(STACK, (10, 2))])
    machines = {"AVX-512, VNNI": ("one.json",), "AMX": ("one.json", "other.json"), "AVX2": ("other.json",)}
    found = lines(steps_aimed_for(machines, {}))
    # Ratios within rounds: 16 / 20, 12 / 40 and 14 / 20 in the one, 12 / 20 in the other. The aim is one for AMX.
    heading = "LoRA + LBP-WHT / LoRA"
    table = steps_aimed_for(machines, {}).splitlines()
    line = next(line for line in table if line.startswith(f"| {heading} "))
    assert line == f"| {heading} | 0.62 (AMX) | 0.70 | **0.60 to 0.70** ¹ | 0.60 |"
    assert any("forward pass" in line and "| 1.10 | **1.20** | **1.20** | - |" in line for line in table)
    assert found["LBP-WHT / full fine-tuning"] == ["0.75 (AVX2)", "-", "-", "-"]


def test_a_peak_that_misses_its_aim_by_little_has_one_more_digit(write):
    peaks = {LORA: 1000, STACK: 490, f"{STACK}+checkpointing": 284, f"{STACK},compress_activations=all": 401}
    write("peaks.json", peaks={"8": {method: {"peak_mib": peak} for method, peak in peaks.items()}})
    found = lines(peaks_aimed_for({"batch 8": ("peaks.json", "8")}))
    assert found["LoRA + LBP-WHT / LoRA"] == ["0.50", "0.49"]
    assert found["LoRA + LBP-WHT, checkpointing / LoRA"] == ["0.28", "**0.284**"]
    assert found["LoRA + LBP-WHT, compressed / LoRA"] == ["0.40", "**0.401**"]
    assert found["LBP-WHT / full fine-tuning"] == ["0.80", "-"]


def test_mean_iou_leaves_out_classes_that_do_not_occur():
    assert mean_iou([[3, 1, 0], [1, 1, 0], [0, 0, 0]]) == pytest.approx((3 / 5 + 1 / 3) / 2)
