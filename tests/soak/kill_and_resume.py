"""Kill a training run at random moments, resume it each time, and compare the results with an uninterrupted run.

    python tests/soak/kill_and_resume.py --kills 20

runs examples/image_classification.py on two processes. SIGKILL comes at any time, or just when a checkpoint is being
written; to all processes at once, or to one a moment before the other. The adapters and the record of losses and scores
must equal those of the unbroken run to the last bit; each life must go on from the last checkpoint before it, since one
that started over would end with the same bits; and no checkpoint may be refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("examples", ".")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from common.checkpoints import checkpoints  # noqa: E402
from common.classification import Classification  # noqa: E402
from common.digits import EMBEDDED, digits, tiny_vit  # noqa: E402
from common.experiment import main as run_example  # noqa: E402

METHODS = ["lbp-wht:r=3", "lora+lbp-wht:r=3"]
EVERY = 4  # updates between checkpoints
UPDATES_PER_KILL = 24  # long enough that the run does not end before it was killed often enough


@dataclass
class Life:
    """One start of the run, until it was killed or ended. Checkpoints are numbers of updates, by part of the run.

    Args:
        found: The checkpoints that existed when it started.
        wrote: The checkpoints that it added, in order.
        killed: When it was killed; None if it ended by itself.
    """

    found: dict[str, list[int]]
    wrote: dict[str, list[int]] = field(default_factory=dict)
    killed: str | None = None

    def see(self, output: Path) -> None:
        """Record the checkpoints added so far. Two are kept, so it is enough to look now and then."""
        for part, numbers in numbers_of_checkpoints(output).items():
            before = [*self.found.get(part, []), *self.wrote.get(part, [])]
            if new := [number for number in numbers if number not in before]:
                self.wrote[part] = self.wrote.get(part, []) + new

    def problems(self) -> list[str]:
        """The parts that did not continue from their last checkpoint."""
        found = []
        for part, wrote in self.wrote.items():
            last = max(self.found.get(part, []), default=0)
            if wrote != [last + EVERY * (1 + step) for step in range(len(wrote))]:
                found.append(f"{part} wrote checkpoints {wrote} after {last}")
        return found

    def went_on(self) -> bool:
        """Whether it continued a part that had a checkpoint."""
        return any(part in self.found for part in self.wrote)


def numbers_of_checkpoints(output: Path) -> dict[str, list[int]]:
    found = {run: [int(path.name.split("-")[1]) for path in checkpoints(run)] for run in output.glob("*/seed-*")}
    return {str(run.relative_to(output)): numbers for run, numbers in found.items() if numbers}


def prepare(folder: Path) -> None:
    """Prepare a model with dropout, so that random numbers matter, and few images."""
    model = tiny_vit()
    model.config.hidden_dropout_prob = 0.1
    EMBEDDED.save(model, folder / "model")
    source = digits(range(5, 10))
    source.train.select(range(120)).to_parquet(folder / "train.parquet")
    source.test.select(range(20)).to_parquet(folder / "test.parquet")


def arguments(folder: Path, output: Path, updates: int, processes: int) -> list[str]:
    batch = 10 // processes
    return [
        "--model", str(folder / "model"), "--train_files", str(folder / "train.parquet"),
        "--test_files", str(folder / "test.parquet"), "--output", str(output), "--methods", *METHODS,
        "--epochs", str(math.ceil(updates / len(METHODS) / 12)), "--batch_size", str(batch),
        "--checkpoint_every", str(EVERY), "--timing_rounds", "1", "--resume",
    ]  # fmt: skip


def in_a_process_of_its_own(function: Callable[..., None], *values: object) -> None:
    """Run a function in a process of its own, since a process that has started threads must not be forked."""
    process = multiprocessing.get_context("fork").Process(target=function, args=values)
    process.start()
    process.join()


def start(flags: list[str], processes: int, log: Path) -> list[BaseProcess]:
    """Start processes as torchrun does, but by forking: importing everything again would take most of the time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_run, args=(flags, rank, processes, port, log)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


def _run(flags: list[str], rank: int, processes: int, port: int, log: Path) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in ranks.items()}
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["image_classification.py", *flags]
    run_example(Classification(), "")


def run_through(flags: list[str], processes: int, output: Path, log: Path) -> Life:
    life = Life(numbers_of_checkpoints(output))
    running = start(flags, processes, log)
    while any(process.is_alive() for process in running):
        life.see(output)
        time.sleep(0.02)
    wait(running, log)
    return life


