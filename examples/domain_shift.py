"""Segment streets at dusk after training on them by day: a frozen ViT, LoRA, and LoRA with LBP-WHT.

    python examples/domain_shift.py --data camvid/ --model facebook/dinov2-small

Domain-generalised segmentation, the task of FADA (Bi et al., NeurIPS 2024): the weights of a pretrained ViT stay
frozen, little is trained on one domain, and what counts is the score on another that was never seen. Here the domains
are sequences of CamVid (Brostow et al., 2009). Two that were filmed by day are trained on, a third tests by day, and
0001TP, filmed at dusk, tests what carries over. Nothing of FADA itself is rebuilt: the program shows how these adapters
fare on its task.

The folder of the data holds `train.parquet` and `test.parquet` with the columns `image` and `label` (a map of class
numbers), in the order and with the 11 classes that SegNet's copy of CamVid has. The head is one linear layer on the
patches' features.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common.metrics import MeanIoU, confusion_matrix
from common.tables import aligned
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, get_cosine_schedule_with_warmup, set_seed

from lbp_peft import LBPWHTConfig
from lbp_peft.encoder import encoder_linears
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.loading.terminal import plain_messages

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
NOT_LABELLED = len(CLASSES)
# Rows of each file, by the sequence that they were filmed in.
SEQUENCES = {
    "train": {"0001TP": range(62), "0006R0": range(62, 163), "0016E5": range(163, 367)},
    "test": {"0001TP": range(62), "Seq05VD": range(62, 233)},
}
TRAINED_ON = (("train", "0006R0"), ("train", "0016E5"))
DAY, DUSK = (("test", "Seq05VD"),), (("train", "0001TP"), ("test", "0001TP"))
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet


class Segmenter(nn.Module):
    """A ViT with a linear head on the features of its patches.

    Args:
        backbone: A model that gives `last_hidden_state`, whose last tokens are the patches, row by row.
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, backbone: nn.Module, width: int, patch_size: int, classes: int):
        super().__init__()
        self.backbone, self.patch_size = backbone, patch_size
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, height, width) -> logits (N, classes, height / patch size, width / patch size)"""
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state[:, -height * width :]
        return self.head(tokens).mT.unflatten(2, (height, width))


def adapted(model: Segmenter, method: str) -> nn.Module:
    """The model, its head and what the method adds trained."""
    if method == "frozen":
        model.backbone.requires_grad_(False)
        return model
    targets = [f"backbone.{name}" for name in encoder_linears(model.backbone)]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["head"])
    if method == "lora":
        return get_peft_model(model, lora)
    return get_peft_model(model, LBPWHTConfig(r=10, stack_on=lora, modules_to_save=["head"], train_base_weight=False))


METHODS = ("frozen", "lora", "lora+lbp-wht")


class Images(torch.utils.data.Dataset):
    """Images and label maps, small ones for training, label maps as they are for testing."""

    def __init__(self, files: dict[str, Dataset], parts: tuple[tuple[str, str], ...], size: tuple[int, int]):
        self.rows = [(files[split], row) for split, name in parts for row in SEQUENCES[split][name]]
        self.rows = [(file, row) for file, row in self.rows if row < len(file)]
        self.size = size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file, row = self.rows[index]
        both = file[row]
        height, width = self.size
        image = both["image"].convert("RGB").resize((width, height), PILImage.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).float() / 255
        return ((pixels - MEAN) / STD).movedim(-1, 0), torch.from_numpy(np.array(both["label"], dtype=np.int64))


def batches(images: Images, size: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in order.split(size):
        pixels, labels = zip(*(images[int(index)] for index in chosen), strict=True)
        yield torch.stack(pixels), torch.stack(labels)


def train(model: nn.Module, images: Images, options: argparse.Namespace, label: str) -> float:
    """Returns seconds, without those that loading took."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.01, fused=True)
    updates = options.epochs * -(-len(images) // options.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, updates // 10, updates)
    model.train()
    seconds = 0.0
    with tqdm(total=updates, desc=label, leave=False) as bar:
        for _ in range(options.epochs):
            for pixels, labels in batches(images, options.batch_size, torch.randperm(len(images))):
                if torch.rand(()) < 0.5:
                    pixels, labels = pixels.flip(-1), labels.flip(-1)
                start = time.perf_counter()
                small = F.interpolate(labels[:, None].float(), size=options.size, mode="nearest")[:, 0].long()
                logits = F.interpolate(model(pixels), size=options.size, mode="bilinear")
                F.cross_entropy(logits, small, ignore_index=NOT_LABELLED).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                seconds += time.perf_counter() - start
                bar.update()
    return seconds


@torch.no_grad()
def tested(model: nn.Module, images: Images, options: argparse.Namespace) -> list[list[int]]:
    """How many pixels of each class (rows) are taken for each class (columns), at the size of the label maps."""
    total = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for pixels, labels in batches(images, options.batch_size, torch.arange(len(images))):
        logits = F.interpolate(model.eval()(pixels), size=labels.shape[1:], mode="bilinear")
        total += confusion_matrix(logits.argmax(1), labels, len(CLASSES), NOT_LABELLED)
    return total.tolist()


def mean_iou(confusion: list[list[int]]) -> float:
    return MeanIoU(keep_in_memory=True).compute(confusion=[confusion])["mean_iou"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CamVid's train.parquet and test.parquet")
    parser.add_argument("--model", required=True, help="ViT of the hub, or a folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", type=int, nargs=2, default=(126, 168), help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs", "domain-shift.json"))
    options = parser.parse_args(arguments)
    options.size = tuple(options.size)
    missing = [name for name in SEQUENCES if not (options.data / f"{name}.parquet").is_file()]
    if missing:
        parser.error(f"--data {options.data}: there is no {missing[0]}.parquet")
    files = {name: Dataset.from_parquet(str(options.data / f"{name}.parquet")) for name in SEQUENCES}
    of_training, by_day, at_dusk = (Images(files, parts, options.size) for parts in (TRAINED_ON, DAY, DUSK))
    where = environment()
    print(in_words(where))
    print(f"{len(of_training)} training images by day, tested on {len(by_day)} by day and {len(at_dusk)} at dusk")
    rows = []
    for seed, method in itertools.product(dict.fromkeys(options.seeds), options.methods):
        set_seed(seed)
        backbone = AutoModel.from_pretrained(options.model, dtype=torch.float32)
        config = backbone.config
        if options.size[0] % config.patch_size or options.size[1] % config.patch_size:
            parser.error(f"--size: both sides must be multiples of {config.patch_size}, the side of a patch")
        model = adapted(Segmenter(backbone, config.hidden_size, config.patch_size, len(CLASSES)), method)
        seconds = train(model, of_training, options, f"{method}, seed {seed}")
        day, dusk = (tested(model, images, options) for images in (by_day, at_dusk))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rows.append({"method": method, "seed": seed, "trained": trained, "seconds": seconds, "day": day, "dusk": dusk})
        write_record(options.output, where, vars(options), classes=CLASSES, rows=rows)  # so that a kill loses one run
        print(f"{method}, seed {seed}: mean IoU {mean_iou(day):.3f} by day, {mean_iou(dusk):.3f} at dusk")
    lines = [
        [row["method"], str(row["seed"]), f"{row['trained'] / 1e3:.0f}", f"{row['seconds']:.0f}",
         f"{mean_iou(row['day']):.3f}", f"{mean_iou(row['dusk']):.3f}"] for row in rows
    ]  # fmt: skip
    print(aligned(["method", "seed", "trained, thousands", "training, s", "day", "dusk"], lines))
    print(f"written to {options.output}")


if __name__ == "__main__":
    with plain_messages():
        main()
