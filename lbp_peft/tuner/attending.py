"""Blocks whose attention goes backward by matrix products where these are faster."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionByProducts
from ..cost import multiplies_bf16
from .around import Around, blocks_with_layers, stand_around
from .layer import LBPWHTLayer


class LBPWHTAttending(Around):
    """Stands inside a block with adapted layers, its host, and has the attention in it go backward by products."""

    def run(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's forward pass."""
        with AttentionByProducts() if self._is_active() and _may_pay(*args, *kwargs.values()) else nullcontext():
            return type(host).plain_class.forward(host, *args, **kwargs)


def _may_pay(*inputs: Any) -> bool:
    """Whether a block of these inputs works in bfloat16 on a CPU that multiplies it: the only case that gains."""
    x = next((x for x in inputs if isinstance(x, Tensor)), None)
    if x is None or x.device.type != "cpu" or not multiplies_bf16(x.device):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16


def attend_by_products(model: nn.Module) -> None:
    """Put one into every block with adapted layers."""
    for block, layers in blocks_with_layers(model):
        if not isinstance(block, LBPWHTLayer) and all(block is not layer for layer in layers):
            rules = {name: rule for layer in layers for name, rule in layer.lbpwht_rule.items()}
            stand_around(block, LBPWHTAttending, layers, rules)
