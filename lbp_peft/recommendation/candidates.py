"""The settings that are compared. To add some, add a line to `SETTINGS` or a variant to `VARIANTS`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from ..encoder import encoder_linears
from ..layer_types import layer_type_of
from ..tuner.config import LBPWHTConfig

LORA = {"r": 8, "lora_alpha": 16}


class NotApplicableError(Exception):
    """A setting cannot be used with a model, for the reason in the message."""


@dataclass(frozen=True)
class Candidate:
    """A way to train a model.

    Args:
        label: Its name in tables.
        lbp_wht: Arguments of [`LBPWHTConfig`]; None: exact backpropagation.
        lora: Whether LoRA's factors are trained instead of whole weights.
        checkpointing: Whether gradient checkpointing is on.
        compiled: Whether the model goes through `torch.compile`.
    """

    label: str
    lbp_wht: dict[str, Any] | None = field(default=None, hash=False)
    lora: bool = False
    checkpointing: bool = False
    compiled: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether it computes exact gradients."""
        return self.lbp_wht is None

    def config(self, model: nn.Module, heads: list[str]) -> PeftConfig | None:
        """The configuration for PEFT; None: full fine-tuning.

        Args:
            model: The plain model.
            heads: The names of the modules that are trained in full.

        Raises:
            NotApplicableError: no layers of the model can be adapted.
        """
        saved = heads or None
        lora = LoraConfig(**LORA, target_modules=lora_targets(model), modules_to_save=saved) if self.lora else None
        if self.lbp_wht is None:
            return lora
        if lora is not None:
            return LBPWHTConfig(**self.lbp_wht, train_base_weight=False, stack_on=lora)
        return LBPWHTConfig(**self.lbp_wht, modules_to_save=saved)

    def applied(self, model: nn.Module, heads: list[str]) -> nn.Module:
        """Change a model in place, so that it can be trained in this way.

        Raises:
            NotApplicableError: the setting cannot be used with the model.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.checkpointing:
                enable_checkpointing(model)
            try:
                config = self.config(model, heads)
                adapted = model if config is None else get_peft_model(model, config)
            except ValueError as error:
                raise NotApplicableError(str(error)) from error
            if self.compiled:
                adapted.compile()
        return adapted


# In order of importance: if time is short, the last ones are left out, but never the first four, one of each kind.
KINDS = 4
SETTINGS: tuple[Candidate, ...] = (
    Candidate("full fine-tuning"),
    Candidate("LoRA", lora=True),
    Candidate("LBP-WHT r=10", {"r": 10}),
    Candidate("LoRA + LBP-WHT r=10", {"r": 10}, lora=True),
    Candidate("LBP-WHT r=3", {"r": 3}),
    Candidate("LBP-WHT r=21", {"r": 21}),
    Candidate("LBP-WHT r=10, dx exact", {"r": 10, "grad_input_dtype": "full"}),
    Candidate("LBP-WHT r=10, dx r=10", {"r": 10, "grad_input_rank": 10}),
    Candidate("LoRA + LBP-WHT r=3", {"r": 3}, lora=True),
)


def with_checkpointing(candidate: Candidate) -> Candidate:
    return replace(candidate, label=f"{candidate.label} + checkpointing", checkpointing=True)


def with_compressed_activations(candidate: Candidate) -> Candidate | None:
    if candidate.lbp_wht is None:
        return None
    settings = candidate.lbp_wht | {"compress_activations": "int8"}
    return replace(candidate, label=f"{candidate.label} + compression", lbp_wht=settings)


# Each function returns a variant of a setting that saves memory, or None. Its gradients are not better.
VARIANTS: tuple[Callable[[Candidate], Candidate | None], ...] = (with_checkpointing, with_compressed_activations)

# The setting of each variant.
PLAIN: dict[str, str] = {
    changed.label: setting.label for variant in VARIANTS for setting in SETTINGS if (changed := variant(setting))
}


def with_variants(settings: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The settings, and after them their variants."""
    return (*settings, *(changed for variant in VARIANTS for one in settings if (changed := variant(one))))


# One setting of each kind with its variants, then the others with theirs.
CANDIDATES: tuple[Candidate, ...] = (*with_variants(SETTINGS[:KINDS]), *with_variants(SETTINGS[KINDS:]))


def compiled(candidates: tuple[Candidate, ...]) -> Iterator[Candidate]:
    """The same candidates under `torch.compile`."""
    for candidate in candidates:
        yield replace(candidate, label=f"{candidate.label} + compile", compiled=True)


def enable_checkpointing(model: nn.Module) -> None:
    """Have a model of transformers or timm compute activations again in the backward pass.

    Raises:
        NotApplicableError: the model has no gradient checkpointing.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            enable = getattr(module, "activation_checkpointing_enable", None)  # the newer name in transformers
            (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})
            return
        if hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing()
            return
    raise NotApplicableError("the model has no gradient checkpointing")


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters share memory with the original's."""
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, shared)


def lora_targets(model: nn.Module) -> list[str]:
    """The linear layers of the encoder, by suffixes of their names if these match no other layer.

    Raises:
        NotApplicableError: there are none.
    """
    names = encoder_linears(model)
    if not names:
        raise NotApplicableError("no linear layers were found in blocks of an encoder")
    ends = {name.rpartition(".")[2] for name in names}
    found = [
        name for name, module in model.named_modules() if name.rpartition(".")[2] in ends and layer_type_of(module)
    ]
    return sorted(ends) if sorted(found) == sorted(names) and not any(end.isdigit() for end in ends) else names
