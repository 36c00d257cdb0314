"""The process that measures candidates on a CPU, started as `python -m lbp_peft.recommendation.worker JOB.pt`.

It reads requests and writes answers, one on each line, as JSON. There are three requests: "try" a candidate, which is
answered by the trial; start to "train" it; and run a "step" of that training, which is answered by the step. On Linux
each candidate is tried in a fork of this process and trained in another one, so that it does not inherit the memory of
earlier ones and need not load the libraries and the model again. This process itself computes nothing, since threads do
not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..measure.memory import resident_now
from .candidates import Candidate
from .runners import CAN_FORK, pickle_module
from .training import Step, Training
from .trial import OUT_OF_MEMORY, Job, Trial, try_candidate

_TRAINING_LIBRARIES = ("transformers.trainer", "datasets")  # which a training program has in memory too


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what libraries print is not taken for an answer
    warnings.simplefilter("ignore")
    for name in _TRAINING_LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    libraries = resident_now()
    job: Job = torch.load(path, weights_only=False, pickle_module=pickle_module())
    run_constructors(job.model)
    gc.collect()
    answers.write(json.dumps({"libraries": libraries["VmRSS"]}) + "\n")
    answers.flush()
    forks: dict[str, _Fork] = {}  # the forks that train, by the label of their candidate
    for line in sys.stdin:
        request = json.loads(line)
        candidate = Candidate(**request["candidate"])
        if not CAN_FORK:
            answer = _try(job, candidate, 0)
        elif request["what"] == "try":
            answer = _try_in_fork(job, candidate)
        else:
            if request["what"] == "train":
                forks[candidate.label] = _Fork(partial(_train, job, candidate))
            answer = forks[candidate.label].request() or json.dumps({"failure": forks.pop(candidate.label).close()})
        answers.write(answer + "\n")
        answers.flush()


def run_constructors(model: nn.Module) -> None:
    """Run the constructors of the model's transformers classes on the meta device, where they take no memory.

    A model that is loaded from a file has not run them in this process. They register what a class can do: without
    that, SegFormer, for instance, finds no hidden states to decode.
    """
    known: set[type] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module) not in known:
            known |= {type(child) for child in module.modules()}
            with suppress(Exception), torch.device("meta"):
                type(module)(module.config)


class _Fork:
    """A fork of this process that answers requests.

    Args:
        answer: A function that yields an answer to each request. Its arguments are the requests, and the bytes that a
            new process would have in memory in addition to those that the fork measures.
    """

    def __init__(self, answer: Callable[[Iterable[str], int], Iterator[str]]):
        inherited = resident_now()
        requests, requested = os.pipe()
        answered, written = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                os.close(requested)
                os.close(answered)
                # A fork starts without some pages of the libraries' files that a new process would have in memory.
                missing = inherited["RssFile"] - resident_now()["RssFile"]
                with os.fdopen(requests) as lines, os.fdopen(written, "w") as out:
                    for line in answer(lines, missing):
                        out.write(line + "\n")
                        out.flush()
                status = 0
            finally:
                os._exit(status)
        os.close(requests)
        os.close(written)
        self._requests, self._answers = os.fdopen(requested, "w"), os.fdopen(answered)

    def request(self) -> str:
        """Send a request, and return the answer; "" if the fork has ended."""
        with suppress(BrokenPipeError):
            self._requests.write("\n")
            self._requests.flush()
        return self._answers.readline().strip()

    def close(self) -> str:
        """End the fork, and return the reason if it had ended by itself."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        _, status = os.waitpid(self._pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
        return OUT_OF_MEMORY if killed == signal.SIGKILL else f"its process was ended by signal {killed}"


def _try_in_fork(job: Job, candidate: Candidate) -> str:
    fork = _Fork(lambda requests, missing: (_try(job, candidate, missing) for _ in requests))
    answer, why = fork.request(), fork.close()
    return answer or json.dumps(Trial(candidate.label, failure=why).as_dict())


def _train(job: Job, candidate: Candidate, requests: Iterable[str], missing: int) -> Iterator[str]:
    """Train a candidate. The first request starts its training, and each later one asks for a step."""
    training = None
    torch.set_num_threads(job.threads)
    for _ in requests:
        try:
            if training is None:
                training = Training(job.model, job, candidate)
                yield "{}"
            else:
                seconds = training.step()
                yield json.dumps(Step(seconds, resident_now()["VmHWM"] + missing)._asdict())
        except (MemoryError, RuntimeError) as error:
            yield json.dumps({"failure": str(error)})


def _try(job: Job, candidate: Candidate, missing: int) -> str:
    """Try a candidate, and return the trial as JSON.

    Args:
        job: The model and the data.
        candidate: The candidate.
        missing: The bytes that a new process would have in memory in addition to those measured here.
    """
    torch.set_num_threads(job.threads)
    trial = try_candidate(job.model, job, candidate)
    trial.peak_bytes += missing
    return json.dumps(trial.as_dict())


if __name__ == "__main__":
    main(sys.argv[1])
