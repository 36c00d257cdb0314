"""The training loop: one model, one method, one seed, on one or many processes, and resumable to the last bit."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from .checkpoints import load_checkpoint, save_checkpoint
from .metrics import load_metric, score
from .models import train_mode
from .options import Options
from .outputs import is_failed_write
from .processes import freeze_unused, plain_copy, whole_model
from .task import Task
from .terminal import cause_of


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        label: What the progress bar and the trackers call it.
        folder: Where its checkpoint goes.
        epochs: Passes over the training images.
        learning_rate: Peak learning rate.
    """

    label: str
    folder: Path
    epochs: int
    learning_rate: float


@dataclass
class Progress:
    """Where training stands: what a checkpoint holds beside the states of model, optimizer and random numbers."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def next_epoch(self, value: float) -> None:
        """Close the epoch: its mean loss, its score and the seconds spent on training steps go on record."""
        self.history.append({"loss": self.loss / self.batch, "score": value, "seconds": self.seconds})
        self.epoch, self.batch, self.loss, self.seconds = self.epoch + 1, 0, 0.0, 0.0


def train(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    loaders: tuple[DataLoader, DataLoader],
    run: Run,
    options: Options,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the model and test it after every epoch.

    Returns:
        The trained model, free of accelerate's wrappers and, on the main process, whole; and per epoch its loss, score
        and seconds of training.
    """
    images = loaders[0].dataset
    if unused := freeze_unused(model, loaders[0].collate_fn([images[0]])):
        accelerator.print(f"Not trained, since the loss does not depend on it: {', '.join(unused)}")
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run.learning_rate, weight_decay=options.weight_decay)
    plain = plain_copy(accelerator, model)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, *loaders)
    updates = math.ceil(len(train_loader) / options.gradient_accumulation_steps) * run.epochs
    warmup = round(updates * options.warmup_ratio) if options.warmup_steps is None else options.warmup_steps
    scheduler = accelerator.prepare(get_scheduler(options.scheduler, optimizer, warmup, updates))

    def step(batch: dict[str, torch.Tensor]) -> float:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and options.max_grad_norm:
                # Those of the prepared model: sharding put others in the place of `weights`.
                accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()
        return accelerator.reduce(loss.detach(), "mean").item()

    progress = Progress(**((load_checkpoint(accelerator, run.folder) if options.resume else None) or {}))
    length, quiet = len(train_loader), not accelerator.is_main_process
    with tqdm(total=run.epochs * length, desc=run.label, unit="step", disable=quiet) as bar:
        bar.update(progress.epoch * length + progress.batch)
        while progress.epoch < run.epochs:
            images.epoch = progress.epoch
            train_mode(model)
            batches = accelerator.skip_first_batches(train_loader, progress.batch) if progress.batch else train_loader
            for batch in batches:
                start = time.perf_counter()
                loss = step(batch)
                progress.seconds += time.perf_counter() - start
                progress.loss += loss
                progress.batch += 1
                bar.update()
                if accelerator.sync_gradients:
                    progress.updates += 1
                    log(accelerator, run, progress, {"loss": loss, "learning rate": scheduler.get_last_lr()[0]})
                    if options.checkpoint_every and progress.updates % options.checkpoint_every == 0:
                        write_checkpoint(accelerator, run.folder, progress)
            progress.next_epoch(test(accelerator, task, model, test_loader, options))
            done = progress.history[-1]
            log(accelerator, run, progress, {f"epoch {name}": value for name, value in done.items()})
            bar.set_postfix(loss=f"{done['loss']:.3f}", test=f"{100 * done['score']:.1f} %")

    model = whole_model(accelerator, model, plain)
    accelerator.free_memory()
    return model, progress.history


def write_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress) -> None:
    """Save a checkpoint; a single process goes on training where the disk has no room for it."""
    try:
        save_checkpoint(accelerator, folder, progress.updates, dataclasses.asdict(progress))
    except Exception as error:
        if accelerator.num_processes > 1 or not is_failed_write(error):
            raise
        shutil.rmtree(folder / "checkpoint.new", ignore_errors=True)
        warnings.warn(f"No checkpoint could be written to {folder}: {cause_of(error)}. Training goes on.", stacklevel=2)


def check_scheduler(options: Options) -> None:
    """Build the schedule of an optimizer that is not used.

    Raises:
        ValueError: transformers has no such schedule.
        TypeError: it needs arguments that the options do not have.
    """
    get_scheduler(options.scheduler, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 2)


@torch.no_grad()
def test(accelerator: Accelerator, task: Task, model: nn.Module, loader: DataLoader, options: Options) -> float:
    """The metric over the test images."""
    metric = load_metric(task.metric, options)
    model.eval()
    for batch in loader:
        labels = batch.pop("labels")
        task.add_batch(metric, accelerator, model(**batch).logits, labels, options)
    return score(metric, options)


def log(accelerator: Accelerator, run: Run, progress: Progress, values: dict[str, float]) -> None:
    """Send values to the trackers, if any, under the run's name."""
    accelerator.log({f"{run.label}/{name}": value for name, value in values.items()}, step=progress.updates)
