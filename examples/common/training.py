"""The training loop: one model, one method, one seed, on one or many processes, and resumable to the last bit."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from lbp_peft import exact_backward
from lbp_peft.loading.terminal import cause_of

from .augmentation import loss_of
from .checkpoints import Part, load_checkpoint, save_checkpoint
from .metrics import Confusion, load_metric, score
from .models import train_mode
from .options import Options
from .outputs import is_failed_write
from .processes import freeze_unused, plain_copy, whole_model
from .remaining import Remaining
from .selection import Average, Best, is_over, kept_epoch
from .task import Task


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        label: The run's name in the progress bar and the trackers.
        folder: The folder of its checkpoints.
        epochs: The number of passes over the training images.
        learning_rate: The peak learning rate.
        seed: The seed of the random numbers for a batch.
        heads: The names of the modules of the head, for `head_learning_rate`.
        exact_steps: The number of updates at the start with exact backpropagation in the place of LBP-WHT.
        head_learning_rate: The peak learning rate of the head; None: that of all other weights.
        remaining: The estimate of the time that this run and the later ones take.
        scores_last_only: Whether to score test images after the last epoch only, which is faster.
    """

    label: str
    folder: Path
    epochs: int
    learning_rate: float
    seed: int = 0
    heads: Sequence[str] = ()
    head_learning_rate: float | None = None
    exact_steps: int = 0
    remaining: Remaining = field(default_factory=lambda: Remaining(runs=1))
    scores_last_only: bool = False


@dataclass
class Progress:
    """The progress of training: the contents of a checkpoint other than model, optimiser and random states."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def next_epoch(self, value: float, validation: float | None = None) -> None:
        """End the epoch, and record its mean loss, its scores and the seconds of its training steps."""
        scores = {"score": value} | ({} if validation is None else {"validation": validation})
        self.history.append({"loss": self.loss / self.batch, **scores, "seconds": self.seconds})
        self.epoch, self.batch, self.loss, self.seconds = self.epoch + 1, 0, 0.0, 0.0


def parameter_groups(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """The trained parameters in groups for the optimiser: the head is one of its own if it has its own learning rate.

    If nothing but the head is trained, the learning rate of the run is meant for it.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_head = {name for name in trained if any(f".{head}." in f".{name}" for head in run.heads)}
    if run.head_learning_rate is None or not of_head or of_head == trained.keys():
        return [{"params": list(trained.values())}]
    return [
        {"params": [parameter for name, parameter in trained.items() if name not in of_head]},
        {"params": [trained[name] for name in trained if name in of_head], "lr": run.head_learning_rate},
    ]


