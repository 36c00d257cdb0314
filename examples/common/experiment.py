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
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader

from lbp_peft.loading.datasources import Source, draw
from lbp_peft.loading.models import class_names, forward_arguments
from lbp_peft.loading.options import parse
from lbp_peft.loading.places import local_folder
from lbp_peft.loading.preprocessing import Preprocessor
from lbp_peft.loading.terminal import cause_of, say

from .adapters import processor_in_effect, write_beside
from .checkpoints import KEPT, checkpoints, remove_checkpoints, write_whole
from .images import Images, loader
from .measuring import Cost, measure_costs
from .methods import METHODS, Method, chosen_methods
from .metrics import Confusion, load_metric, per_class_scores
from .model_card import Card, describe_data
from .models import head_modules, trainable_parameters
from .options import Options
from .outputs import OPTIONS, default_output, output_folder, write_somewhere
from .processes import SHARDED, make_accelerator, on_main
from .remaining import Remaining
from .report import Row, plot, show_confusions, table, write_classes_json, write_json
from .selection import kept_epoch, with_validation
from .soundness import sound
from .task import Task
from .training import Run, check_scheduler, train

RECORD, CONFUSION = "history.json", "confusion.json"  # of a part that is finished
REPORTS = ("table.txt", "results.json", "plot.png", "predictions.png", "classes.json", "confusion.png")


