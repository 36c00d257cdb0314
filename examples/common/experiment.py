"""An experiment: one model, one set of images, adapted by each method, tested, measured, saved and reloaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn
from torch.utils.data import DataLoader

from .checkpoints import KEPT, checkpoints, remove_checkpoints, write_whole
from .datasources import Source, draw
from .images import Images, Preprocessor, loader
from .measuring import Cost, measure_costs
from .methods import METHODS, Method, chosen_methods
from .metrics import load_metric
from .models import forward_arguments, head_modules, trainable_parameters
from .options import Options, parse
from .outputs import OPTIONS, default_output, output_folder, write_somewhere
from .places import local_folder
from .processes import make_accelerator, on_main
from .report import Row, plot, table, write_json
from .soundness import sound
from .task import Task
from .terminal import cause_of
from .training import Run, check_scheduler, train

RECORD = "history.json"  # of a part that is finished
REPORTS = ("table.txt", "results.json", "plot.png", "predictions.png")


@dataclass
class Experiment:
    """One model, one set of images, and all that is done with them."""

    task: Task
    options: Options
    accelerator: Accelerator
    source: Source

    def __post_init__(self) -> None:
        self.output = Path(self.options.output or "runs")
        self.places: dict[Path, Path] = {}  # where parts were written that could not be written to their own folders
        model = self.base(seed=0)
        self.preprocessor = Preprocessor(self.options, model.config, self.task.whole_image)
        self.extra = forward_arguments(model, self.preprocessor.size)
        self.try_forward(model)
        if self.preprocessor.notice:
            self.accelerator.print(self.preprocessor.notice)
        (height, width), heads = self.preprocessor.size, ", ".join(head_modules(model, self.options))
        train_images, test_images, classes = len(self.source.train), len(self.source.test), len(self.source.names)
        self.accelerator.print(
            f"{self.options.model}: {model.num_parameters() / 1e6:.1f} M parameters, "
            f"{height} x {width} pixels, head: {heads}.\n"
            f"{train_images} training and {test_images} test images of {classes} classes."
        )

    def base(self, seed: int) -> transformers.PreTrainedModel:
        return self.task.model(self.options.model, self.source.names, seed, self.options)

    def loaders(self, seed: int) -> tuple[DataLoader, DataLoader]:
        how = self.task, self.preprocessor, self.options
        train_images = Images(self.source.train, *how, train=True, seed=seed)
        test_images = Images(self.source.test, *how, train=False)
        return loader(train_images, self.options, self.extra), loader(test_images, self.options, self.extra)

    def folder(self, method: Method, seed: int) -> Path:
        folder = part(self.output, method, seed)
        return self.places.get(folder, folder)

    @torch.no_grad()
    def try_forward(self, model: nn.Module) -> None:
        """Refuse a size of images that the model cannot take."""
        height, width = self.preprocessor.size
        try:
            model.eval()(torch.zeros(1, 3, height, width), **self.extra)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            raise SystemExit(
                f"{self.options.model} cannot take images of {height} x {width} pixels: {cause_of(error)}. Give "
                "another --image_size, a multiple of the size of its patches."
            ) from None

    def rehearse(self, methods: list[Method]) -> int:
        """Adapt the model by each method once, so that mistakes come out before training.

        Returns:
            How many bytes the run will write.
        """
        largest = total = 0
        for method in methods:
            base = self.base(seed=0)
            frozen = sum(parameter.numel() for parameter in base.parameters())
            try:
                trained = trainable_parameters(method.adapt(base, self.options))
            except (TypeError, ValueError) as error:
                raise SystemExit(f"{method.label}: {cause_of(error)}") from None
            total += 4 * trained * len(self.options.seeds)
            # Weights and two moments of the optimizer; the checkpoint being written beside those that are kept.
            largest = max(largest, 4 * (frozen + 2 * trained) * (KEPT + 1))
        return total + (largest if self.options.checkpoint_every else 0)

    def adapt(self, method: Method, seed: int) -> list[dict[str, float]]:
        """Train one method with one seed, write its adapter and check that it reloads.

        Returns:
            Loss, score and seconds of every epoch; taken from the record if a resumed run had finished this part.
        """
        folder = self.folder(method, seed)
        if history := on_main(self.accelerator, self.finished, folder):
            return history

        model = method.adapt(self.base(seed), self.options)
        loaders = self.loaders(seed)
        label = method.label if len(self.options.seeds) == 1 else f"{method.label}, seed {seed}"
        run = Run(label, folder, self.options.epochs, method.learning_rate)
        model, history = train(self.accelerator, self.task, model, loaders, run, self.options)

        def save(folder: Path) -> None:
            model.save_pretrained(folder / "adapter")
            # Another seed gives another head: agreement then shows that the head, too, came with the adapter.
            reloaded = method.reload(self.base(seed + 1), folder / "adapter")
            batch = next(iter(loaders[1]))
            labels = batch.pop("labels")
            logits = self.check_same(model, reloaded, batch, label)
            self.task.keep_examples(folder, logits, labels)
            write_whole(folder / RECORD, json.dumps(history))
            remove_checkpoints(folder)

        self.places[folder] = on_main(self.accelerator, write_somewhere, save, folder)
        return history

    def finished(self, folder: Path) -> list[dict[str, float]] | None:
        """The record of a part that the run to be resumed had finished; None where there is something to train."""
        file = folder / RECORD
        if not (self.options.resume and file.exists()):
            return None
        try:
            epochs = json.loads(file.read_text())
            history = [{name: float(epoch[name]) for name in ("loss", "score", "seconds")} for epoch in epochs]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"Refused: {file} cannot be read ({error}). This part is trained again.")
            return None
        remove_checkpoints(folder)  # the run may have been killed before it did so
        return history

    @torch.no_grad()
    def check_same(
        self, model: nn.Module, reloaded: nn.Module, batch: dict[str, torch.Tensor], label: str
    ) -> torch.Tensor:
        """The model's logits; stop the program if those of the reloaded one differ."""
        batch = send_to_device(batch, self.accelerator.device)
        first, second = (m.to(self.accelerator.device).eval()(**batch).logits for m in (model, reloaded))
        if not torch.equal(first, second):
            raise SystemExit(
                f"{label}: the reloaded adapter predicts differently, by {(first - second).abs().max():.2e}"
            )
        return first

    def costs(self, methods: list[Method]) -> tuple[Cost, list[Cost]]:
        """What a step costs with full fine-tuning, and with each method."""
        seed = self.options.seeds[0]
        set_seed(seed)
        batch = send_to_device(next(iter(self.loaders(seed)[0])), self.accelerator.device)
        adapted = [method for method in methods if method.config]
        builders = [
            lambda method=method: method.adapt(self.base(seed), self.options)
            for method in [METHODS["full"](self.options), *adapted]
        ]
        reference, *others = measure_costs(self.accelerator, builders, batch, self.options.timing_rounds)
        found = dict(zip((method.folder for method in adapted), others, strict=True))
        return reference, [found.get(method.folder, reference) for method in methods]


