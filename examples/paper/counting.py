"""Counts the computation of a backward pass as the paper does.

[`lbp_peft.measure.multiply_adds`] counts the products of the whole backward pass: attention, depthwise convolutions and
the head too. The paper counts the linear layers of the adapted part alone, two floating-point operations (FLOPs) for a
multiply-add of their products, and one for each addition of the Walsh-Hadamard transform, whose entries are +-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common.models import train_mode
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lbp_peft import LBPWHTLayer, exact_backward
from lbp_peft.measure import multiply_adds
from lbp_peft.measure.running import preserve_state

from .models import AdaptedPart


@dataclass(frozen=True)
class LinearBackward:
    """The backward pass of one linear layer, for one image.

    Attributes:
        tokens: L.
        in_features, out_features: C_in and C_out.
        weight: Whether there is a gradient of the weight.
        input: Whether there is a gradient of the input.
        grad_weight_rows, grad_input_rows: The k coefficients that each gradient is computed from; None: all L tokens.
        lora_rank: The rank of the LoRA factors beside the weight; 0: there are none.
        trains_down: Whether the first factor, A, is trained.
    """

    tokens: int
    in_features: int
    out_features: int
    weight: bool = True
    input: bool = True
    grad_weight_rows: int | None = None
    grad_input_rows: int | None = None
    lora_rank: int = 0
    trains_down: bool = True

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of the matrix products."""
        of_weight = self.tokens if self.grad_weight_rows is None else self.grad_weight_rows
        of_input = self.tokens if self.grad_input_rows is None else self.grad_input_rows
        product = self.in_features * self.out_features
        total = self.weight * of_weight * product + self.input * of_input * product
        if self.lora_rank:  # y = x W^T + (x A^T) B^T
            up, down = self.lora_rank * self.out_features, self.lora_rank * self.in_features
            total += of_weight * up  # dB
            if self.trains_down or self.input:
                total += of_input * up  # of x A^T
            total += self.trains_down * of_weight * down + self.input * of_input * down  # dA, dx
        return total

    @property
    def additions(self) -> int:
        """The additions of the transform: x and g are projected, dx is lifted; g once if both gradients share it."""
        trains = self.weight or self.lora_rank > 0
        for_weight = (self.grad_weight_rows or 0) if trains else 0
        for_input = (self.grad_input_rows or 0) if self.input else 0
        of_x = for_weight * self.in_features
        of_g = (for_weight if for_weight == for_input else for_weight + for_input) * self.out_features
        return self.tokens * (of_x + of_g + for_input * self.in_features)

    @property
    def flops(self) -> int:
        return 2 * self.multiply_adds + self.additions


def linear_backwards(model: nn.Module, part: AdaptedPart, batch: dict[str, Tensor]) -> dict[str, LinearBackward]:
    """How the backward pass of each layer of the adapted part runs, seen in a forward pass in training mode.

    Args:
        model: The adapted model.
        part: The adapted part.
        batch: The arguments of the model.

    Returns:
        The backward pass of each layer by the layer's name before adaptation, without layers that have no gradient.
    """
    found: dict[str, LinearBackward] = {}
    num_images = len(next(iter(batch.values())))
    layers = {name: _layer(model, name) for name in part.targets}

    def note(name: str, layer: nn.Module, x: Tensor) -> None:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        on_images = isinstance(base, nn.Conv2d)
        channels = x.shape[1] if on_images else x.shape[-1]
        tokens = x.numel() // channels // num_images  # in all windows of an image
        out_features, in_features = base.weight.shape[:2]
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        if not trained and not x.requires_grad:
            return
        lora = _lora_of(layer)
        low_rank = next((one for one in layer.modules() if isinstance(one, LBPWHTLayer)), None)
        ran = None if low_rank is None else low_rank.last_backward
        kept = [None, None]
        if ran is not None and not ran.why_exact:
            windows = tokens // ran.num_tokens  # of which the layer sees each as an image
            kept = [windows * k if k < ran.num_tokens else None for k in (ran.grad_weight_rows, ran.grad_input_rows)]
        rank, trains_down = (0, True) if lora is None else lora
        found[name] = LinearBackward(
            tokens, in_features, out_features, bool(trained) and lora is None, x.requires_grad, *kept, rank, trains_down
        )

    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda layer, args, output, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with preserve_state(model):
            model(**batch)
            for name, layer in layers.items():
                if name in inputs:
                    note(name, layer, inputs[name])
    finally:
        for handle in handles:
            handle.remove()
    return found


def paper_flops(model: nn.Module, part: AdaptedPart, batch: dict[str, Tensor]) -> int:
    """FLOPs of the backward pass for one image, counted as the paper does."""
    return sum(layer.flops for layer in linear_backwards(model, part, batch).values())


def mean_counts(
    model: nn.Module, part: AdaptedPart, batch: dict[str, Tensor], exact_share: float = 0.0
) -> dict[str, float]:
    """The computation of the backward pass for one image, in both ways of counting, as the mean over all steps.

    Args:
        model: The adapted model.
        part: The adapted part.
        batch: The arguments of the model.
        exact_share: The share of the steps that run exact backpropagation.
    """
    low_rank = _counts(model, part, batch)
    if not exact_share:
        return low_rank
    with exact_backward(model):
        exact = _counts(model, part, batch)
    return {name: (1 - exact_share) * low_rank[name] + exact_share * exact[name] for name in low_rank}


def _counts(model: nn.Module, part: AdaptedPart, batch: dict[str, Tensor]) -> dict[str, float]:
    images = len(batch["pixel_values"])
    with preserve_state(model):
        train_mode(model)
        loss = model(**batch).loss
        with multiply_adds() as backward:
            loss.backward()
    return {"backward_multiply_adds": backward.total / images, "paper_flops": paper_flops(model, part, batch)}


def _layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, or the adapter layer in its place."""
    names = [own for own, _ in model.named_modules() if own == name or own.endswith(f".{name}")]
    return model.get_submodule(min(names, key=len))


def _lora_of(layer: nn.Module) -> tuple[int, bool] | None:
    if not isinstance(layer, LoraLayer):
        return None
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    down: torch.Tensor = layer.lora_A[name].weight
    return layer.r[name], down.requires_grad
