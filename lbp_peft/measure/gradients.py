"""Compares the gradients of LBP-WHT with exact ones, on a given model and batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .running import LossFunction, device_of, loss_of_output, preserve_state, restore_random_state, to_device

_SHOWN = 8


@dataclass(frozen=True)
class TensorQuality:
    """The gradient of one tensor, compared with the exact one.

    Attributes:
        cosine: The cosine of the angle between the two, 1 if they have the same direction.
        norm_ratio: The norm of the gradient, divided by that of the exact one.
    """

    cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class GradientQuality:
    """The gradients of a training step, compared with the exact ones. Printed, it is a table of the worst tensors.

    Attributes:
        cosine, norm_ratio: The figures for all trained matrices in layers with LBP-WHT as one vector. Biases do not
            count: their gradients are exact except for the errors of later layers.
        tensors: The [`TensorQuality`] of each trained tensor with a gradient, also of the head, by name.
    """

    cosine: float
    norm_ratio: float
    tensors: dict[str, TensorQuality] = field(repr=False)

    @property
    def worst(self) -> str:
        """The name of the tensor whose gradient has the lowest cosine."""
        return min(self.tensors, key=lambda name: self.tensors[name].cosine)

    def __str__(self) -> str:
        lines = [f"gradient cosine {self.cosine:.4f}, norm ratio {self.norm_ratio:.3f} (1 and 1: exact)"]
        ordered = sorted(self.tensors.items(), key=lambda item: item[1].cosine)
        lines += [f"  {quality.cosine:.4f}  {quality.norm_ratio:.3f}  {name}" for name, quality in ordered[:_SHOWN]]
        if len(ordered) > _SHOWN:
            lines.append(
                f"  and {len(ordered) - _SHOWN} tensors with cosines of at least {ordered[_SHOWN][1].cosine:.4f}"
            )
        return "\n".join(lines)


def gradient_quality(model: nn.Module, batch: object, loss_fn: LossFunction | None = None) -> GradientQuality:
    """Compare the gradients of one batch with those of exact backpropagation through the same model.

    Two forward and backward passes are run in training mode, with the same random numbers. Weights, gradients, buffers
    (such as the statistics of batch norms), modes and random number generators are left as they were.

    Args:
        model: A model with LBP-WHT layers, without wrappers such as DDP's.
        batch: The arguments of the model including labels, or the batch for `loss_fn`. It is moved to the model's
            device.
        loss_fn: (model, batch) -> scalar loss. None: `model(**batch).loss`.

    Returns:
        The comparison, tensor by tensor and in all.

    Raises:
        ValueError: the model has no LBP-WHT layers, or trains nothing, or returns no loss.
        RuntimeError: its gradient checkpointing is reentrant, which `torch.autograd.grad` does not support.

    Example:
        >>> quality = lbp_peft.gradient_quality(model, batch)
        >>> print(quality.cosine, quality.tensors[quality.worst])
    """
    from ..tuner.layers.base import LBPWHTLayer
    from ..tuner.report import exact_backward

    adapted = [
        f"{name.removesuffix('.low_rank_backward')}."  # a patch of another method's layer
        for name, module in model.named_modules()
        if isinstance(module, LBPWHTLayer)
    ]
    if not adapted:
        raise ValueError("The model has no LBP-WHT layers, so its gradients are exact.")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("The model has no trained parameters, so there are no gradients to compare.")
    device = device_of(model)
    batch = to_device(batch, device)

    def gradients() -> dict[str, Tensor]:
        with restore_random_state(device), torch.enable_grad():
            loss = (loss_fn or loss_of_output)(model, batch)
            computed = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name: grad for name, grad in zip(trained, computed, strict=True) if grad is not None}

    with preserve_state(model), torch.compiler.set_stance("force_eager"):
        model.train()
        with exact_backward(model):
            exact = gradients()
        low_rank = gradients()
    return compare(
        low_rank, exact, [name for name in exact if name.startswith(tuple(adapted)) and exact[name].dim() > 1]
    )


def compare(gradients: dict[str, Tensor], exact: dict[str, Tensor], counted: Iterable[str]) -> GradientQuality:
    """Compare gradients by name. Tensors whose gradients are zero in both are left out.

    Args:
        gradients: The gradients to compare with the exact ones.
        exact: The exact gradients.
        counted: The names of the tensors that make up the totals.
    """
    counted = set(counted)
    tensors, total = {}, [0.0, 0.0, 0.0]
    for name, expected in exact.items():
        if name not in gradients:
            continue
        sums = _sums(gradients[name], expected)
        if sums[1] == sums[2] == 0:
            continue
        tensors[name] = _quality(*sums)
        if name in counted:
            total = [a + b for a, b in zip(total, sums, strict=True)]
    whole = _quality(*total)
    return GradientQuality(whole.cosine, whole.norm_ratio, tensors)


def _sums(gradient: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """The inner product of two tensors, and the squares of their norms."""
    a, b = gradient.detach().flatten().float(), exact.detach().flatten().to(gradient.device).float()
    return float(a @ b), float(a @ a), float(b @ b)


def _quality(product: float, square: float, expected: float) -> TensorQuality:
    if square == 0 or expected == 0:  # a vector without a direction
        return TensorQuality(float(square == expected), 1.0 if square == expected else 0.0 if square == 0 else math.inf)
    return TensorQuality(min(product / math.sqrt(square * expected), 1.0), math.sqrt(square / expected))