def shrink(task: Task, source: Source, options: Options) -> Source:
    """The small-data protocol: few training images, and few to test on, both drawn by the seed of the data."""
    train, test = task.few(source, options), source.test
    if options.test_images:
        test = test.select(draw(len(test), options.test_images, options.data_seed, task.classes(test)))
    return Source(train, test, source.names)


def load(accelerator: Accelerator, task: Task, options: Options) -> Source:
    """The data that the options name, as far as it is used, and checked. If that fails, all processes stop."""
    loaded: list[Source] = []
    on_main(accelerator, lambda: loaded.append(task.load(options)))  # the others then find it in the cache
    source = loaded[0] if loaded else task.load(options)
    return sound(accelerator, task, shrink(task, source, options), options)


def pretraining(output: Path) -> tuple[Path, Path, Path]:
    """Folders of the embedded example's model: while it is trained, as it is written, and whole."""
    return output / "untrained", output / "pretrained.new", output / "pretrained"


def pretrain(task: Task, options: Options, accelerator: Accelerator) -> tuple[Options, Source]:
    """Train the embedded example's small model; return it as the model to adapt, and the data to adapt it to."""
    example = task.embedded()
    untrained, new, trained = pretraining(Path(options.output))

    def begin() -> bool:
        """Whether there is something to train."""
        shutil.rmtree(new, ignore_errors=True)
        if trained.exists() or not checkpoints(untrained):
            shutil.rmtree(untrained, ignore_errors=True)
        if not trained.exists() and not untrained.exists():
            example.save(example.model(), untrained)
        return not trained.exists()

    def end(model: transformers.PreTrainedModel) -> None:
        example.save(model, new)
        new.rename(trained)  # so that it is there whole or not at all
        shutil.rmtree(untrained)

    if on_main(accelerator, begin):
        settings = dataclasses.replace(options, model=str(untrained))
        experiment = Experiment(task, settings, accelerator, example.known())
        run = Run(example.label, untrained, example.epochs, example.learning_rate)
        model, _ = train(accelerator, task, experiment.base(seed=0), experiment.loaders(seed=0), run, settings)
        on_main(accelerator, end, model)
    return dataclasses.replace(options, model=str(trained)), example.new()


