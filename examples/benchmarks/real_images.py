"""Prepares benchmarks that measure gradients on real images: the file for the figures, the model and its data."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from common.classification import Classification, ClassificationOptions
from common.experiment import Experiment, load

from lbp_peft.loading.places import local_folder


def file_for_record(output: str) -> Path:
    """The file that `--output` names, in a folder that is there.

    Raises:
        SystemExit: it names a folder.
    """
    file = Path(output).expanduser()
    if file.is_dir():
        raise SystemExit(f"--output {file}: this is a folder; name a file in it")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def experiment_for(options: ClassificationOptions, *, cpu: bool = False) -> Experiment:
    """The model and the images that the options name, on a GPU if there is one and `cpu` is not set."""
    options.model = str(local_folder(options.model, "--model") or options.model)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task, accelerator = Classification(), Accelerator(cpu=cpu or not torch.accelerator.is_available())
    return Experiment(task, options, accelerator, load(accelerator, task, options))
