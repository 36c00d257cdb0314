"""The process in which candidates are tried on a CPU, started as `python -m lbp_peft.recommendation.worker JOB.pt`.

It reads one candidate a line, as JSON, and answers with one trial a line. On Linux each is tried in a fork of this
process: none finds memory that another has left behind, and none has to load the libraries and the model again. Until
then nothing is computed here, since threads do not survive a fork.
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

from ..measure.memory import resident_now
from .candidates import Candidate
from .processes import CAN_FORK, pickle_module
from .trial import OUT_OF_MEMORY, Job, Trial, try_candidate

_OF_TRAINING = ("transformers.trainer", "datasets")  # what a program that trains has in memory beside these modules


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    for name in _OF_TRAINING:
        with suppress(ImportError):
            importlib.import_module(name)
    libraries = resident_now()
    job: Job = torch.load(path, weights_only=False, pickle_module=pickle_module())
    gc.collect()
    answers.write(json.dumps({"libraries": libraries["VmRSS"]}) + "\n")
    answers.flush()
    for line in sys.stdin:
        candidate = Candidate(**json.loads(line))
        answer = _in_a_fork(job, candidate) if CAN_FORK else _tried(job, candidate, 0)
        answers.write(answer + "\n")
        answers.flush()


def _in_a_fork(job: Job, candidate: Candidate) -> str:
    inherited = resident_now()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            # A fork starts without the pages of the libraries' files in memory that a process of its own would have.
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
    """The trial as JSON.

    Args:
        missing: Bytes in memory that a process of its own would have beside what is read here.
    """
    torch.set_num_threads(job.threads)
    trial = try_candidate(job.model, job, candidate)
    trial.peak_bytes += missing
    return json.dumps(trial.as_dict())


if __name__ == "__main__":
    main(sys.argv[1])
