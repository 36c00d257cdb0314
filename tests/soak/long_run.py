"""Train for long on two processes, with a test and a checkpoint every 50 steps, and watch what the processes hold.

    python tests/soak/long_run.py --steps 2000

After a warm-up of a fifth of the steps, memory has to stay flat within 2 %, and neither open files nor segments of
shared memory may grow in number.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from kill_and_resume import in_a_process_of_its_own, start, wait

# The imports above have set the paths for these.
from common.checkpoints import checkpoints  # isort: skip
from common.digits import EMBEDDED, digits, tiny_vit  # isort: skip

EVERY, PER_PROCESS = 50, 2


def prepare(folder: Path, processes: int) -> None:
    EMBEDDED.save(tiny_vit(), folder / "model")
    source = digits(range(5, 10))
    source.train.select(range(EVERY * PER_PROCESS * processes)).to_parquet(folder / "train.parquet")
    source.test.select(range(40)).to_parquet(folder / "test.parquet")


def arguments(folder: Path, steps: int, method: str) -> list[str]:
    return [
        "--model", str(folder / "model"), "--train_files", str(folder / "train.parquet"),
        "--test_files", str(folder / "test.parquet"), "--output", str(folder / "run"), "--methods", method,
        "--epochs", str(steps // EVERY), "--batch_size", str(PER_PROCESS), "--checkpoint_every", str(EVERY),
        "--timing_rounds", "1",
    ]  # fmt: skip


def sample(process: psutil.Process) -> dict[str, int]:
    memory = process.memory_full_info()
    return {"resident": memory.rss, "private": memory.uss, "files": process.num_fds(), "threads": process.num_threads()}


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def growth(values: list[int]) -> float:
    """The growth from the first fifth to the last fifth, by their medians."""
    fifth = max(1, len(values) // 5)
    return statistics.median(values[-fifth:]) / statistics.median(values[:fifth]) - 1


def watch(folder: Path, steps: int, processes: int, method: str) -> dict[str, object]:
    in_a_process_of_its_own(prepare, folder, processes)
    before, log = shared_memory(), folder / "log.txt"
    running = start(arguments(folder, steps, method), processes, log)
    watched = [psutil.Process(process.pid) for process in running]
    samples: list[list[dict[str, int]]] = []
    done, segments, begun = 0, 0, time.monotonic()
    while done < steps and all(process.is_alive() for process in running):
        time.sleep(0.05)
        found = [path for path in folder.glob("run/*/*") if path.is_dir()]
        last = max((int(c.name.split("-")[1]) for run in found for c in checkpoints(run)), default=0)
        if last > done:  # all processes are at the same place then: a checkpoint has just been written
            done, segments = last, max(segments, len(shared_memory() - before))
            samples.append([sample(process) for process in watched])
    seconds = time.monotonic() - begun
    wait(running, log)
    left = samples[len(samples) // 5 :]
    return {
        "steps": done,
        "seconds": round(seconds),
        "processes": [
            {
                "resident MiB": [round(s[rank]["resident"] / 2**20, 1) for s in samples],
                "private MiB": [round(s[rank]["private"] / 2**20, 1) for s in samples],
                "resident growth": round(growth([s[rank]["resident"] for s in left]), 4),
                "private growth": round(growth([s[rank]["private"] for s in left]), 4),
                "open files": sorted({s[rank]["files"] for s in left}),
                "threads": sorted({s[rank]["threads"] for s in left}),
            }
            for rank in range(processes)
        ],
        "segments while running": segments,
        "segments left": len(shared_memory() - before),
    }


def problems(result: dict, steps: int) -> list[str]:
    found = [] if result["steps"] == steps else [f"{result['steps']} steps instead of {steps}"]
    for rank, process in enumerate(result["processes"]):
        grown = max(process["resident growth"], process["private growth"])
        found += [f"memory of process {rank} grew by {grown:.1%}"] if grown > 0.02 else []
        files = process["open files"]
        found += [f"open files of process {rank}: {files}"] if files[-1] > files[0] else []
    return found + ([f"{result['segments left']} segments in /dev/shm"] if result["segments left"] else [])


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", default="lora+lbp-wht:r=3")
    parser.add_argument("--json", type=Path, help="where to write all samples")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="long-run-"))
    result = watch(folder, options.steps, options.processes, options.method)
    result["method"] = options.method
    result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    result["machine"], result["date"] = platform.platform(), time.strftime("%Y-%m-%d")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for rank, process in enumerate(result["processes"]):
        print(
            f"process {rank}: " + ", ".join(f"{name} {value}" for name, value in process.items() if "MiB" not in name)
        )
    print(f"{result['steps']} steps in {result['seconds']} s; segments left in /dev/shm: {result['segments left']}")
    if found := problems(result, options.steps):
        raise SystemExit("; ".join(found))
    print("Flat: memory within 2 %, no file and no segment more.")


if __name__ == "__main__":
    main()
