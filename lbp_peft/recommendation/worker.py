"""The process that tries candidates on a CPU, started as `python -m lbp_peft.recommendation.worker JOB.pt`.

It reads one candidate from each line, as JSON, and writes one trial to each line. On Linux each candidate is tried in a
fork of this process, so that it does not inherit memory of earlier ones and need not load the libraries and the model
again. This process itself computes nothing, since threads do not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import warnings
from contextlib import suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from ..measure.memory import resident_now
from .candidates import Candidate
from .processes import CAN_FORK, pickle_module
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
    for line in sys.stdin:
        candidate = Candidate(**json.loads(line))
        answer = _in_a_fork(job, candidate) if CAN_FORK else _tried(job, candidate, 0)
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


def _in_a_fork(job: Job, candidate: Candidate) -> str:
    inherited = resident_now()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            # A fork starts without some pages of the libraries' files that a new process would have in memory.
            files = inherited["RssFile"] - resident_now()["RssFile"]
            with os.fdopen(writing, "w") as answer:
                answer.write(_tried(job, candidate, files))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, ended = os.waitpid(pid, 0)
    if text:
        return text
    killed = os.WIFSIGNALED(ended) and os.WTERMSIG(ended)
    why = OUT_OF_MEMORY if killed == signal.SIGKILL else f"its process was ended by signal {killed}"
    return json.dumps(Trial(candidate.label, failure=why).as_dict())


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