@dataclass
class Experiment:
    """One model and one set of images, for all methods."""

    task: Task
    options: Options
    accelerator: Accelerator
    source: Source
    runs: int = 1

    def __post_init__(self) -> None:
        self.output = Path(self.options.output or "runs")
        self.places: dict[Path, Path] = {}  # the folders of parts that could not be written to their own
        self.remaining = Remaining(self.runs)
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
        model = self.task.model(self.options.model, self.source.names, seed, self.options)
        model.name_or_path = self.options.model  # which adapters record; a new head on a backbone has no name
        return model

    def loaders(self, seed: int) -> list[DataLoader]:
        """The loaders of training images, test images and, if there are any, validation images."""
        how = self.task, self.preprocessor, self.options
        images = [Images(self.source.train, *how, train=True, seed=seed)]
        images += [Images(one, *how, train=False) for one in (self.source.test, self.source.validation) if one]
        return [loader(one, self.options, self.extra) for one in images]

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
        """Adapt the model by each method once, so that errors show before training.

        Returns:
            How many bytes the run will write.
        """
        largest = total = 0
        for method in methods:
            base = self.base(seed=0)
            frozen = sum(parameter.numel() for parameter in base.parameters())
            try:
                model = method.adapt(base, self.options)
            except (TypeError, ValueError) as error:
                names = self.options.lora_target_modules
                advice = f". Check --lora_target_modules {' '.join(names)}" if names else ""
                raise SystemExit(f"{method.label}: {cause_of(error)}{advice}") from None
            trained = trainable_parameters(model)
            total += 4 * trained * len(method.parts(model)) * len(self.options.seeds)
            # All weights. Trained ones count again for two moments of the optimiser, the best and the average weights.
            kept = 2 + self.options.needs_validation + bool(self.options.ema_decay)
            # The checkpoint that is being written is in addition to those that are kept.
            largest = max(largest, 4 * (frozen + kept * trained) * (KEPT + 1))
        return total + (largest if self.options.checkpoint_every else 0)

    def adapt(self, method: Method, seed: int) -> list[dict[str, float]]:
        """Train one method with one seed, write its adapter and check that it reloads.

        Returns:
            Loss, score and seconds of every epoch; taken from the record if a resumed run had finished this part.
        """
        folder = self.folder(method, seed)
        if history := on_main(self.accelerator, self.finished, folder):
            self.remaining.skip()
            return history

        base = self.base(seed)
        heads = head_modules(base, self.options) if self.options.head_learning_rate else ()
        model = method.adapt(base, self.options)
        loaders = self.loaders(seed)
        label = method.label if len(self.options.seeds) == 1 else f"{method.label}, seed {seed}"
        run = Run(
            label, folder, self.options.epochs, method.learning_rate, seed, heads, self.options.head_learning_rate,
            self.options.exact_steps, self.remaining,
        )  # fmt: skip
        confusion = Confusion()
        model, history = train(self.accelerator, self.task, model, loaders, run, self.options, confusion)

        def save(folder: Path) -> None:
            batch = next(iter(loaders[1]))
            labels = batch.pop("labels")
            counts = None if confusion.counts is None else confusion.counts.tolist()
            for name, part in method.save(model, folder).items():
                # Another seed gives another head, so agreement shows that the adapter contains the head.
                reloaded = method.reload(self.base(seed + 1), folder / name)
                logits = self.check_same(model, reloaded, batch, label)
                card = self.card(method, seed, part, history, counts, folder / name)
                write_beside(part, self.preprocessor, card.text(), folder / name)
            self.task.keep_examples(folder, logits, labels)
            write_whole(folder / CONFUSION, json.dumps(counts))
            write_whole(folder / RECORD, json.dumps(history))
            remove_checkpoints(folder)

        self.places[folder] = on_main(self.accelerator, write_somewhere, save, folder)
        return history

    def card(
        self,
        method: Method,
        seed: int,
        model: nn.Module,
        history: list[dict[str, float]],
        counts: list[list[int]] | None,
        folder: Path,
    ) -> Card:
        """The model card of a folder of weights."""
        options, kept, source = self.options, kept_epoch(history), self.source
        peft_type = model.active_peft_config.peft_type.value if isinstance(model, PeftModel) else None
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        scores = {"test": history[kept]["score"]}
        if "validation" in history[kept]:
            scores["validation"] = history[kept]["validation"]
        settings = {
            "method": method.label,
            "seed": seed,
            "peak learning rate": method.learning_rate,
            "schedule": options.scheduler,
            "epochs": f"{len(history)}, kept: the weights after epoch {kept + 1}",
            "batch size": options.batch_size * self.accelerator.num_processes * options.gradient_accumulation_steps,
            "weight decay": options.weight_decay,
            "precision": self.accelerator.mixed_precision if self.accelerator.mixed_precision != "no" else "float32",
        }
        if options.ema_decay:
            settings["averaged weights, decay"] = options.ema_decay
        per_class = {}
        if counts is not None:
            values = per_class_scores(torch.tensor(counts))[self.task.class_score]
            per_class = dict(zip(source.names, values, strict=True))
        images = {"training": len(source.train), "test": len(source.test)}
        if source.validation:
            images["validation"] = len(source.validation)
        processor = processor_in_effect(self.preprocessor)
        by_pipeline = self.task.pipeline != "image-segmentation" or hasattr(
            processor, "post_process_semantic_segmentation"
        )
        remark = ""
        if folder.name == "stack":
            remark = "It is for going on with training; `adapter` beside it, without LBP-WHT, is for inference."
        elif method.config and peft_type == "LORA" and (folder.parent / "stack").exists():
            remark = "It was trained with LBP-WHT on top; to go on so, use `stack` beside it."
        return Card(
            task=self.task.pipeline,
            auto_model=self.task.auto_model.__name__,
            base=options.model,
            folder=folder,
            method=method.label,
            peft_type=peft_type,
            settings=settings,
            images=images,
            names=source.names,
            metric=self.metric,
            scores=scores,
            data=describe_data(options),
            per_class=per_class,
            arguments=self.extra,
            has_pipeline=by_pipeline,
            head_on_backbone=type(plain).__name__ if getattr(options, "head", None) else None,
            remark=remark,
        )

    @property
    def metric(self) -> str:
        """The metric's name in the report."""
        return Path(self.options.metric or self.task.metric_name).stem

    def confusion(self, method: Method) -> torch.Tensor | None:
        """The confusion matrix of the test images, over all seeds of a method; None if it was not counted."""
        total = Confusion()
        for seed in self.options.seeds:
            file = self.folder(method, seed) / CONFUSION
            counts = json.loads(file.read_text()) if file.exists() else None
            total.add(None if counts is None else torch.tensor(counts))
        return total.counts

    def finished(self, folder: Path) -> list[dict[str, float]] | None:
        """The record of a part that the run to be resumed has finished; None if it has to be trained."""
        file = folder / RECORD
        if not (self.options.resume and file.exists()):
            return None
        try:
            epochs = json.loads(file.read_text())
            names = ["loss", "score", *(["validation"] if self.options.needs_validation else []), "seconds"]
            history = [{name: float(epoch[name]) for name in names} for epoch in epochs]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"Refused: {file} cannot be read ({error}). This part is trained again.")
            return None
        remove_checkpoints(folder)  # the run may have been killed before it did so
        return history

    @torch.no_grad()
    def check_same(
        self, model: nn.Module, reloaded: nn.Module, batch: dict[str, torch.Tensor], label: str
    ) -> torch.Tensor:
        """The model's logits, after a check that those of the reloaded model are the same."""
        batch = send_to_device(batch, self.accelerator.device)
        first, second = (m.to(self.accelerator.device).eval()(**batch).logits for m in (model, reloaded))
        if not torch.equal(first, second):
            raise SystemExit(
                f"{label}: the reloaded adapter predicts differently, by {(first - second).abs().max():.2e}"
            )
        return first

    def report_classes(self, methods: list[Method], output: Path) -> None:
        """Write the scores of each class and the confusion matrices into a folder, as JSON and as a figure."""
        counts = {method.label: self.confusion(method) for method in methods}
        counted = {label: matrix for label, matrix in counts.items() if matrix is not None}
        if not counted:
            return
        names = self.source.names
        record = {
            label: {"scores": per_class_scores(matrix), "confusion": matrix.tolist()}
            for label, matrix in counted.items()
        }
        write_classes_json(output / "classes.json", names, record)
        show_confusions(output / "confusion.png", counted, names, self.task.counted)

    def costs(self, methods: list[Method]) -> tuple[Cost, list[Cost]]:
        """The costs of a step with full fine-tuning and with each method."""
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
    return Source(train, test, source.names, source.validation)


