"""Writes folders of trained models for others to use, and loads them again.

    adapter/       the weights, as PEFT or transformers writes them
      model_config/config.json   configuration of the model with the names of the classes
      preprocessor_config.json   image processor, at the size that was trained on
      README.md                  model card, with the lines that load and predict

The configuration has a folder of its own because transformers takes an adapter's folder with a config.json for a whole
model, and would look for the base model's weights there.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

import lbp_peft  # noqa: F401  registers LBP-WHT with PEFT
from lbp_peft.loading.models import forward_arguments
from lbp_peft.loading.places import looks_like_path
from lbp_peft.loading.preprocessing import Preprocessor
from lbp_peft.loading.storedimages import as_rgb
from lbp_peft.loading.terminal import cause_of

MODEL_CONFIG = "model_config"
CANNOT_READ = (OSError, ValueError, KeyError, HFValidationError)


def processor_in_effect(preprocessor: Preprocessor) -> ImageProcessingMixin:
    """The checkpoint's image processor, set to the size that the options ask for."""
    processor = preprocessor.processor
    if not preprocessor.overrides:
        return processor
    return type(processor).from_dict(processor.to_dict() | preprocessor.overrides)


def write_beside(model: PreTrainedModel | PeftModel, preprocessor: Preprocessor, card: str, folder: Path) -> None:
    """Add configuration, image processor and model card to a folder that `model.save_pretrained` wrote.

    Args:
        card: The text of the README.md, which replaces PEFT's template.
    """
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.save_pretrained(folder / MODEL_CONFIG)
    processor_in_effect(preprocessor).save_pretrained(folder)
    (folder / "README.md").write_text(card)


@dataclass
class Predictor:
    """A trained model and its image processor.

    Args:
        model: A plain transformers model in eval mode.
        arguments: Further arguments of the model's forward pass.
    """

    model: PreTrainedModel
    processor: ImageProcessingMixin
    arguments: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        labels = self.model.config.id2label
        return [labels[index] for index in range(len(labels))]

    @property
    def segments(self) -> bool:
        """Whether the model predicts a class for each pixel instead of one for each image."""
        return "Segmentation" in type(self.model).__name__


def load(folder: Path, base: str | None = None) -> Predictor:
    """Load what an example program, or [`write_beside`], has written.

    Args:
        folder: The folder of an adapter or of a fully fine-tuned model.
        base: The base model, if it is no longer where it was during training.

    Raises:
        SystemExit: something is missing; the message names it.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except CANNOT_READ as error:
        inner = next((file.parent for file in sorted(folder.rglob("preprocessor_config.json"))), None)
        if inner is not None and not (folder / "adapter_config.json").exists():
            raise SystemExit(f"{folder} holds no model itself. Name a folder in it, such as {inner}.") from None
        raise SystemExit(f"{folder} has no image processor (preprocessor_config.json): {cause_of(error)}") from None
    model = _load_adapter(folder, base) if (folder / "adapter_config.json").exists() else _load_whole(folder)
    height, width = pixels(processor, Image.new("RGB", (64, 64))).shape[-2:]
    return Predictor(model.eval(), processor, forward_arguments(model, (height, width)))


def pixels(processor: ImageProcessingMixin, image: Image.Image) -> torch.Tensor:
    """The preprocessed image, shape (1, 3, height, width)."""
    return processor(images=as_rgb(image), return_tensors="pt")["pixel_values"]


def _load_whole(folder: Path) -> PreTrainedModel:
    try:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        return getattr(transformers, name).from_pretrained(folder)
    except (*CANNOT_READ, AttributeError) as error:
        raise SystemExit(f"{folder} holds neither an adapter nor a model: {cause_of(error)}") from None


def _load_adapter(folder: Path, base: str | None) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder / MODEL_CONFIG)
        path = base or PeftConfig.from_pretrained(folder).base_model_name_or_path
    except CANNOT_READ as error:
        raise SystemExit(f"{folder} is not an adapter that an example program wrote: {cause_of(error)}") from None
    if looks_like_path(path) and not Path(path).expanduser().is_dir():
        raise SystemExit(f"{path}, the base model of {folder}, does not exist. Give its folder or hub id with --base.")
    try:
        model = base_model(path, config)
    except CANNOT_READ as error:
        raise SystemExit(
            f"{path}, the base model of {folder}, cannot be loaded: {cause_of(error)}. Give its folder "
            "or hub id with --base."
        ) from None
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (*CANNOT_READ, RuntimeError) as error:
        raise SystemExit(f"{folder} cannot be loaded into {path}: {cause_of(error)}") from None
    return adapted.merge_and_unload()


def base_model(path: str, config: transformers.PretrainedConfig) -> PreTrainedModel:
    """The base model with the head that the configuration describes. The adapter has the weights of the head."""
    cls = getattr(transformers, config.architectures[0])
    # Whether the checkpoint contains a head, and not only the backbone.
    is_whole = AutoConfig.from_pretrained(path).model_type == config.model_type
    if getattr(config, "backbone_config", None) is None or is_whole:
        return cls.from_pretrained(path, config=config, ignore_mismatched_sizes=True, dtype="float32")
    model = cls(config)  # a new head that was put on a backbone
    out_indices = config.backbone_config.out_indices
    model.backbone = type(model.backbone).from_pretrained(path, out_indices=out_indices, dtype="float32")
    return model
