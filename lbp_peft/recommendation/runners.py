"""Runners, which try and train candidates: on a CPU in worker processes, on a GPU in this process.

On a CPU, the memory of a process is measured by its resident set, which hardly shrinks when memory is freed. So each
candidate runs in a new process, see `worker.py`. On a GPU, PyTorch's allocator reports the memory in use.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch

from ..measure.memory import allocated, resident_now
from ..measure.running import device_of, preserve_state, tensors_in
from .candidates import Candidate, copy_with_shared_parameters
from .training import Step, Training
from .trial import TOO_LONG, Job, Trial, try_candidate

CAN_FORK = sys.platform == "linux"


def pickle_module() -> Any:
    """`dill` if it is installed, as it is with `datasets`, since it also pickles functions of scripts and notebooks."""
    try:
        import dill
    except ImportError:
        return pickle
    return dill


class LocalRunner:
    """Tries and trains candidates in this process.

    On a GPU the peak is that of PyTorch's allocator, less the memory of other tensors of the program. On a CPU it is
    estimated as this process's resident set without the model, plus the memory that PyTorch allocates for the step.
    That leaves out memory that other libraries allocate.

    Attributes:
        job: The model and the data.
        libraries_bytes: The memory of Python and its libraries, which peaks on a CPU include.
    """

    def __init__(self, job: Job):
        self.job, self._device = job, device_of(job.model)
        self.libraries_bytes = self._other_bytes = 0
        if self._device.type == "cuda":
            self._other_bytes = torch.cuda.memory_allocated(self._device) - _bytes_of(job)
        else:
            self.libraries_bytes = max(resident_now()["VmRSS"] - _bytes_of(job), 0)

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def measure(self, candidate: Candidate, seconds: float) -> Trial:
        """Try a candidate. The limit of its time is ignored, since a trial in this process cannot be ended."""
        gc.collect()
        with preserve_state(self.job.model):
            model = copy_with_shared_parameters(self.job.model)
            with allocated(self._device) if self._device.type != "cuda" else nullcontext() as counted:
                trial = try_candidate(model, self.job, candidate)
        if counted is None:
            trial.peak_bytes -= self._other_bytes
        else:
            trial.peak_bytes = self.libraries_bytes + _bytes_of(self.job) + counted.peak
            trial.is_counted = True
        return trial

    def start_training(self, candidate: Candidate, deadline: float) -> Callable[[], Step]:
        """Start to train a candidate, and return a function that runs a step."""
        return _start_local_training(self.job, candidate)


def _start_local_training(job: Job, candidate: Candidate) -> Callable[[], Step]:
    training = Training(copy_with_shared_parameters(job.model), job, candidate)
    return lambda: Step(training.step())


class ProcessRunner:
    """Tries and trains each candidate in a process of its own.

    Attributes:
        job: The model and the data.
        libraries_bytes: The memory of Python and its libraries, which peaks include.

    Raises:
        WorkerError: the process cannot be started, or the model, the batches or the loss function cannot be handed to
            it.
    """

    def __init__(self, job: Job):
        self.job = job
        self.libraries_bytes = 0
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ProcessRunner:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self.job.folder = folder
        self._file = Path(folder, "job.pt")
        try:
            torch.save(self.job, self._file, pickle_module=pickle_module())
            self._start()
        except Exception as error:
            self.__exit__(None, None, None)
            raise error if isinstance(error, WorkerError) else WorkerError(str(error)) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:  # such as an interrupt: nobody waits for the result any more
            self._kill()
        self._stop()
        self._stack.close()

    def measure(self, candidate: Candidate, seconds: float) -> Trial:
        """Try a candidate. If it takes more than the given seconds, its process is ended."""
        if self._process is None:
            self._start()
        try:
            trial = Trial(**self._request("try", candidate, seconds))
        except WorkerError as error:
            return Trial(candidate.label, failure=str(error))
        if not CAN_FORK:
            self._stop()
        return trial

    def start_training(self, candidate: Candidate, deadline: float) -> Callable[[], Step]:
        """Start to train a candidate, and return a function that runs a step.

        All candidates train at the same time, each in a process that ends with the search.

        Args:
            candidate: The candidate.
            deadline: The time, by `time.monotonic()`, at which a process that still runs is ended.

        Raises:
            MemoryError: it needs more memory than there is.
            WorkerError: its process ended. Each step may raise it too.
        """
        if not CAN_FORK:
            return _start_local_training(self.job, candidate)
        if self._process is None:
            self._start()

        def ask(what: str) -> dict[str, Any]:
            answer = self._request(what, candidate, deadline - time.monotonic())
            if why := answer.get("failure"):
                raise MemoryError(why)
            return answer

        ask("train")
        return lambda: Step(**ask("step"))

    def _request(self, what: str, candidate: Candidate, seconds: float) -> dict[str, Any]:
        """Send a request to the process, and return its answer.

        Args:
            what: "try", "train" or "step", see `worker.py`.
            candidate: The candidate.
            seconds: The time after which the process is ended if it has not answered.

        Raises:
            WorkerError: the process ended. The next request starts another one.
        """
        if self._process is None:
            raise WorkerError(TOO_LONG)
        assert self._process.stdin is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._kill()

        limit = threading.Timer(max(seconds, 1.0), end)
        limit.start()
        try:
            self._process.stdin.write(json.dumps({"what": what, "candidate": asdict(candidate)}) + "\n")
            self._process.stdin.flush()
            return self._read_answer()
        except (WorkerError, BrokenPipeError):
            self._stop()
            why = TOO_LONG if is_late.is_set() else "its process ended, perhaps for lack of memory"
            raise WorkerError(why) from None
        finally:
            limit.cancel()

    def _kill(self) -> None:
        """End the process and its forks."""
        if self._process is None:
            return
        if CAN_FORK:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def _start(self) -> None:
        package = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")]), *filter(None, sys.path)])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=CAN_FORK,  # so that it is the leader of a group with its forks
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.libraries_bytes = self._read_answer()["libraries"]

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "lbp_peft.recommendation.worker", str(self._file)]

    def _read_answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise WorkerError(lines[-1] if lines else "the process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self._errors.close()
        self._process = None


Runner: TypeAlias = LocalRunner | ProcessRunner


class WorkerError(RuntimeError):
    """Candidates cannot be tried in a process of their own; the message says why."""


def _bytes_of(job: Job) -> int:
    """The bytes of the model and the batches."""
    storages = (
        tensor.untyped_storage() for tensor in (*job.model.parameters(), *job.model.buffers(), *tensors_in(job.batches))
    )
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
