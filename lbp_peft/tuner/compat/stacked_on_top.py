"""Support for adapters of another method on top of LBP-WHT layers."""

from __future__ import annotations

import functools

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.base import LBPWHTLayer
from ..layers.linear import LBPWHTLinear


def patch_get_base_layer() -> None:
    """Make `get_base_layer` return an LBP-WHT layer if that computes with a weight of its own.

    PEFT returns the innermost layer, whose weight is not in use then: an adapter of another method that is merged into
    it would be lost.
    """
    innermost = BaseTunerLayer.get_base_layer
    if hasattr(innermost, "__wrapped__"):
        return

    @functools.wraps(innermost)
    def get_base_layer(self: BaseTunerLayer) -> nn.Module:
        layer = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
            if isinstance(layer, LBPWHTLinear) and not isinstance(self, LBPWHTLayer):
                _warn_of_order(layer)
                if layer.weights_in_effect():
                    _check_single_weight(layer)
                    return layer
        return layer

    BaseTunerLayer.get_base_layer = get_base_layer


def _warn_of_order(layer: LBPWHTLinear) -> None:
    layer.finder.warn_once(
        "order",
        f"Another adapter was put on top of LBP-WHT ({layer.layer_name}). It is trained correctly, but not cheaply: it "
        "saves its whole input. Put the other adapter on first and LBP-WHT on that, with train_base_weight=False.",
    )


def _check_single_weight(layer: LBPWHTLinear) -> None:
    """Raise ValueError if the weight of a layer is a sum, which no other adapter can be merged into."""
    trained = layer.weights_in_effect()
    if len(trained) > 1:
        raise ValueError(
            f"{layer.layer_name} computes with the sum of {len(trained)} LBP-WHT adapters ({', '.join(trained)}), "
            "which no adapter on top of it can be merged into. Activate one of them, or merge them first."
        )