def load(accelerator: Accelerator, task: Task, options: Options) -> Source:
    """Load and check the part of the data that the options use. If that fails, all processes stop."""
    if options.embedded:
        source = shrink(task, task.embedded().new(), options)
    else:
        loaded: list[Source] = []
        on_main(accelerator, lambda: loaded.append(task.load(options)))  # the others then find it in the cache
        source = loaded[0] if loaded else task.load(options)
        source = sound(accelerator, task, shrink(task, source, options), options)
    if options.needs_validation:
        source, notice = with_validation(task, source, options)
        accelerator.print(notice)
    return source


def pretraining(output: Path) -> tuple[Path, Path, Path]:
    """Folders of the embedded example's model: while it is trained, as it is written, and whole."""
    return output / "untrained", output / "pretrained.new", output / "pretrained"


def pretrain(task: Task, options: Options, accelerator: Accelerator, names: list[str]) -> Options:
    """Train the embedded example's small model; return the options with it as the model to adapt.

    Args:
        names: The names of the classes that it will be adapted to.
    """
    example = task.embedded()
    untrained, new, trained = pretraining(Path(options.output))

    def begin() -> bool:
        """Whether the model has to be trained."""
        shutil.rmtree(new, ignore_errors=True)
        if trained.exists() or not checkpoints(untrained):
            shutil.rmtree(untrained, ignore_errors=True)
        if not trained.exists() and not untrained.exists():
            example.save(example.model(), untrained)
        return not trained.exists()

    def end(model: transformers.PreTrainedModel) -> None:
        for name, value in class_names(names).items():  # for those who load an adapter together with its base
            setattr(model.config, name, value)
        example.save(model, new)
        new.rename(trained)  # so that it is written atomically
        shutil.rmtree(untrained)

    if on_main(accelerator, begin):
        # The choice of weights and augmentation are for the methods that are compared, not for their common start.
        plain = {"keep_best": False, "patience": None, "ema_decay": None}
        plain |= {"rand_augment": None, "mixup": 0.0, "cutmix": 0.0}
        plain = {name: value for name, value in plain.items() if hasattr(options, name)}
        settings = dataclasses.replace(options, model=str(untrained), **plain)
        experiment = Experiment(task, settings, accelerator, example.known())
        run = Run(example.label, untrained, example.epochs, example.learning_rate)
        model, _ = train(accelerator, task, experiment.base(seed=0), experiment.loaders(seed=0), run, settings)
        on_main(accelerator, end, model)
    return dataclasses.replace(options, model=str(trained))


