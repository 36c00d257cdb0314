"""The settings that are compared. To add one, add a line to `SETTINGS`, or a function of settings to `VARIANTS`."""

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
        label: The name in tables.
        lbp_wht: The arguments of [`LBPWHTConfig`]; None: exact backpropagation.
        lora: Whether LoRA's factors are trained instead of whole weights.
        checkpointing: Whether gradient checkpointing is on.
        compiled: Whether the model goes through `torch.compile`.
        no_better_than: The label of a setting whose gradients are at least as good; "" if there is none.
        saves_memory: Whether this is a variant of that setting that takes more time and less memory.
    """

    label: str
    lbp_wht: dict[str, Any] | None = field(default=None, hash=False)
    lora: bool = False
    checkpointing: bool = False
    compiled: bool = False
    no_better_than: str = ""
    saves_memory: bool = False

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

    def apply_to(self, model: nn.Module, heads: list[str]) -> nn.Module:
        """Change a model in place, so that it is trained in this way.

        Raises:
            NotApplicableError: the setting cannot be used with the model.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = self.config(model, heads)
                adapted = model if config is None else get_peft_model(model, config)
            except ValueError as error:
                raise NotApplicableError(str(error)) from error
            if self.checkpointing:  # only now, or PEFT would make the embeddings' output require a gradient
                enable_checkpointing(adapted)
            if self.compiled:
                adapted.compile()
        return adapted


# The order is that of importance: if time is short, the last settings are left out. The first four are one of each
# kind: full fine-tuning, LoRA, LBP-WHT, and LBP-WHT on LoRA.
KINDS = 4
R10, LORA_R10 = "LBP-WHT r=10", "LoRA + LBP-WHT r=10"
_ADAPTIVE = {"r": 10, "grad_input_rank": 24, "grad_input_basis": "adaptive"}
SETTINGS: tuple[Candidate, ...] = (
    Candidate("full fine-tuning"),
    Candidate("LoRA", lora=True),
    Candidate(R10, {"r": 10}),
    Candidate(LORA_R10, {"r": 10}, lora=True),
    Candidate("LBP-WHT r=3", {"r": 3}, no_better_than=R10),
    Candidate("LBP-WHT r=21", {"r": 21}),
    Candidate("LBP-WHT r=10, dx adaptive", _ADAPTIVE, no_better_than=R10),
    Candidate("LBP-WHT r=10, dx exact", {"r": 10, "grad_input_dtype": "full"}),
    Candidate("LBP-WHT r=10, dx r=10", {"r": 10, "grad_input_rank": 10}, no_better_than=R10),
    Candidate("LoRA + LBP-WHT r=3", {"r": 3}, lora=True, no_better_than=LORA_R10),
    Candidate("LoRA + LBP-WHT r=21", {"r": 21}, lora=True),
    Candidate("LoRA + LBP-WHT r=10, dx adaptive", _ADAPTIVE, lora=True, no_better_than=LORA_R10),
)


def with_checkpointing(candidate: Candidate) -> Candidate | None:
    return _variant(candidate, "checkpointing", checkpointing=True)


def with_compressed_activations(candidate: Candidate) -> Candidate | None:
    if candidate.lbp_wht is None:
        return None
    return _variant(candidate, "compression", lbp_wht=candidate.lbp_wht | {"compress_activations": "all"})


def with_both(candidate: Candidate) -> Candidate | None:
    compressed = with_compressed_activations(candidate)
    return compressed and with_checkpointing(compressed)


def with_dropped_base_weights(candidate: Candidate) -> Candidate | None:
    """Drop the base weights of a single setting: the effect is the same for all that train copies of weights."""
    if candidate.label != R10 or candidate.lbp_wht is None:
        return None
    return _variant(candidate, "no base weights", lbp_wht=candidate.lbp_wht | {"base_weights": "dropped"})


def with_dropped_base_weights_and_checkpointing(candidate: Candidate) -> Candidate | None:
    dropped = with_dropped_base_weights(candidate)
    return dropped and with_checkpointing(dropped)


