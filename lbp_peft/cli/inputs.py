"""Loads the model and the batches that the flags name."""

from __future__ import annotations

import importlib.util
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    ViTImageProcessor,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..loading.classification import ClassificationData, load_classification
from ..loading.datasources import Source, columns_of, load_splits
from ..loading.models import class_names, explain_failures, forward_arguments
from ..loading.options import as_size, option
from ..loading.places import local_folder
from ..loading.preprocessing import Preprocessor
from ..loading.segmentation import (
    SegmentationData,
    label_map,
    leave_out_of_loss,
    load_segmentation,
    load_segmentation_model,
)
from ..loading.storedimages import open_image, why_unreadable
from ..loading.terminal import cause_of, say
from ..loading.views import View

_BATCHES = 2
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass
class InputOptions(ClassificationData, SegmentationData):
    """The options for the model, and for images or the size of random ones."""

    # Flags of the programs that train and test, which have no effect on what is measured.
    test_files: list[str] | None = option(None, SUPPRESS)
    test_split: str | None = option(None, SUPPRESS)
    held_out: float = option(0.2, SUPPRESS)
    test_images: int | None = option(None, SUPPRESS)
    train_images: int | None = option(None, SUPPRESS)
    train_images_per_class: int | None = option(None, SUPPRESS)
    random_images: list[int] | None = option(
        None, "Random images of this size in place of data: the side of a square, or height and width. (default: none)"
    )
    task: Literal["classification", "segmentation"] | None = option(
        None, "What the model is for. (default: segmentation where the data has label maps, or the checkpoint says so)"
    )
    batch_size: int = option(8, "Images in a batch.")
    random_weights: bool = option(False, "Take the architecture of --model alone, with random weights.")
    timm_weights: str | None = option(None, "File with the weights of a --model of timm. (default: timm's own)")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Precision of the forward pass, by autocast.")
    device: str = option("auto", "cpu, cuda, ... (default: a GPU where there is one)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_images and (len(self.random_images) > 2 or min(self.random_images) < 1):
            raise ValueError("--random_images takes one side or two, height and width, of at least 1 pixel")

    def check_together(self) -> None:
        super().check_together()
        if not self.model:
            raise ValueError("give --model, a hub id, a local folder or a name of timm's")
        if sum(map(bool, (self.dataset, self.train_files, self.random_images))) != 1:
            raise ValueError("give exactly one of --dataset, --train_files and --random_images")

    @property
    def names_inputs(self) -> bool:
        return True  # which check_together has made sure of

    @property
    def needs_test(self) -> bool:
        return False  # all images may be measured on


@dataclass
class Inputs:
    """A model on its device, batches, and the loss function.

    Attributes:
        loss_fn: (model, batch) -> scalar loss; None: the model returns it.
        size: (height, width) of the images.
    """

    model: nn.Module
    batches: list[dict[str, Any]]
    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    size: tuple[int, int]
    task: str


def load_inputs(options: InputOptions) -> Inputs:
    """Load the model and the batches that the flags name.

    Raises:
        SystemExit: the model or the data cannot be loaded, or no image can be read.
    """
    assert options.model is not None
    device = _choose_device(options.device)
    timm_name = _is_of_timm(options.model)
    if not timm_name:
        options.model = str(local_folder(options.model, "--model") or options.model)
    source, task = _load_source(options)
    if timm_name:
        inputs = _load_from_timm(options, source)
    else:
        inputs = _load_from_transformers(options, source, task or _task_of_checkpoint(options.model))
    inputs.model.to(device)
    return inputs


def loss_of_timm(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of the logits, summed over heads if there are several, as with distillation."""
    logits = model(batch["pixel_values"])
    heads = logits if isinstance(logits, tuple) else (logits,)
    return torch.stack([nn.functional.cross_entropy(each, batch["labels"]) for each in heads]).sum()


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {name}: {cause_of(error)}") from None
    return device


def _load_source(options: InputOptions) -> tuple[Source | None, str | None]:
    """The data and its task; None for random data, and for an unknown task."""
    if options.random_images:
        return None, options.task
    task = options.task
    if task is None:
        folder = local_folder(options.dataset, "--dataset") if options.dataset else None
        has_pairs = folder is not None and any((part / "masks").is_dir() for part in (folder, *folder.iterdir()))
        if has_pairs or options.mask_column:
            task = "segmentation"
        else:
            task = "segmentation" if len(columns_of(load_splits(options)[0], Image)) > 1 else "classification"
    return (load_segmentation if task == "segmentation" else load_classification)(options), task


def _is_of_timm(name: str) -> bool:
    if Path(name).expanduser().exists():
        return False
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:  # without an origin, it is some folder called timm
        if "/" not in name:
            say(f"There is no folder {name} here, and timm, which has models by such names, is not installed.")
        return False
    import timm

    return bool(timm.is_model(name))


def _load_from_timm(options: InputOptions, source: Source | None) -> Inputs:
    import timm

    assert options.model is not None
    set_seed(0)
    file = options.timm_weights
    if file is not None and not Path(file).expanduser().is_file():
        raise SystemExit(f"--timm_weights {file}: there is no such file")
    try:
        model = timm.create_model(
            options.model, pretrained=not (file or options.random_weights), checkpoint_path=file or ""
        )
    except Exception as error:  # errors of the hub, of files, or of shapes
        raise SystemExit(
            f"--model {options.model}: timm cannot load its weights ({cause_of(error)}). Give --random_weights, or "
            "their file as --timm_weights"
        ) from None
    if source is not None:
        model.reset_classifier(len(source.names))
    config = timm.data.resolve_model_data_config(model)
    size = as_size(options.random_images or options.image_size) or tuple(config["input_size"][1:])
    if source is None:
        return Inputs(
            model, _random_batches(options, size, model.num_classes, ()), loss_of_timm, size, "classification"
        )
    sides = {"height": size[0], "width": size[1]}
    processor = ViTImageProcessor(size=sides, image_mean=list(config["mean"]), image_std=list(config["std"]))

    def pixels(image: Any) -> Tensor:
        values: Tensor = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return values

    return Inputs(
        model, _load_batches(options, source, "classification", pixels, size, {}), loss_of_timm, size, "classification"
    )


def _load_from_transformers(options: InputOptions, source: Source | None, task: str) -> Inputs:
    assert options.model is not None
    auto_model = AutoModelForSemanticSegmentation if task == "segmentation" else AutoModelForImageClassification
    path = options.model
    folder = local_folder(path, "--model")
    with explain_failures(path):
        config = AutoConfig.from_pretrained(path)
    names = source.names if source else list(config.id2label.values())
    is_empty = folder is not None and not any((folder / name).exists() for name in _WEIGHTS)
    if options.random_weights or is_empty:
        if is_empty and not options.random_weights:
            say(f"{path} holds no weights, only a configuration: random weights are used.")
            options.random_weights = True
        set_seed(0)
        for key, value in class_names(names).items():
            if key != "num_labels":
                setattr(config, key, value)
        leave_out_of_loss(options.ignore_index, config)
        with explain_failures(path):
            model: PreTrainedModel = auto_model.from_config(config)
    else:
        model = load_segmentation_model(auto_model, path, names, 0, options)
    if source is None:
        size = as_size(options.random_images)
        assert size is not None
        batches = _random_batches(options, size, len(names), size if task == "segmentation" else ())
        extra = forward_arguments(model, size)
        return Inputs(model, [{**batch, **extra} for batch in batches], None, size, task)
    preprocessor = Preprocessor(options, model.config, whole_image=task == "segmentation")
    if preprocessor.notice:
        say(preprocessor.notice)
    size = preprocessor.size
    batches = _load_batches(options, source, task, preprocessor, size, forward_arguments(model, size))
    return Inputs(model, batches, None, size, task)


def _task_of_checkpoint(path: str) -> str:
    with explain_failures(path):
        config = AutoConfig.from_pretrained(path)
    is_for_maps = any("Segmentation" in name for name in config.architectures or [])
    return "segmentation" if is_for_maps else "classification"


def _random_batches(
    options: InputOptions, size: tuple[int, int], classes: int, map_size: tuple[int, ...]
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(options.data_seed)
    return [
        {
            "pixel_values": torch.randn(options.batch_size, 3, *size, generator=generator),
            "labels": torch.randint(classes, (options.batch_size, *map_size), generator=generator),
        }
        for _ in range(_BATCHES)
    ]


def _load_batches(
    options: InputOptions,
    source: Source,
    task: str,
    pixels: Callable[[Any], Tensor],
    size: tuple[int, int],
    extra: dict[str, Any],
) -> list[dict[str, Any]]:
    """Batches of images drawn from the training images, which repeat if there are too few."""
    num_images = _BATCHES * options.batch_size
    stored = source.train.cast_column("image", Image(decode=False))
    if task == "segmentation":
        stored = stored.cast_column("label", Image(decode=False))
    examples: list[tuple[Tensor, Any]] = []
    failures: list[str] = []
    # In a random order, since data sets are often sorted by class.
    for row in np.random.default_rng(options.data_seed).permutation(len(stored))[: 4 * num_images]:
        example = stored[int(row)]
        try:
            image = open_image(example["image"] or {})
            label: Any = example["label"]
            if task == "segmentation":
                whole = View((0, 0, image.width, image.height))
                label = whole.of(label_map(open_image(label or {}), options), size, Resampling.NEAREST)
                label = torch.from_numpy(np.array(label, dtype=np.int64))
            examples.append((pixels(image), label))
        except Exception as error:  # Pillow's decoders raise exceptions of many types
            failures.append(f"{(example['image'] or {}).get('path') or f'row {row}'} ({why_unreadable(error)})")
        if len(examples) == num_images:
            break
    if not examples:
        raise SystemExit(f"none of the images can be used: {failures[0]}")
    if failures and not options.skip_broken:
        raise SystemExit(f"{failures[0]} cannot be used: repair or remove it, or give --skip_broken to leave it out")
    batches = []
    for start in range(0, num_images, options.batch_size):
        chosen = [examples[index % len(examples)] for index in range(start, start + options.batch_size)]
        labels = [label for _, label in chosen]
        batches.append(
            {
                "pixel_values": torch.stack([image for image, _ in chosen]),
                "labels": torch.stack(labels) if task == "segmentation" else torch.tensor(labels),
                **extra,
            }
        )
    return batches
