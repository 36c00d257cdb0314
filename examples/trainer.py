"""Adapt a Vision Transformer with transformers' Trainer and LBP-WHT, alone or on top of LoRA.

    python examples/trainer.py                                    # scikit-learn's digits: nothing is downloaded
    python examples/trainer.py --lora
    python examples/trainer.py --model google/vit-base-patch16-224-in21k --dataset my_images/

The folder of images has one folder for each class in `train/` and in `test/`: `my_images/train/cat/1.jpg`. The adapter,
the image processor and Trainer's checkpoints go to `--output`.
"""

# ruff: noqa: I001
import argparse

import numpy as np
import torch
from lbp_peft.loading.terminal import plain_messages
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments,
    ViTConfig, ViTImageProcessor, set_seed,
)  # fmt: skip

from lbp_peft import LBPWHTConfig


def embedded_digits() -> DatasetDict:
    """The handwritten digits 0 to 9 in the form in which `load_dataset` gives a folder of images."""
    data = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    images = [np.repeat((image * (255 / 16)).astype(np.uint8)[..., None], 3, axis=2) for image in data.images]
    digits = Dataset.from_dict({"image": images, "label": data.target}, features=features)
    split = len(digits) * 2 // 3  # ordered by writer: the test images are by others
    return DatasetDict(train=digits.select(range(split)), test=digits.select(range(split, len(digits))))


def small_vit(labels: list[str]) -> tuple[PreTrainedModel, ViTImageProcessor]:
    """A ViT of 8 x 8 patches with random weights, and its image processor."""
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=384, num_labels=len(labels), initializer_range=0.1, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return AutoModelForImageClassification.from_config(config), processor


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="image classifier of the hub, or a folder (default: a small random ViT)")
    parser.add_argument("--dataset", help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--lora", action="store_true", help="train LoRA with LBP-WHT on top, not full weights")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", default="runs/trainer")
    options = parser.parse_args()
    set_seed(0)
    try:
        data = load_dataset("imagefolder", data_dir=options.dataset) if options.dataset else embedded_digits()
        labels = data["train"].features["label"].names
        data["test"]
    except (KeyError, ValueError) as error:
        parser.error(f"--dataset {options.dataset}: no images in train/CLASS/ and test/CLASS/ ({error})")
    if options.model:
        processor = AutoImageProcessor.from_pretrained(options.model)
        vit = AutoModelForImageClassification.from_pretrained(
            options.model, num_labels=len(labels), id2label=dict(enumerate(labels)), dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    else:
        vit, processor = small_vit(labels)
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"])
    stack = {"stack_on": lora, "train_base_weight": False} if options.lora else {}
    narrow = {} if options.model else {"grad_input_dtype": "full"}  # "auto" would leave its layers exact
    model = get_peft_model(vit, LBPWHTConfig(r=10, modules_to_save=["classifier"], **stack, **narrow))

    def collate(rows: list[dict]) -> dict:
        pixels = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    arguments = TrainingArguments(
        options.output, num_train_epochs=options.epochs, learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=100, eval_strategy="epoch",
        save_strategy="epoch", save_total_limit=2, remove_unused_columns=False, report_to=[], label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip

    def accuracy(scored: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((scored.predictions.argmax(-1) == scored.label_ids).mean())}

    trainer = Trainer(model, arguments, collate, data["train"], data["test"], processor, compute_metrics=accuracy)
    trainer.train()
    trainer.save_model()
    print(f"Test accuracy: {trainer.evaluate()['eval_accuracy']:.1%}; the adapter is in {options.output}")


if __name__ == "__main__":
    with plain_messages():
        main()