def train(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    loaders: Sequence[DataLoader],
    run: Run,
    options: Options,
    confusion: Confusion | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the model and test it after every epoch.

    Args:
        loaders: The loaders of training and test images. With a third one, of validation images, the epoch with the
            best score on these is kept.
        confusion: Counts the predictions of the returned model on test images.

    Returns:
        The trained model without accelerate's wrappers, not sharded on the main process; and the loss, the scores and
        the seconds of training of each epoch.
    """
    images = loaders[0].dataset
    if unused := freeze_unused(model, loaders[0].collate_fn([images[0]])):
        accelerator.print(f"Not trained, since the loss does not depend on it: {', '.join(unused)}")
    # A gradient scaler leaves it to a fused optimiser to skip steps that overflow, and accelerate then does not notice.
    optimizer = torch.optim.AdamW(
        parameter_groups(model, run),
        lr=run.learning_rate,
        weight_decay=options.weight_decay,
        fused=accelerator.scaler is None,
    )
    plain = plain_copy(accelerator, model)
    model, optimizer, train_loader, test_loader, *validation = accelerator.prepare(model, optimizer, *loaders)
    updates = math.ceil(len(train_loader) / options.gradient_accumulation_steps) * run.epochs
    warmup = round(updates * options.warmup_ratio) if options.warmup_steps is None else options.warmup_steps
    scheduler = accelerator.prepare(get_scheduler(options.scheduler, optimizer, warmup, updates))
    confusion = Confusion() if confusion is None else confusion
    average = Average(accelerator.unwrap_model(model), options.ema_decay) if options.ema_decay else None
    best = Best(accelerator.unwrap_model(model)) if validation else None
    parts: dict[str, Part] = {} if average is None else {"average": average}
    if best is not None:
        parts |= {"best": best, "best_confusion": confusion}

    def step(batch: dict[str, torch.Tensor]) -> float:
        with accelerator.accumulate(model):
            with exact_backward(model) if progress.updates < run.exact_steps else nullcontext():
                loss = loss_of(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients and options.max_grad_norm:
                # The parameters of the prepared model, since sharding has replaced `weights`.
                accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                scheduler.step()
                if average is not None:
                    average.update()
            optimizer.zero_grad()
        return accelerator.reduce(loss.detach(), "mean").item()

    def close_epoch() -> None:
        """Score the current weights, or their average, and keep them if they are the best so far."""
        with average.applied() if average is not None else nullcontext():
            tested = Confusion()
            if run.scores_last_only and progress.epoch < run.epochs - 1:
                progress.next_epoch(math.nan)
                return
            scores = [test(accelerator, task, model, test_loader, options, tested)]
            scores += [test(accelerator, task, model, loader, options) for loader in validation]
            progress.next_epoch(*scores)
            if best is None:
                confusion.load_state_dict(tested.state_dict())
            elif kept_epoch(progress.history) == progress.epoch - 1:
                confusion.load_state_dict(tested.state_dict())
                best.keep()

    progress = Progress(**((load_checkpoint(accelerator, run.folder, parts) if options.resume else None) or {}))
    length, quiet = len(train_loader), not accelerator.is_main_process
    run.remaining.begin((progress.epoch * length + progress.batch) / (run.epochs * length))
    with tqdm(total=run.epochs * length, desc=run.label, unit="step", disable=quiet) as bar:
        bar.update(progress.epoch * length + progress.batch)
        while not is_over(progress.history, run.epochs, options.patience if validation else None):
            images.epoch = progress.epoch
            train_mode(model)
            batches = accelerator.skip_first_batches(train_loader, progress.batch) if progress.batch else train_loader
            for batch in batches:
                start = time.perf_counter()
                drawn = run.seed, progress.epoch, progress.batch, accelerator.process_index
                loss = step(task.mix(batch, drawn, options))
                progress.seconds += time.perf_counter() - start
                progress.loss += loss
                progress.batch += 1
                run.remaining.at((progress.epoch * length + progress.batch) / (run.epochs * length))
                bar.set_postfix_str(shown(progress, run), refresh=False)
                bar.update()
                if accelerator.sync_gradients:
                    progress.updates += 1
                    log(accelerator, run, progress, {"loss": loss, "learning rate": scheduler.get_last_lr()[0]})
                    if options.checkpoint_every and progress.updates % options.checkpoint_every == 0:
                        write_checkpoint(accelerator, run.folder, progress, parts)
            close_epoch()
            done = progress.history[-1]
            log(accelerator, run, progress, {f"epoch {name}": value for name, value in done.items()})
            bar.set_postfix_str(shown(progress, run))
    run.remaining.end()
    if len(progress.history) < run.epochs:
        accelerator.print(
            f"{run.label}: stopped after {len(progress.history)} of {run.epochs} epochs, {options.patience} without a "
            "better validation score."
        )
    if best is not None:
        best.restore()
    elif average is not None:
        average.apply()

    model = whole_model(accelerator, model, plain)
    accelerator.free_memory()
    return model, progress.history


def write_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, parts: dict[str, Part]) -> None:
    """Save a checkpoint. If the disk is full, a single process continues without one."""
    try:
        save_checkpoint(accelerator, folder, progress.updates, dataclasses.asdict(progress), parts)
    except Exception as error:
        if accelerator.num_processes > 1 or not is_failed_write(error):
            raise
        shutil.rmtree(folder / "checkpoint.new", ignore_errors=True)
        warnings.warn(
            f"No checkpoint could be written to {folder}: {cause_of(error)}. Training continues.", stacklevel=2
        )


def check_scheduler(options: Options) -> None:
    """Check the schedule by building it for an optimiser that is not used.

    Raises:
        ValueError: transformers has no such schedule.
        TypeError: it needs arguments that the options do not have.
    """
    get_scheduler(options.scheduler, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 2)


@torch.no_grad()
def test(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    options: Options,
    confusion: Confusion | None = None,
) -> float:
    """The metric over the images of the loader, which are also counted in the confusion matrix."""
    metric = load_metric(task.metric, options)
    model.eval()
    for batch in loader:
        labels = batch.pop("labels")
        counts = task.add_batch(metric, accelerator, model(**batch).logits, labels, options)
        if confusion is not None:
            confusion.add(counts)
    return score(metric, options)


def shown(progress: Progress, run: Run) -> str:
    """Values for the progress bar: the mean loss of the epoch so far, the last scores, and the remaining time."""
    loss = progress.loss / progress.batch if progress.batch else progress.history[-1]["loss"]
    parts = [f"loss={loss:.3f}"]
    if progress.history:
        names = {"validation": "val", "score": "test"}
        last = progress.history[-1]
        parts += [f"{short}={100 * last[name]:.1f} %" for name, short in names.items() if name in last]
    return ", ".join([*parts, *run.remaining.shown()])


def log(accelerator: Accelerator, run: Run, progress: Progress, values: dict[str, float]) -> None:
    """Send values to the trackers, if any, under the run's name."""
    accelerator.log({f"{run.label}/{name}": value for name, value in values.items()}, step=progress.updates)