def run_and_kill(
    flags: list[str], processes: int, output: Path, chance: random.Random, log: Path, update: float
) -> Life:
    """Start the run and kill it: on the way to its first checkpoint, while it writes one, or after that.

    Args:
        update: The seconds that an update takes.
    """
    life, born = Life(numbers_of_checkpoints(output)), time.time()
    moment = chance.choices(["loading", "saving", "training"], [1, 3, 2])[0]
    delay = {"loading": 1, "saving": 0.03, "training": EVERY * update}[moment] * chance.random()
    running = start(flags, processes, log)
    while all(process.is_alive() for process in running):
        if moment == "loading" or (is_saving(output, born) if moment == "saving" else has_saved(output, born)):
            break
        time.sleep(0.002)
    until = time.monotonic() + delay
    while (left := until - time.monotonic()) > 0:
        life.see(output)
        time.sleep(min(left, 0.02))
    if not all(process.is_alive() for process in running):
        wait(running, log)
        return life
    victims = list(running)
    chance.shuffle(victims)
    together = chance.random() < 0.5
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
        if not together:
            time.sleep(chance.uniform(0, 0.3))
    for process in running:
        process.join()
    life.see(output)
    when = "while a checkpoint was written" if is_saving(output, born) else "at another time"
    life.killed = f"{when}, {'all at once' if together else 'one after the other'}"
    return life


def is_saving(output: Path, since: float) -> bool:
    """Whether a checkpoint was begun after this time and does not have its final name yet."""
    for new in output.glob("*/*/checkpoint.new"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its final name
            return new.stat().st_mtime > since
    return False


def has_saved(output: Path, since: float) -> bool:
    with contextlib.suppress(FileNotFoundError):  # an old one has just been removed
        return any(path.stat().st_mtime > since for path in output.glob("*/*/checkpoint-*"))
    return False


def wait(running: list[BaseProcess], log: Path) -> None:
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")


def results(output: Path) -> dict[str, object]:
    """All results that must not differ."""
    found: dict[str, object] = {}
    for file in sorted(output.rglob("adapter_model.safetensors")):
        found[str(file.relative_to(output))] = file.read_bytes()
    for file in sorted(output.rglob("history.json")):
        epochs = json.loads(file.read_text())
        found[str(file.relative_to(output))] = [(epoch["loss"], epoch["score"]) for epoch in epochs]
    return found


def trial(folder: Path, kills: int, processes: int, seed: int) -> list[Life]:
    """Kill a run a given number of times, and then let it end.

    Returns:
        The lives of the run, the last of which ended by itself.

    Raises:
        SystemExit: the run failed, ended before it was killed so often, ended with another result, refused a
            checkpoint or did not go on from the last one.
    """
    in_a_process_of_its_own(prepare, folder)
    whole, broken, log = folder / "whole", folder / "broken", folder / "log.txt"
    updates = UPDATES_PER_KILL * (kills + 1)
    begun = time.monotonic()
    run_through(arguments(folder, whole, updates, processes), processes, whole, log)
    update = (time.monotonic() - begun) / updates
    chance, lives = random.Random(seed), []
    flags = arguments(folder, broken, updates, processes)
    for _ in range(kills):
        lives.append(run_and_kill(flags, processes, broken, chance, log, update))
        if not lives[-1].killed:
            raise SystemExit(f"the run ended after {len(lives) - 1} kills: give it more updates")
    lives.append(run_through(flags, processes, broken, log))
    expected, found = results(whole), results(broken)
    if len(expected) != 2 * len(METHODS) + 1:  # an adapter and a record each, and the stack beside its LoRA
        raise SystemExit(f"the unbroken run left {sorted(expected)}")
    if differing := [name for name in expected if found.get(name) != expected[name]]:
        raise SystemExit(f"the resumed run ended differently: {', '.join(differing)}. See {folder}")
    if refused := [line for line in log.read_text().splitlines() if "Refused" in line]:
        raise SystemExit("\n".join(refused))
    if restarted := [problem for life in lives for problem in life.problems()]:
        raise SystemExit("\n".join(restarted))
    if not any(life.went_on() for life in lives):
        raise SystemExit("no life went on from a checkpoint of another: give it more kills")
    return lives


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments, as far as clocks allow")
    parser.add_argument("--json", type=Path, help="where to write what became of each life")
    options = parser.parse_args()
    start_time = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    lives = trial(folder, options.kills, options.processes, options.seed)
    seconds = round(time.monotonic() - start_time)
    hits = Counter(life.killed for life in lives if life.killed)
    for when, count in sorted(hits.items()):
        print(f"{count:3} kills {when}")
    went_on = sum(life.went_on() for life in lives)
    if options.json:
        record = {
            "processes": options.processes,
            "methods": METHODS,
            "updates between checkpoints": EVERY,
            "kills": dict(sorted(hits.items())),
            "lives that went on from a checkpoint": went_on,
            "checkpoints refused": 0,
            "adapters and records": "the same bit for bit as those of an unbroken run",
            "seconds": seconds,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
            "machine": platform.platform(),
            "date": time.strftime("%Y-%m-%d"),
            "lives": [asdict(life) for life in lives],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{options.processes} processes, {hits.total()} kills: the adapters and records are the same bit for bit.")
    print(f"{went_on} of {len(lives)} lives went on from a checkpoint of another; none was refused.")
    print(f"{seconds} s")


if __name__ == "__main__":
    main()
