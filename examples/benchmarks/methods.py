"""The methods that are compared, each written as one word or more, joined by `+`, with settings after a colon.

    full                                   all weights are trained
    lora-all:r=16                          LoRA on all linear layers of the encoder
    full+checkpointing                     activations are computed again in the backward pass
    lbp-wht+checkpointing:every=2          the same in every second block only
    full+compile                           torch.compile
    lbp-wht:r=10,grad_input_dtype=int8           LBP-WHT; the settings are those of its configuration
    lora-all+lbp-wht:r=3,grad_input_rank=3      LBP-WHT on top of LoRA
    lbp-wht:compress_activations=norm/activation    several words are joined by a slash
    float8                                 torchao's training with products in float8, on a GPU
    hosvd:energy=0.8                       another method's backward pass, see examples/benchmarks/rivals

To add a word, write a function from model, names of the head's modules and settings to the model, and name it in
`WORDS`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.one_product import in_one_product
from benchmarks.rivals import RIVALS
from lbp_peft import LBPWHTConfig
from lbp_peft.encoder import encoder_linears
from lbp_peft.recommendation.candidates import NotApplicableError, enable_checkpointing

# Settings that this version of LBP-WHT does not know are left out, see `default_methods`.
DEFAULT_METHODS = (
    "full",
    "full+checkpointing",
    "lora-qv",
    "lora-all",
    "lora-fa",
    "velora",
    "lora-one-product",
    "lbp-wht:r=3,grad_input_rank=3",
    "lbp-wht:r=10,grad_input_rank=10",
    "lbp-wht:r=10,grad_input_basis=adaptive,grad_input_rank=24",
    "lbp-wht:r=10,grad_input_dtype=full",
    "lbp-wht:r=10,grad_input_dtype=int8",
    "lbp-wht:r=10,grad_input_dtype=bf16",
    "lbp-wht:r=10,grad_input_dtype=auto",
    "lbp-wht:r=10,grad_input_dtype=auto,compress_activations=all",
    "lora-all+lbp-wht:r=3,grad_input_rank=3",
    "lora-all+lbp-wht:r=10,grad_input_basis=adaptive,grad_input_rank=24",
    "lora-all+lbp-wht:r=10,grad_input_dtype=full",
    "lora-all+lbp-wht:r=10,grad_input_dtype=auto",
    "lora-qv+lbp-wht:r=10,grad_input_dtype=auto",
    "lora-all+checkpointing",
    "lbp-wht+checkpointing",
    "lbp-wht+checkpointing:every=2",
    "lora-all+lbp-wht+checkpointing",
)

_VERSIONS = 128  # of the same code that torch.compile keeps
QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value")
Settings = dict[str, Any]


class NotAvailable(Exception):
    """A method is not available here; the message says why."""


def adapted(base: nn.Module, method: str, heads: list[str]) -> nn.Module:
    """A copy of the model that is ready to be trained by a method, which trains the heads too.

    The parameters of the copy share the memory of the base model's parameters, so that many large models fit side by
    side. This is safe because no step that is measured changes a weight.

    Raises:
        NotAvailable: the model or an installed version does not admit the method.
        ValueError: there is no such method.
    """
    shared = {id(parameter): nn.Parameter(parameter.detach()) for parameter in base.parameters()}
    return applied(copy.deepcopy(base, shared), method, heads)


def applied(model: nn.Module, method: str, heads: list[str]) -> nn.Module:
    """The model itself, ready to be trained by a method. It raises the same errors as [`adapted`]."""
    for word, settings in words(method):
        model = WORDS[word](model, heads, settings)
    return model


def words(method: str) -> list[tuple[str, Settings]]:
    """ "lora-all+lbp-wht:r=3" -> [("lora-all", {}), ("lbp-wht", {"r": 3})]

    Raises:
        ValueError: a word is unknown, or a setting has no value.
    """
    result = []
    for part in method.split("+"):
        word, _, text = part.partition(":")
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        if word not in WORDS or not all(value for _, _, value in pairs):
            raise ValueError(
                f"Cannot read the method {method!r}: choose from {', '.join(WORDS)}, or several of them joined by +, "
                "with settings as in lbp-wht:r=10,grad_input_rank=3."
            )
        result.append((word, {key: setting(value) for key, _, value in pairs}))
    return result


def setting(text: str) -> Any:
    """The value of a setting, which is written as in YAML, or as words that are joined by slashes."""
    return text.split("/") if "/" in text else yaml.safe_load(text)


def default_methods() -> list[str]:
    """`DEFAULT_METHODS` without the settings that this version of LBP-WHT does not accept."""
    return [method for method in DEFAULT_METHODS if all(_is_known(*word) for word in words(method))]


def compressed() -> str:
    """The setting with the fewest saved activations in this version of LBP-WHT."""
    settings = ("all", "int8")
    return next(
        f"compress_activations={one}" for one in settings if _is_known("lbp-wht", {"compress_activations": one})
    )


def _is_known(word: str, settings: Settings) -> bool:
    if word == "lbp-wht":
        try:
            LBPWHTConfig(**settings)
        except (TypeError, ValueError):
            return False
    return True


def full(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    return model


def checkpointing(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    """Checkpointing of all blocks, or of the last one of every group of `every` blocks."""
    every = settings.get("every", 1)
    if set(settings) - {"every"} or not isinstance(every, int) or every < 1:
        raise NotAvailable(f"checkpointing takes every=1, 2, ..., got {settings}")
    try:
        enable_checkpointing(model)
    except NotApplicableError as error:
        raise NotAvailable(str(error)) from error
    if every > 1:
        blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", None) is True]
        blocks = [module for module in blocks if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise NotAvailable("the model checkpoints all of its blocks or none")
        for index, block in enumerate(blocks, start=1):
            block.gradient_checkpointing = index % every == 0
    return model


def float8(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    """The encoder's linear layers with all three products in float8. With `emulate=true` it runs without a GPU."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise NotAvailable("float8 needs torchao") from None
    config = Float8LinearConfig(**settings)
    if not config.emulate and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise NotAvailable("float8 needs a GPU of compute capability 8.9")
    targets = set(encoder_linears(model))
    converted: nn.Module = convert_to_float8_training(
        model, module_filter_fn=lambda _, name: name in targets, config=config
    )
    return converted


