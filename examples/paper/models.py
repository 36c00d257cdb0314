"""The backbones of the paper's experiments, their weights, and the part that each protocol adapts.

To add one, name it in `BACKBONES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed

import lbp_peft.head
from lbp_peft.encoder import encoder_linears
from lbp_peft.loading.models import class_names, explain_failures

PROTOCOLS = ("partial", "full")
DERIVED_BUFFERS = ("num_batches_tracked", "attention_bias_idxs")  # of timm's models, which hold nothing learned
Size = tuple[int, int]


@dataclass(frozen=True)
class Backbone:
    """A pretrained model.

    Attributes:
        weights: The name of the checkpoint on the hub.
        stages: The regular expression of the adapted part, by protocol; "full" adapts the whole encoder.
        architecture: The name of the model in timm, if it is from there.
        entry: The first module of the part that the partial protocol adapts. All before it is frozen.
        before: Regular expression of the modules before `entry`. They take and return one tensor.
        layout: The function from (height, width) in pixels to the settings of LBP-WHT for the layout of the tokens that
            enter `entry`. None: these are images, whose layout is known.
    """

    weights: str
    stages: dict[str, str]
    architecture: str | None = None
    entry: str | None = None
    before: str = ""
    layout: Callable[[Size], dict[str, Any]] | None = None


def _of_timm(architecture: str, tag: str, partial: str, entry: str, before: str) -> Backbone:
    stages = {"partial": partial, "full": ""}
    return Backbone(
        f"timm/{architecture}.{tag}", stages, architecture, f"timm_model.{entry}", rf"^timm_model\.{before}$"
    )


def _efficientformer(architecture: str) -> Backbone:
    return _of_timm(architecture, "snap_dist_in1k", r"stages\.3\.", "stages.3", r"(stem|stages\.[0-2])")


def _dinov2_layout(size: Size) -> dict[str, Any]:
    return {"grid_size": (size[0] // 14, size[1] // 14), "num_prefix_tokens": 1}


BACKBONES = {
    "efficientformer_l1": _efficientformer("efficientformer_l1"),
    "efficientformer_l7": _efficientformer("efficientformer_l7"),
    "efficientformerv2_s0": _efficientformer("efficientformerv2_s0"),
    "efficientformerv2_l": _efficientformer("efficientformerv2_l"),
    "tf_efficientnet_lite0": _of_timm(
        "tf_efficientnet_lite0", "in1k", r"blocks\.[56]\.", "blocks.5", r"(conv_stem|bn1|blocks\.[0-4])"
    ),
    "swinv2_small": Backbone(
        "microsoft/swinv2-small-patch4-window8-256", {"partial": r"encoder\.layers\.3\.", "full": ""}
    ),
    "segformer_mit_b0": Backbone("nvidia/mit-b0", {"partial": r"stages\.3\.", "full": ""}),
    "dinov2_small": Backbone(  # it has no stages: the last third of its layers
        "facebook/dinov2-small",
        {"partial": r"encoder\.layer\.(8|9|10|11)\.", "full": ""},
        entry="dinov2.encoder.layer.8",
        before=r"^dinov2\.(embeddings|encoder\.layer\.[0-7])$",
        layout=_dinov2_layout,
    ),
}


@dataclass(frozen=True)
class AdaptedPart:
    """The adapted part of a model.

    Attributes:
        targets: The names of the linear layers and pointwise convolutions that the methods adapt.
        heads: The names of the modules of the head, which every method trains in full.
        norms: The names of the norms in blocks of which every layer is adapted.
        lbp_wht: The settings of LBP-WHT that all methods share, such as the boundary.
    """

    targets: list[str]
    heads: list[str]
    norms: list[str] = field(default_factory=list)
    lbp_wht: dict[str, Any] = field(default_factory=dict)


def backbone_named(name: str) -> Backbone:
    """The backbone with a name in `BACKBONES`.

    Raises:
        SystemExit: there is no such backbone.
    """
    if name not in BACKBONES:
        raise SystemExit(f"--model {name}: choose from {', '.join(BACKBONES)}")
    return BACKBONES[name]


def adapted_part(model: PreTrainedModel, stage: str, lbp_wht: dict[str, Any] | None = None) -> AdaptedPart:
    """The adapted part of a model.

    Args:
        model: The model, complete.
        stage: The regular expression to search in the names of the encoder's linear layers.
        lbp_wht: See [`AdaptedPart`].

    Raises:
        SystemExit: no linear layer of the encoder has a matching name.
    """
    linears = encoder_linears(model)
    targets = [name for name in linears if re.search(stage, name)]
    if not targets:
        raise SystemExit(f"no linear layer in the encoder of {type(model).__name__} has a name that fits {stage!r}")
    frozen = [name for name in linears if name not in targets]
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
        and _is_inside(targets, block := name.rpartition(".")[0])
        and not _is_inside(frozen, block)
    ]
    return AdaptedPart(targets, _heads(model), norms, lbp_wht or {})


def _is_inside(names: list[str], block: str) -> bool:
    return any(name.startswith(f"{block}.") for name in names)


def _heads(model: PreTrainedModel) -> list[str]:
    inner = getattr(model, "timm_model", None)
    if inner is None:
        return lbp_peft.head.head_modules(model)
    return [f"timm_model.{name}" for name in lbp_peft.head.head_modules(inner)]


def load_timm(
    architecture: str, weights: str | None, names: list[str], seed: int, size: Size | None = None
) -> PreTrainedModel:
    """A model of timm as transformers wraps it, with a new head: the same one for equal seeds.

    Args:
        weights: A repository on the hub or a folder, as `from_pretrained` takes it, or a state dict of timm in a file
            of safetensors. None: they are initialised at random, as transformers does it.
        size: (height, width) of the images in pixels; None: the model's own.
    """
    set_seed(seed)
    if weights is None or Path(weights).suffix == ".safetensors":
        from transformers import TimmWrapperConfig

        config = TimmWrapperConfig(architecture=architecture, **class_names(names))
        model = AutoModelForImageClassification.from_config(config)
        if weights is not None:
            _load_backbone(model.timm_model, Path(weights).expanduser(), architecture)
    else:
        with explain_failures(weights):
            model = AutoModelForImageClassification.from_pretrained(
                weights, ignore_mismatched_sizes=True, dtype=torch.float32, **class_names(names)
            )
    if size is not None:
        _fit_attention(model, size)
    return model


def _load_backbone(model: nn.Module, file: Path, architecture: str) -> None:
    """Load all weights but those of the head, which belongs to other classes.

    Raises:
        SystemExit: the file lacks a weight.
    """
    own = model.state_dict()
    skipped = tuple(f"{head}." for head in lbp_peft.head.head_modules(model))
    stored = {
        name: value.to(own[name].dtype)
        for name, value in load_file(file).items()
        if name in own and not name.startswith(skipped) and not name.endswith(DERIVED_BUFFERS)
    }
    missing = model.load_state_dict(stored, strict=False).missing_keys
    absent = [name for name in missing if not name.startswith(skipped) and not name.endswith(DERIVED_BUFFERS)]
    if absent:
        raise SystemExit(f"{file} has no values for {', '.join(absent[:3])} of {architecture}")


def _fit_attention(model: nn.Module, size: Size) -> None:
    """Let the attention of an EfficientFormer, which timm builds for 224 pixels, take smaller images.

    A bias belongs to an offset between two tokens, and the table of biases has all offsets in a grid of 7 x 7. Fewer
    tokens use a part of it. (EfficientFormerV2 takes images of its own size only.)

    Raises:
        SystemExit: the images are larger than 224 pixels.
    """
    from timm.models.efficientformer import Attention

    for module in model.modules():
        if not isinstance(module, Attention):
            continue
        side = math.isqrt(module.attention_biases.shape[1])
        rows, columns = (math.ceil(pixels / 32) for pixels in size)
        if max(rows, columns) > side:
            raise SystemExit(f"--image_size: this model takes at most {32 * side} pixels, not {max(size)}")
        positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        offsets = (positions[:, None] - positions[None]).abs()
        module.attention_bias_idxs = offsets[..., 0] * side + offsets[..., 1]


def freeze_all_but(model: nn.Module, names: list[str]) -> None:
    """Freeze all parameters but those of the modules with these names."""
    prefixes = tuple(f"{name}." for name in names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(prefixes)
