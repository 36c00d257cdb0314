"""What an adapter does around its layers: it stands inside other modules of their blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .layer import BackwardRule, LBPWHTLayer
from .stacked import CHILD, Inside, stand_inside


class Around(Inside):
    """Stands inside a module that is no adapted layer, while adapters that want it are active in its block.

    It is no adapter: PEFT neither lists nor switches it. It asks the adapted layers.

    Args:
        layers: Those of the block.
    """

    def __init__(self, layers: Sequence[LBPWHTLayer]):
        super().__init__()
        # In a tuple, since they are around this module, not parts of it.
        self.layers = tuple(layers)

    def _is_active(self) -> bool:
        if torch.compiler.is_compiling():  # it decides itself what to save, and what to multiply how
            return False
        rules = (rule for layer in self.layers for rule in layer.rules_in_effect())
        return self.training and torch.is_grad_enabled() and any(self.is_wanted(rule) for rule in rules)

    @staticmethod
    def is_wanted(rule: BackwardRule) -> bool:
        """Whether an adapter with this rule asks for it."""
        return True

    def __repr__(self) -> str:
        return f"lbpwht.{type(self).__name__}()"


def stand_around(host: nn.Module, kind: type[Around], layers: Sequence[LBPWHTLayer]) -> None:
    """Put one of a kind inside a module of the block that the layers are in, or tell the one there of these layers."""
    if hasattr(host, CHILD):
        getattr(host, CHILD).layers = tuple(layers)
    else:
        stand_inside(host, kind(layers))


def blocks_with_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[LBPWHTLayer]]]:
    """The outermost members of lists of blocks that hold adapted layers, and these layers."""
    blocks: dict[str, list[LBPWHTLayer]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LBPWHTLayer):
            continue
        parts = name.split(".")
        for length in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[: length - 1])), (nn.ModuleList, nn.Sequential)):
                blocks.setdefault(".".join(parts[:length]), []).append(module)
                break
    for name, layers in blocks.items():
        yield model.get_submodule(name), layers
