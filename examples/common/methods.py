"""The methods that are compared: how each adapts the base model, and its learning rate.

To add one, write a function from options to [`Method`] and name it in `METHODS`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from lbp_peft import LBPWHTConfig
from lbp_peft.loading.terminal import cause_of
from lbp_peft.recommendation.candidates import NotApplicableError, enable_checkpointing

from .models import head_modules
from .options import OF_METHODS, Options


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Args:
        label: The method's name in the report.
        learning_rate: Peak learning rate.
        config: A function from the names of the head's modules to the PEFT configuration; None: full fine-tuning.
        folder: The folder of its runs, inside the output folder.
        checkpointing: Whether it always uses gradient checkpointing, regardless of the options.
    """

    label: str
    learning_rate: float
    config: Callable[[list[str]], PeftConfig] | None
    folder: str = ""
    checkpointing: bool = False

    def adapt(self, model: PreTrainedModel, options: Options) -> PreTrainedModel | PeftModel:
        if self.config is not None:
            model = get_peft_model(model, self.config(head_modules(model, options)))
        if self.checkpointing or options.gradient_checkpointing:
            try:
                enable_checkpointing(model)
            except NotApplicableError as error:
                raise SystemExit(f"--gradient_checkpointing: {error}") from None
        return model

    def save(self, model: PreTrainedModel | PeftModel, folder: Path) -> dict[str, PreTrainedModel | PeftModel]:
        """Write the [`parts`] of the trained model into folders of this one, named like them; return the parts."""
        parts = self.parts(model)
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        return parts

    def parts(self, model: PreTrainedModel | PeftModel) -> dict[str, PreTrainedModel | PeftModel]:
        """The parts of an adapted model to save, by name: `adapter`, and for a stack also `stack`.

        For a stack, `adapter` is a checkpoint of the method that LBP-WHT is stacked on, as that method alone would
        write it. It is for inference, and needs no lbp-peft. `stack` is for continuing the training with LBP-WHT.
        """
        beneath = getattr(model, "stacked_on", None) if self.config else None
        return {"adapter": model} if beneath is None else {"adapter": beneath, "stack": model}

    def reload(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel | PeftModel:
        """Load the files that `save_pretrained` wrote to a folder into a fresh copy of the base model."""
        if self.config is None:
            return type(base).from_pretrained(folder)
        return PeftModel.from_pretrained(base, folder)


def full(options: Options) -> Method:
    return Method("full fine-tuning", options.learning_rate, None)


def lora_config(options: Options, heads: list[str]) -> LoraConfig:
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=options.lora_target_modules or "all-linear",
        exclude_modules=heads,
        modules_to_save=heads,
    )


def _words(text: str) -> str | list[str] | None:
    return text.split("/") if "/" in text else text or None


def lbp_wht_config(options: Options, **settings: Any) -> LBPWHTConfig:
    return LBPWHTConfig(
        r=options.r,
        grad_input_rank=options.grad_input_rank,
        grad_input_basis=options.grad_input_basis,
        grad_input_energy=options.grad_input_energy,
        grad_input_dtype=options.grad_input_dtype,
        compress_activations=_words(options.compress_activations),
        base_weights=options.base_weights,
        block_size=options.block_size,
        selection=options.selection,
        boundary=options.boundary,
        **settings,
    )


def lbp_wht_label(options: Options) -> str:
    rank = "" if options.grad_input_rank is None else f", grad_input_rank={options.grad_input_rank}"
    rank += "" if options.grad_input_basis == "walsh" else f" ({options.grad_input_basis})"
    dtype = "" if options.grad_input_dtype == "auto" else f", grad_input_dtype={options.grad_input_dtype}"
    return f"LBP-WHT r={options.r}{rank}{dtype}"


def lora(options: Options) -> Method:
    return Method(f"LoRA r={options.lora_r}", options.lora_learning_rate, lambda heads: lora_config(options, heads))


def lbp_wht(options: Options) -> Method:
    return Method(
        lbp_wht_label(options), options.learning_rate, lambda heads: lbp_wht_config(options, modules_to_save=heads)
    )


def lbp_wht_paper(options: Options) -> Method:
    """LBP-WHT with the paper's setting: input gradients have the rank of the weight gradients."""
    return lbp_wht(options.with_overrides(f"grad_input_rank={options.r},grad_input_basis=walsh"))


def lora_with_lbp_wht(options: Options) -> Method:
    """LoRA with LBP-WHT on top, which makes its gradients cheap."""

    def config(heads: list[str]) -> LBPWHTConfig:
        return lbp_wht_config(options, train_base_weight=False, stack_on=lora_config(options, heads))

    return Method(f"LoRA r={options.lora_r} + {lbp_wht_label(options)}", options.lora_learning_rate, config)


def recommended(options: Options) -> Method:
    """The recommendation of `lbp-peft recommend` for this model, read from the file that it wrote.

    Raises:
        SystemExit: there is no such file, or it cannot be read.
    """
    path = Path(options.recommendation).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = options.with_overrides(
            ",".join(f"{name}={value}" for name, value in record["options"].items() if name in OF_METHODS)
        )
        (name,) = record["options"]["methods"]
        method = METHODS[name](found)
    except FileNotFoundError:
        raise SystemExit(
            f"--methods recommended: there is no file {path}. Run `lbp-peft recommend` with the same model and data "
            "first, or name its file with --recommendation"
        ) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"--recommendation {path}: not a file of `lbp-peft recommend` ({cause_of(error)})") from None
    label = f"recommended: {record['recommended']}"
    return dataclasses.replace(method, label=label, checkpointing=bool(record["gradient_checkpointing"]))


METHODS: dict[str, Callable[[Options], Method]] = {
    "full": full,
    "lora": lora,
    "lbp-wht": lbp_wht,
    "lbp-wht-paper": lbp_wht_paper,
    "lora+lbp-wht": lora_with_lbp_wht,
    "recommended": recommended,
}


def chosen_methods(options: Options) -> list[Method]:
    """The methods that the options name, each with its own overrides."""
    methods = []
    for text in options.methods:
        name, _, overrides = text.partition(":")
        if name not in METHODS:
            raise SystemExit(f"--methods: unknown method {name!r}: choose from {', '.join(METHODS)}")
        try:
            method = METHODS[name](options.with_overrides(overrides))
            if method.config:
                method.config(["head"])  # refuses values that make no sense
        except (TypeError, ValueError) as error:
            raise SystemExit(f"--methods {text}: {cause_of(error)}") from None
        in_label = ("r", "lora_r", "grad_input_rank", "grad_input_basis", "grad_input_dtype")
        shown = [part for part in overrides.split(",") if part and part.split("=")[0] not in in_label]
        folder = re.sub(r"[^\w.-]+", "-", text)
        methods.append(dataclasses.replace(method, label=", ".join([method.label, *shown]), folder=folder))
    return methods
