"""Pre-train a model of timm from scratch, where its published weights cannot be had.

    python examples/paper/pretrain.py --model efficientformer_l1 --dataset cifar100-first-half --output pretrained

trains on the first half of CIFAR-100's classes, so that `run.py --dataset cifar100-second-half` can adapt the model to
the other half. Flags override the recipe, as with `run.py`. All images must have one size. The folder gets
`NAME.safetensors`, for --weights of `run.py`, and a record `NAME.json`. With --checkpoint_every, a run that was killed
goes on if it is started again with --resume and the same options; other options are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets
import numpy as np
import torch
from common.checkpoints import remove_checkpoints, write_whole
from common.experiment import prepare_output
from common.images import EpochOrder
from common.processes import make_accelerator, on_main
from common.training import Run, train
from PIL.Image import Image
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lbp_peft.environment import environment
from lbp_peft.loading.options import as_size
from lbp_peft.loading.terminal import plain_messages
from paper.data import load_source
from paper.models import BACKBONES, DERIVED_BUFFERS, load_timm
from paper.recipe import TABLES, recipe

# The options that the result depends on, which the record has.
_OF_RESULT = (
    "image_size", "train_images", "train_images_per_class", "test_images", "data_seed", "classes", "epochs",
    "batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "scheduler", "warmup_steps",
    "warmup_ratio", "max_grad_norm", "mixed_precision", "mixup", "cutmix", "ema_decay", "seeds",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    own, flags = parser().parse_known_args(arguments)
    options = recipe("classification", own.dataset, flags, own.data)
    if len(options.seeds) > 1:
        raise SystemExit(f"--seeds: one model is pre-trained, so give one seed, not {len(options.seeds)}")
    task, seed = TABLES["classification"](), options.seeds[0]
    size, architecture = as_size(options.image_size), str(BACKBONES[own.model].architecture)
    folder = own.output / own.model
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(options)
    if not options.resume:
        on_main(accelerator, remove_checkpoints, folder)
    on_main(accelerator, prepare_output, replace(options, output=str(folder)), [])
    source = load_source(task, options)
    model = load_timm(architecture, None, source.names, seed, size)
    model.to(memory_format=torch.channels_last)  # with this, convolutions on CPUs take two thirds as long
    prepare = SmallImageCollator(model.timm_model.pretrained_cfg, size)
    images = SmallImages(source.train, train=True, seed=seed), SmallImages(source.test, train=False)
    loaders = [
        DataLoader(
            part,
            batch_size=options.batch_size if part.train else options.eval_batch_size,
            sampler=EpochOrder(part) if part.train else None,
            collate_fn=prepare,
            num_workers=options.workers,
            generator=torch.Generator().manual_seed(seed),
        )
        for part in images
    ]
    run = Run("pre-training", folder, options.epochs, options.learning_rate, seed, scores_last_only=True)
    model, history = train(accelerator, task, model, loaders, run, options)
    if not accelerator.is_main_process:
        return
    state = model.timm_model.state_dict()
    file = own.output / f"{own.model}.safetensors"
    new = file.with_suffix(".new")
    save_file({name: value.contiguous() for name, value in state.items() if not name.endswith(DERIVED_BUFFERS)}, new)
    os.replace(new, file)
    record = {
        "config": {"model": own.model, **{name: getattr(options, name) for name in _OF_RESULT}},
        "score": history[-1]["score"],
        "losses": [epoch["loss"] for epoch in history],
        "training_seconds": sum(epoch["seconds"] for epoch in history),
        "environment": environment(),
    }
    write_whole(file.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    remove_checkpoints(folder)
    accelerator.print(f"{file}: {task.metric_name} {100 * record['score']:.1f} % on the test images of these classes")


class SmallImages(Dataset):
    """Images of one size, all in memory: shape (3, height, width), uint8.

    In training, half of them are mirrored, and all are shifted by up to an eighth of each side. A batch is enlarged at
    once by [`SmallImageCollator`], since enlarging images one by one would take as long as a training step.

    Raises:
        SystemExit: the images differ in size.
    """

    def __init__(self, dataset: datasets.Dataset, *, train: bool, seed: int = 0):
        pixels = [_pixels(image) for image in dataset["image"]]
        if sizes := {tuple(one.shape[1:]) for one in pixels} - {tuple(pixels[0].shape[1:])}:
            raise SystemExit(f"pre-training needs images of one size, not of {pixels[0].shape[1:]} and {sizes.pop()}")
        self.pixels = torch.stack(pixels)
        self.size = self.pixels.shape[-2:]
        self.labels = list(dataset["label"])
        self.train, self.seed, self.epoch = train, seed, 0
        if train:
            top, left = (side // 8 for side in self.size)
            self.pixels = functional.pad(self.pixels.float(), (left, left, top, top), mode="reflect").byte()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixels[int(index)]
        if self.train:
            random = np.random.default_rng((self.seed, self.epoch, int(index)))
            pixels = pixels.flip(-1) if random.random() < 0.5 else pixels
            sides = zip(pixels.shape[1:], self.size, strict=True)
            top, left = (random.integers(0, padded - side + 1) for padded, side in sides)
            pixels = pixels[:, top : top + self.size[0], left : left + self.size[1]]
        return {"pixel_values": pixels, "labels": self.labels[int(index)]}


class SmallImageCollator:
    """Stacks images, enlarges and normalises them.

    Args:
        settings: The model's `pretrained_cfg`.
        size: (height, width) in pixels; None: the model's own.
    """

    def __init__(self, settings: dict[str, Any], size: tuple[int, int] | None):
        self.size = size or tuple(settings["input_size"][1:])
        self.mean, self.std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([example["pixel_values"] for example in examples]).float() / 255
        pixels = functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": labels}


def _pixels(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of_timm = [name for name, backbone in BACKBONES.items() if backbone.architecture is not None]
    result.add_argument("--model", choices=of_timm, required=True)
    result.add_argument("--dataset", required=True, help="a recipe: its name in recipes/, or a YAML file")
    result.add_argument("--data", help="folder or name on the hub, in the place of the recipe's")
    result.add_argument("--output", type=Path, default=Path("runs/pretrained"), help="folder of the weights")
    return result


if __name__ == "__main__":
    with plain_messages(training=True):
        main()
