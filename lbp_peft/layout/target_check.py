"""Collects the layers that patches of an image pass through in a forward pass that is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..encoder_of_pass import PassedLayer
from .records import LayoutRecord


@dataclass
class PassedLayers:
    """The layers that patches of an image pass through in one traced forward pass.

    Attributes:
        others: The axis of the channels in the input of each layer that could be adapted but is not, by name.
        passed: The layers that are not adapted and that patches pass through, in the order of their first calls, with
            the names of the adapted layers among them.
    """

    others: Mapping[str, int] = field(default_factory=dict)
    passed: dict[str, PassedLayer | None] = field(default_factory=dict)

    def asks_for(self, name: str) -> bool:
        """Whether it is of interest that patches pass through the layer of this name."""
        return name in self.others and name not in self.passed

    def note(self, name: str, x: Tensor, output: Tensor, record: LayoutRecord) -> None:
        """Record a call of a layer that is not adapted."""
        if record.layout is not None and not record.text:
            axis = self.others[name]
            self.passed[name] = PassedLayer(name, x.shape[axis], output.shape[axis])

    def note_adapted(self, name: str) -> None:
        """Record a call of an adapted layer."""
        self.passed.setdefault(name, None)

    def left_out(self) -> list[PassedLayer]:
        """The layers between the first and the last adapted one that are not adapted."""
        layers = list(self.passed.values())
        places = [place for place, layer in enumerate(layers) if layer is None]
        return [layer for layer in layers[places[0] : places[-1]] if layer is not None] if places else []