def _variant(candidate: Candidate, what: str, **changes: Any) -> Candidate:
    label = f"{candidate.label} + {what}"
    return replace(candidate, label=label, no_better_than=candidate.label, saves_memory=True, **changes)


# Each function returns a variant of a setting that saves memory and has no better gradients; None if there is no such
# variant. Compression costs less time than checkpointing, so it is tried first.
VARIANTS: tuple[Callable[[Candidate], Candidate | None], ...] = (
    with_compressed_activations,
    with_checkpointing,
    with_both,
    with_dropped_base_weights,
    with_dropped_base_weights_and_checkpointing,
)


def variants(settings: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """All variants of the settings, by the functions in `VARIANTS`."""
    return tuple(variant for vary in VARIANTS for setting in settings if (variant := vary(setting)))


CANDIDATES: tuple[Candidate, ...] = (
    *SETTINGS[:KINDS],
    *variants(SETTINGS[:KINDS]),
    *SETTINGS[KINDS:],
    *variants(SETTINGS[KINDS:]),
)


def sort_candidates(candidates: Sequence[Candidate], lora: bool, only_time_is_bounded: bool) -> list[Candidate]:
    """The candidates in the order in which they are tried, the most informative ones first.

    One of each kind comes first, then the candidates that can be recommended, and last those that are shown for
    comparison.

    Args:
        lora: Whether a setting that trains LoRA's factors is sought, and not one that trains whole weights.
        only_time_is_bounded: Whether only the step time has a bound. Then settings come before their variants, which
            take longer.
    """
    kinds, others = candidates[:KINDS], candidates[KINDS:]

    def key(candidate: Candidate) -> tuple[bool, bool]:
        return candidate.lora is not lora, only_time_is_bounded and candidate.saves_memory

    return [*kinds, *sorted(others, key=key)]


def with_compile(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """The same candidates under `torch.compile`."""
    for candidate in candidates:
        yield replace(candidate, label=f"{candidate.label} + compile", compiled=True)


def enable_checkpointing(model: nn.Module) -> None:
    """Turn on gradient checkpointing in a model of transformers or timm.

    Raises:
        NotApplicableError: the model has no gradient checkpointing.
    """
    module: Any = _with_checkpointing(model)[1]
    if hasattr(module, "set_grad_checkpointing"):  # timm
        module.set_grad_checkpointing()
        return
    enable = getattr(module, "activation_checkpointing_enable", None)  # the newer name in transformers
    (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})


def checkpointing_call(model: nn.Module) -> str:
    """The Python code that enables checkpointing, from the attribute of the model on; "" if it has no checkpointing."""
    try:
        name, module = _with_checkpointing(model)
    except NotApplicableError:
        return ""
    is_timm = hasattr(module, "set_grad_checkpointing")
    call = "set_grad_checkpointing()" if is_timm else 'gradient_checkpointing_enable({"use_reentrant": False})'
    return f"{name}.{call}" if name else call


def _with_checkpointing(model: nn.Module) -> tuple[str, nn.Module]:
    """The outermost module that has gradient checkpointing, with its name."""
    for name, module in model.named_modules():
        if getattr(module, "supports_gradient_checkpointing", False) or hasattr(module, "set_grad_checkpointing"):
            return name, module
    raise NotApplicableError("the model has no gradient checkpointing")


def copy_with_shared_parameters(model: nn.Module) -> nn.Module:
    """Copy a model. The copy's parameters share memory with the original's."""
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, shared)


def lora_targets(model: nn.Module) -> list[str]:
    """The names of the encoder's linear layers; only their last parts, if these match no other layer.

    Raises:
        NotApplicableError: there are none.
    """
    names = encoder_linears(model)
    if not names:
        raise NotApplicableError("no linear layers were found in blocks of an encoder")
    ends = {name.rpartition(".")[2] for name in names}
    matched = [
        name for name, module in model.named_modules() if name.rpartition(".")[2] in ends and layer_type_of(module)
    ]
    return sorted(ends) if sorted(matched) == sorted(names) and not any(end.isdigit() for end in ends) else names