def compiled(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    # The models of all methods run the same code. PyTorch compiles eight versions of it by default, and runs the other
    # models in eager mode.
    torch._dynamo.config.recompile_limit = max(_VERSIONS, torch._dynamo.config.recompile_limit)
    model.compile(**settings)
    return model


def lbp_wht(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    stacked = isinstance(model, PeftModel)
    try:
        config = LBPWHTConfig(**{"modules_to_save": heads, "train_base_weight": not stacked} | settings)
    except (TypeError, ValueError) as error:
        raise NotAvailable(str(error)) from error
    return _with_adapter(model, config)


def lora_all(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    return lora(model, heads, encoder_linears(model), settings)


def lora_qv(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    targets = [name for name in encoder_linears(model) if name.rsplit(".", 1)[-1] in QUERY_AND_VALUE]
    if not targets:
        raise NotAvailable("the model has no query and value layers apart from the key's")
    return lora(model, heads, targets, settings)


def lora_fa(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    """LoRA whose factor A is frozen. In PEFT the optimiser's constructor freezes it."""
    try:
        from peft.optimizers import create_lorafa_optimizer
    except ImportError:
        raise NotAvailable(f"PEFT {peft.__version__} has no LoRA-FA") from None
    model = lora_all(model, heads, settings)
    config = model.peft_config["default"]
    create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=1e-3)
    return model


def lora_one_product(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    """LoRA whose layers compute x (W + s B A)^T in one product, and dx likewise, as RunLoRA may."""
    return in_one_product(lora_all(model, heads, settings))


def velora(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
    """LoRA that keeps the input of its factor A in compressed form."""
    try:
        from peft import VeloraConfig
    except ImportError:
        raise NotAvailable(f"PEFT {peft.__version__} has no VeLoRA") from None
    try:
        return lora_all(model, heads, {"velora_config": VeloraConfig(), **settings})
    except ValueError as error:  # VeLoRA does not adapt convolutions
        raise NotAvailable(str(error)) from error


def lora(model: nn.Module, heads: list[str], targets: list[str], settings: Settings) -> nn.Module:
    settings = {"r": 8, "target_modules": targets, "modules_to_save": heads} | settings
    return _with_adapter(model, LoraConfig(**settings))


def rival(name: str) -> Callable[[nn.Module, list[str], Settings], nn.Module]:
    """The word for another method's backward pass; all weights are trained, as in `full`."""

    def apply(model: nn.Module, heads: list[str], settings: Settings) -> nn.Module:
        try:
            return RIVALS[name](model, **settings)
        except (TypeError, ValueError) as error:
            raise NotAvailable(f"{name}: {error}") from error

    return apply


def _with_adapter(model: nn.Module, config: PeftConfig) -> nn.Module:
    with warnings.catch_warnings():  # both are meant
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


WORDS: dict[str, Callable[[nn.Module, list[str], Settings], nn.Module]] = {
    "full": full,
    "lora-qv": lora_qv,
    "lora-all": lora_all,
    "lora-fa": lora_fa,
    "velora": velora,
    "lora-one-product": lora_one_product,
    "lbp-wht": lbp_wht,
    "checkpointing": checkpointing,
    "float8": float8,
    "compile": compiled,
    **{name: rival(name) for name in RIVALS},
}