def part(output: Path, method: Method, seed: int) -> Path:
    """The folder of one method and seed."""
    return output / method.folder / f"seed-{seed}"


def prepare_output(options: Options, methods: list[Method]) -> None:
    """Write the options to the output folder; a resumed run must have those of the run it goes on with.

    Of a run that starts anew the folder keeps nothing that a later `--resume` could take for its own.
    """
    output = Path(options.output)
    file = output / OPTIONS
    record = dataclasses.asdict(dataclasses.replace(options, config=None, resume=False, overwrite=False))
    if options.resume and file.exists():
        try:
            before = dict(yaml.safe_load(file.read_text()))
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
            raise SystemExit(f"cannot resume {options.output}: {file} cannot be read ({cause_of(error)})") from None
        if differing := [
            name for name in record if name != "output" and record[name] != before.get(name, record[name])
        ]:
            raise SystemExit(f"cannot resume {options.output}: it ran with another {', '.join(differing)}")
    if not options.resume:
        parts = [part(output, method, seed) for method in methods for seed in options.seeds]
        for old in [*parts, *pretraining(output)]:
            shutil.rmtree(old, ignore_errors=True)
        for name in REPORTS:
            (output / name).unlink(missing_ok=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(file, yaml.safe_dump(record, sort_keys=False))
    except OSError as error:
        raise SystemExit(f"--output {output} cannot be written to: {error.strerror or error}") from None


def check_space(output: Path, needed: int) -> None:
    """Stop before training where the disk has no room for what it will write."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise SystemExit(
            f"--output {output}: the run writes about {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free there"
        )


def checked(flag: str, function: Callable[..., Any], *values: Any) -> Any:
    """What the function returns; if a flag's value makes it fail, a line that names the flag."""
    try:
        return function(*values)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{flag}: {cause_of(error)}") from None


def main(task: Task, description: str) -> None:
    """Run an example program: read its options, adapt by every method, compare, report."""
    start = time.perf_counter()
    options = parse(task.options, task.defaults, description)
    methods = chosen_methods(options)
    if options.model:
        options = dataclasses.replace(options, model=str(local_folder(options.model, "--model") or options.model))
    accelerator = checked("--mixed_precision or --report_to", make_accelerator, options)
    checked("--metric", load_metric, task.metric, options)
    checked("--scheduler", check_scheduler, options)
    output = on_main(accelerator, output_folder, options, default_output(task, options))
    options = dataclasses.replace(options, output=str(output))
    accelerator.project_configuration.set_directories(str(output))
    # The progress bars and notices of loading would come once for every copy of the model.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = None if options.embedded else load(accelerator, task, options)
    on_main(accelerator, prepare_output, options, methods)
    accelerator.init_trackers("lbp-peft", {name: str(value) for name, value in dataclasses.asdict(options).items()})

    if source is None:
        options, source = pretrain(task, options, accelerator)
        source = shrink(task, source, options)
    experiment = Experiment(task, options, accelerator, source)
    on_main(accelerator, check_space, output, experiment.rehearse(methods))
    histories = [[experiment.adapt(method, seed) for seed in options.seeds] for method in methods]

    if accelerator.is_main_process:
        reference, costs = experiment.costs(methods)
        rows = [
            Row(method.label, options.seeds, history, cost)
            for method, history, cost in zip(methods, histories, costs, strict=True)
        ]
        metric = Path(options.metric or task.metric_name).stem
        report = table(rows, metric)
        seconds = time.perf_counter() - start
        folders = {method.label: experiment.folder(method, options.seeds[0]) for method in methods}

        def write_report(output: Path) -> None:
            (output / "table.txt").write_text(report + "\n")
            write_json(output / "results.json", rows, options, {"metric": metric, "wall_seconds": seconds})
            plot(output / "plot.png", rows, reference, metric)
            task.picture(output, experiment.source, folders, options)

        output = write_somewhere(write_report, experiment.output)
        print(f"\n{report}\n\nStep time: forward and backward, relative to full fine-tuning.")
        print(
            f"Adapters reloaded, predictions agree. Table, plot and results.json in {output}. {seconds:.0f} s in all."
        )
    accelerator.end_training()
