"""Finds layers that are not adapted although patches pass through them between adapted layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .records import LayoutRecord


@dataclass(frozen=True)
class PassedLayer:
    """A layer that is not adapted and that patches of an image pass through.

    Attributes:
        name: The layer's name.
        in_features: C_in.
        out_features: C_out.
    """

    name: str
    in_features: int
    out_features: int


@dataclass
class PassedLayers:
    """The layers of one traced forward pass that patches of an image pass through without being adapted.

    Layers before the first adapted layer are embeddings, and layers after the last one belong to heads or decoders.
    Neither count.

    Attributes:
        others: The axis of the channels in the input of each layer that could be adapted but is not, by name.
        left_out: The layers between adapted layers.
    """

    others: Mapping[str, int] = field(default_factory=dict)
    left_out: list[PassedLayer] = field(default_factory=list)
    _since_adapted: dict[str, PassedLayer] = field(default_factory=dict)
    _has_begun: bool = False

    def asks_for(self, name: str) -> bool:
        """Whether the layer of this name would count if patches pass through it."""
        return self._has_begun and name in self.others and name not in self._since_adapted

    def note(self, name: str, x: Tensor, output: Tensor, record: LayoutRecord) -> None:
        """Record a call of a layer that is not adapted."""
        if record.layout is not None and not record.text:
            axis = self.others[name]
            self._since_adapted[name] = PassedLayer(name, x.shape[axis], output.shape[axis])

    def note_adapted(self) -> None:
        """Record a call of an adapted layer."""
        self._has_begun = True
        known = {layer.name for layer in self.left_out}
        self.left_out += [layer for name, layer in self._since_adapted.items() if name not in known]
        self._since_adapted.clear()


def without_projections(layers: list[PassedLayer]) -> list[str]:
    """The names of layers, without projections: single layers, and siblings that map patches to another width."""
    siblings: dict[str, list[PassedLayer]] = {}
    for layer in layers:
        siblings.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    groups = [group for group in siblings.values() if len(group) > 1]
    kept = [group for group in groups if group[0].in_features == group[-1].out_features]
    return [layer.name for group in kept for layer in group]
