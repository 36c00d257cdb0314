"""The model card (README.md) of a folder of weights: what it is, how it was trained, its scores, and how to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .options import Options

MOST_CLASSES_LISTED = 50


@dataclass
class Card:
    """The contents of a model card.

    Args:
        task: The hub's name of the task: image-classification or image-segmentation.
        auto_model: Name of the Auto class that loads the base model.
        base: The base model: hub id or folder.
        folder: The folder of the weights.
        method: The method's name in the report.
        peft_type: LORA or LBPWHT; None for a fully fine-tuned model.
        settings: The settings of the method and of the training, by name.
        images: The numbers of images for training, validation and test.
        names: The names of the classes.
        metric: The name of the scores' metric.
        scores: The scores, from 0 to 1, by the name of the images.
        per_class: A score for each class, by the class's name.
        arguments: Further arguments of the forward pass.
        has_pipeline: Whether transformers' pipeline for the task supports the image processor.
        head_on_backbone: The class that puts a new head on a backbone; None if the base model has a head.
        remark: A sentence on the purpose of this folder.
    """

    task: str
    auto_model: str
    base: str
    folder: Path
    method: str
    peft_type: str | None
    settings: dict[str, Any]
    images: dict[str, int]
    names: list[str]
    metric: str
    scores: dict[str, float]
    data: str
    per_class: dict[str, float] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    has_pipeline: bool = True
    head_on_backbone: str | None = None
    remark: str = ""

    def text(self) -> str:
        """The card in Markdown, with the header that the hub reads."""
        shown = self.names if len(self.names) <= MOST_CLASSES_LISTED else [*self.names[:MOST_CLASSES_LISTED], "..."]
        counts = ", ".join(f"{count} {kind}" for kind, count in self.images.items())
        sections = [
            f"---\n{self._header()}\n---",
            f"# {self.method} on {self.base}",
            f"{self._what()} {self.remark}".strip(),
            "## How to use it",
            f"```python\n{self.code()}\n```",
            "From the command line, in a clone of lbp-peft:",
            f"```bash\npython examples/predict.py {self.folder.as_posix()} image.png\n```",
            "## Data",
            f"{self.data}: {counts} images of {len(self.names)} classes: {', '.join(shown)}.",
            "## Scores",
            "\n".join(["| images | " + self.metric + " |", "| --- | --- |", *map(self._score, self.scores.items())]),
        ]
        if self.per_class and len(self.names) <= MOST_CLASSES_LISTED:
            sections.append("On the test images, by class:")
            rows = [f"| {_cell(name)} | {100 * value:.1f} % |" for name, value in self.per_class.items()]
            sections.append("\n".join([f"| class | {self._per_class()} |", "| --- | --- |", *rows]))
        rows = [f"| {name} | {_cell(str(value))} |" for name, value in self.settings.items()]
        sections += ["## Training", "\n".join(["| setting | value |", "| --- | --- |", *rows])]
        packages = {"PEFT": "peft", "Transformers": "transformers", "PyTorch": "torch"}
        versions = "\n".join(f"- {name} {version(package)}" for name, package in packages.items())
        return "\n\n".join([*sections, "### Framework versions", versions]) + "\n"

    def code(self) -> str:
        """Lines that load the model and predict the classes of image.png."""
        return "\n".join([*self._imports(), "", *self._loading(), *self._predicting()])

    def _header(self) -> str:
        kind = {"image-classification": "image-classification", "image-segmentation": "semantic-segmentation"}
        result = EvalResult(
            task_type=kind[self.task],
            dataset_type="images",
            dataset_name=self.data,
            metric_type=self.metric.lower().replace(" ", "_"),
            metric_value=round(self.scores["test"], 4),
        )
        tags = (
            [f"base_model:adapter:{self.base}", self.peft_type.lower(), "lbp-peft"] if self.peft_type else ["lbp-peft"]
        )
        return ModelCardData(
            base_model=self.base,
            library_name="peft" if self.peft_type else "transformers",
            pipeline_tag=self.task,
            tags=tags,
            model_name=self.method,
            eval_results=[result],
        ).to_yaml()

    def _what(self) -> str:
        what = {
            None: "A whole model, fine-tuned in full with the example program of lbp-peft.",
            "LORA": "A LoRA adapter, which PEFT loads as any other. It does not need lbp-peft.",
            "LBPWHT": "An adapter of the PEFT method LBP-WHT. `import lbp_peft` registers the method with PEFT.",
        }
        return what[self.peft_type]

    def _score(self, score: tuple[str, float]) -> str:
        return f"| {score[0]} | {100 * score[1]:.1f} % |"

    def _per_class(self) -> str:
        return "recall" if self.task == "image-classification" else "intersection over union"

    def _imports(self) -> list[str]:
        named = [self.auto_model]
        if self.peft_type:
            named.append("AutoConfig")
        if self.peft_type or not self.has_pipeline:
            named.append("AutoImageProcessor")
        if self.has_pipeline:
            named.append("pipeline")
            if not self.peft_type and not self.arguments:
                named.remove(self.auto_model)
        if self.head_on_backbone and self.peft_type:
            named[named.index(self.auto_model)] = self.head_on_backbone
        lines = ["import functools"] if self.arguments and self.has_pipeline else []
        lines += [] if self.has_pipeline else ["import torch"]
        lines += ["import lbp_peft  # registers LBP-WHT with PEFT"] if self.peft_type == "LBPWHT" else []
        lines += ["from peft import PeftModel"] if self.peft_type else []
        lines += [] if self.has_pipeline else ["from PIL import Image"]
        return [*lines, f"from transformers import {', '.join(sorted(named, key=str.lower))}"]

    def _loading(self) -> list[str]:
        lines = [f"folder = {json.dumps(self.folder.as_posix())}"]
        if self.peft_type is None:
            if self.arguments or not self.has_pipeline:
                lines.append(f"model = {self.auto_model}.from_pretrained(folder)")
            return lines
        lines.append('config = AutoConfig.from_pretrained(folder, subfolder="model_config")  # names the classes')
        if self.head_on_backbone:
            lines += [
                f"base = {self.head_on_backbone}(config)",
                "indices = config.backbone_config.out_indices",
                "base.backbone = type(base.backbone).from_pretrained(",
                f'    {json.dumps(self.base)}, out_indices=indices, dtype="float32"',
                ")",
            ]
        else:
            lines += [
                f"base = {self.auto_model}.from_pretrained(",
                f'    {json.dumps(self.base)}, config=config, ignore_mismatched_sizes=True, dtype="float32"',
                ")",
            ]
        return [*lines, "model = PeftModel.from_pretrained(base, folder).merge_and_unload()"]

    def _predicting(self) -> list[str]:
        if self.has_pipeline:
            model = "model" if self.peft_type or self.arguments else "folder"
            processor = "AutoImageProcessor.from_pretrained(folder)" if self.peft_type else "folder"
            extra = (
                [f"model.forward = functools.partial(model.forward, **{self.arguments!r})"] if self.arguments else []
            )
            return [
                *extra,
                f"predict = pipeline({json.dumps(self.task)}, model={model}, image_processor={processor})",
                'print(predict("image.png"))',
            ]
        arguments = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return [
            "processor = AutoImageProcessor.from_pretrained(folder)",
            'image = Image.open("image.png").convert("RGB")',
            "with torch.no_grad():",
            f'    logits = model.eval()(**processor(image, return_tensors="pt"){arguments}).logits',
            "size = image.height, image.width",
            'resized = torch.nn.functional.interpolate(logits, size=size, mode="bilinear")',
            "classes = resized.argmax(1)[0]  # of every pixel",
            "for k in classes.unique().tolist():",
            "    print(model.config.id2label[k], (classes == k).float().mean().item())",
        ]


def describe_data(options: Options) -> str:
    """A description of the source of the images."""
    if options.train_files:
        return ", ".join([*options.train_files, *(options.test_files or [])])
    if options.dataset:
        return options.dataset + (f" ({options.dataset_config})" if options.dataset_config else "")
    return "The example's own images (scikit-learn's handwritten digits)"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
