"""Tests whether a layer is one that [`lbp_peft.ops.recompute`] can run on few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .dropout import active_dropouts, random_state_restored, replace_forwards


def why_not_token_wise(layer: nn.Module, num_features: int, dtype: torch.dtype, device: torch.device) -> str:
    """The reason why a layer does not apply the same affine map to each token in each call; "" if it does.

    The layer is run on a few random tokens with its trained parameters perturbed, since many adapters do nothing before
    they are trained. Dropout of the layer's input is allowed; other dropout is not.
    """
    if random := _random_parts(layer):
        return f"its {random} is stochastic"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    a, b = draw(2, 3, num_features), draw(2, 3, num_features)
    perturbed = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p)
        for name, p in layer.named_parameters()
        if p.requires_grad
    }
    other_inputs: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        def pass_on(module: nn.Module, z: Tensor) -> Tensor:
            if z is not x and not (z.dtype != x.dtype and z.shape == x.shape):
                other_inputs.append(z)
            return z

        with replace_forwards(active_dropouts(layer), pass_on):
            return functional_call(layer, perturbed, (x,)).double()

    fixed = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    with torch.enable_grad(), random_state_restored(device):
        if functional_call(layer, fixed, (a,)).requires_grad:
            return "it is trained by tensors that are not among its parameters"
    with torch.no_grad(), random_state_restored(device):
        at_a, at_zero = run(a), run(torch.zeros_like(a))
        scale = at_a.abs().max() + 1e-6
        tolerance = scale * (2e-3 if dtype.itemsize >= 4 and not torch.is_autocast_enabled(device.type) else 5e-2)
        if other_inputs:
            return "it drops out more than its input"
        if at_a.shape[:-1] != a.shape[:-1]:
            return "it changes the number of tokens"
        if not all((run(a) - at_a).abs().max() <= tolerance for _ in range(4)):
            return "it is stochastic"
        if (run(a[:, 1:2]) - at_a[:, 1:2]).abs().max() > tolerance:
            return "its output for a token depends on other tokens"
        if (run(a + b) - at_a - run(b) + at_zero).abs().max() > 2 * tolerance:
            return "it is not linear in its input"
    return ""


def _random_parts(layer: nn.Module) -> str:
    """Dropout other than nn.Dropout, by name: modules of such a class, or rates that a layer keeps as attributes."""
    for module in layer.modules():
        class_name = type(module).__name__
        if (
            "dropout" in class_name.lower()
            and class_name != "Dropout"
            and module.training
            and getattr(module, "p", 1) > 0
        ):
            return class_name
        for name, value in vars(module).items():
            rates = value.values() if isinstance(value, dict) else [value]
            if name.endswith("dropout") and any(isinstance(rate, float) and rate > 0 for rate in rates):
                return name
    return ""