def part(output: Path, method: Method, seed: int) -> Path:
    """The folder of one method and seed."""
    return output / method.folder / f"seed-{seed}"


def prepare_output(options: Options, methods: list[Method]) -> None:
    """Write the options to the output folder, and check that a resumed run has the same ones as before.

    If a run starts from the beginning, everything is removed that a later `--resume` could take for its own.
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
            raise SystemExit(
                f"cannot resume {options.output}: it ran with another {', '.join(differing)}. Give the same options as "
                f"before ({file} lists them), or --overwrite to start again"
            )
    elif options.resume:
        say(f"There is no run in {output} to resume; a new one starts.")
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
        raise SystemExit(
            f"--output {output} cannot be written to ({error.strerror or error}): give another folder"
        ) from None


def check_space(output: Path, needed: int) -> None:
    """Stop before training if the disk is too small for the files of the run."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise SystemExit(
            f"--output {output}: the run writes about {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free there"
        )


def checked(flag: str, function: Callable[..., Any], *values: Any) -> Any:
    """Call a function of a flag's value. If it fails, stop with a line that names the flag."""
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
    task.check(options)
    accelerator = checked("--mixed_precision or --report_to", make_accelerator, options)
    if accelerator.distributed_type in SHARDED and (options.needs_validation or options.ema_decay):
        raise SystemExit(
            "--keep_best, --patience and --ema_decay need whole weights on each process: use DDP for them."
        )
    checked("--metric", load_metric, task.metric, options)
    checked("--scheduler", check_scheduler, options)
    output = on_main(accelerator, output_folder, options, default_output(task, options))
    options = dataclasses.replace(options, output=str(output))
    accelerator.project_configuration.set_directories(str(output))
    # The progress bars and notices of loading would come once for every copy of the model.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = load(accelerator, task, options)
    on_main(accelerator, prepare_output, options, methods)
    accelerator.init_trackers("lbp-peft", {name: str(value) for name, value in dataclasses.asdict(options).items()})

    if options.embedded:
        options = pretrain(task, options, accelerator, source.names)
    experiment = Experiment(task, options, accelerator, source, len(methods) * len(options.seeds))
    on_main(accelerator, check_space, output, experiment.rehearse(methods))
    histories = [[experiment.adapt(method, seed) for seed in options.seeds] for method in methods]

    if accelerator.is_main_process:
        reference, costs = experiment.costs(methods)
        rows = [
            Row(method.label, options.seeds, history, cost)
            for method, history, cost in zip(methods, histories, costs, strict=True)
        ]
        metric = experiment.metric
        report = table(rows, metric)
        seconds = time.perf_counter() - start
        folders = {method.label: experiment.folder(method, options.seeds[0]) for method in methods}

        def write_report(output: Path) -> None:
            (output / "table.txt").write_text(report + "\n")
            write_json(output / "results.json", rows, options, {"metric": metric, "wall_seconds": seconds})
            plot(output / "plot.png", rows, reference, metric)
            experiment.report_classes(methods, output)
            task.picture(output, experiment.source, folders, options)

        output = write_somewhere(write_report, experiment.output)
        print(f"\n{report}\n\nStep time: forward and backward, relative to full fine-tuning.")
        if options.needs_validation:
            print(f"The {metric} on test images is that of the epoch which is best on validation images.")
        print(
            f"Adapters reloaded, predictions agree. Table, plot and results.json in {output}. {seconds:.0f} s in all."
        )
    accelerator.end_training()
