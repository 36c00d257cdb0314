"""The process that measures candidates on a CPU, started as `python -m lbp_peft.recommendation.worker JOB.pt`.

It reads requests, one from each line, as JSON, and writes one answer to each line. There are three: "try" a candidate,
whose answer is the trial, start to "train" it, and run a "step" of that training, whose answer is that step. On Linux
each candidate is tried in a fork of this process, and trained in another one, so that it does not inherit memory of
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
from .processes import CAN_FORK, pickle_module
from .training import Step, Training
from .trial import OUT_OF_MEMORY, Job, Trial, try_candidate

_OF_TRAINING = ("transformers.trainer", "datasets")  # further modules that a training program has in memory


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries is not taken for an answer
    warnings.simplefilter("ignore")
    for name in _OF_TRAINING:
        with suppress(ImportError):
            importlib.import_module(name)
    libraries = resident_now()
    job: Job = torch.load(path, weights_only=False, pickle_module=pickle_module())
    make_known(job.model)
    gc.collect()
    answers.write(json.dumps({"libraries": libraries["VmRSS"]}) + "\n")
    answers.flush()
    forks: dict[str, _Fork] = {}  # those that train, by the label of their candidate
    for line in sys.stdin:
        request = json.loads(line)
        candidate = Candidate(**request["candidate"])
        if not CAN_FORK:
            answer = _tried(job, candidate, 0)
        elif request["what"] == "try":
            answer = _in_a_fork(job, candidate)
        else:
            if request["what"] == "train":
                forks[candidate.label] = _Fork(partial(_trained, job, candidate))
            answer = forks[candidate.label].answer() or json.dumps({"failure": forks.pop(candidate.label).ended()})
        answers.write(answer + "\n")
        answers.flush()


def make_known(model: nn.Module) -> None:
    """Run the constructors of the model's transformers classes, which a model loaded from a file has not run here.

    They register what a class can do: without that, SegFormer for one finds no hidden states to decode. On the meta
    device they take no memory.
    """
    known: set[type] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module) not in known:
            known |= {type(part) for part in module.modules()}
            with suppress(Exception), torch.device("meta"):
                type(module)(module.config)


class _Fork:
    """A fork of this process that answers requests.

    Args:
        answers: A function of the requests and of the bytes that a new process would have in memory in addition to
            those that the fork measures. It yields an answer to each request.
    """

    def __init__(self, answers: Callable[[Iterable[str], int], Iterator[str]]):
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
                    for answer in answers(lines, missing):
                        out.write(answer + "\n")
                        out.flush()
                status = 0
            finally:
                os._exit(status)
        os.close(requests)
        os.close(written)
        self._requests, self._answers = os.fdopen(requested, "w"), os.fdopen(answered)

    def answer(self) -> str:
        """The answer to one more request; "" if the fork has ended."""
        with suppress(BrokenPipeError):
            self._requests.write("\n")
            self._requests.flush()
        return self._answers.readline().strip()

    def ended(self) -> str:
        """End the fork, and return why it has ended before, if it has."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        _, status = os.waitpid(self._pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
        return OUT_OF_MEMORY if killed == signal.SIGKILL else f"its process was ended by signal {killed}"


def _in_a_fork(job: Job, candidate: Candidate) -> str:
    fork = _Fork(lambda requests, missing: (_tried(job, candidate, missing) for _ in requests))
    answer, why = fork.answer(), fork.ended()
    return answer or json.dumps(Trial(candidate.label, failure=why).as_dict())


def _trained(job: Job, candidate: Candidate, requests: Iterable[str], missing: int) -> Iterator[str]:
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


def _tried(job: Job, candidate: Candidate, missing: int) -> str:
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
