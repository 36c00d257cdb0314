"""What an adapter does around its layers: it stands inside other modules of their blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .layer import BackwardRule, LBPWHTLayer
from .stacked import CHILD, Inside, stand_inside


class Around(Inside):
    """Stands inside a module that is no adapted layer, while the adapters that want it are active."""

    def _is_active(self) -> bool:
        if torch.compiler.is_compiling():  # it decides itself what to save, and what to multiply how
            return False
        wanted = not self.disable_adapters and any(name in self.lbpwht_rule for name in self.active_adapters)
        return wanted and self.training and not self.exact_backward and torch.is_grad_enabled()

    def __repr__(self) -> str:
        return f"lbpwht.{type(self).__name__}({', '.join(self.lbpwht_rule)})"


def stand_around(
    host: nn.Module, kind: type[Around], layers: list[LBPWHTLayer], rules: dict[str, BackwardRule]
) -> None:
    """Put one of a kind inside a module of the block that the layers are in, or tell the one there of these rules."""
    if not hasattr(host, CHILD):
        stand_inside(host, kind(layers[0].finder, "", rules))
    inside: Around = getattr(host, CHILD)
    inside.lbpwht_rule.update(rules)
    inside._active_adapter, inside._disable_adapters = layers[0]._active_adapter, layers[0].disable_adapters


def blocks_with_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[LBPWHTLayer]]]:
    """The outermost members of lists of blocks that hold adapted layers, and these layers."""
    blocks: dict[str, list[LBPWHTLayer]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LBPWHTLayer) or isinstance(module, Around):
            continue
        parts = name.split(".")
        for length in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[: length - 1])), (nn.ModuleList, nn.Sequential)):
                blocks.setdefault(".".join(parts[:length]), []).append(module)
                break
    for name, layers in blocks.items():
        yield model.get_submodule(name), layers
