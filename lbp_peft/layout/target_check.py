"""Checks, in a traced forward pass, whether the adapted layers are those that patches of an image pass through."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..bounded import BoundedCache
from ..encoder_of_pass import PassedLayer, left_out, without_patches
from .notices import Notices
from .records import LayoutRecord

_MOST_CHECKS = 64


@dataclass
class PassedLayers:
    """The layers that patches of an image pass through in one traced forward pass.

    Attributes:
        others: The axis of the channels in the input of each layer that could be adapted but is not, by name.
        by_name: The layers that patches pass through, by name, in the order of their first calls; None for an adapted
            layer.
    """

    others: Mapping[str, int] = field(default_factory=dict)
    by_name: dict[str, PassedLayer | None] = field(default_factory=dict)

    def asks_for(self, name: str) -> bool:
        """Whether a layer could be adapted, but is not, and has not been recorded yet."""
        return name in self.others and name not in self.by_name

    def note(self, name: str, x: Tensor, output: Tensor, record: LayoutRecord) -> None:
        """Record a call of a layer that is not adapted."""
        if record.layout is not None and not record.text:
            axis = self.others[name]
            self.by_name[name] = PassedLayer(name, x.shape[axis], output.shape[axis])

    def note_adapted(self, name: str) -> None:
        """Record a call of an adapted layer."""
        self.by_name.setdefault(name, None)

    def left_out(self) -> list[PassedLayer]:
        """The layers between the first and the last adapted one that are not adapted."""
        layers = list(self.by_name.values())
        places = [place for place, layer in enumerate(layers) if layer is None]
        return [layer for layer in layers[places[0] : places[-1]] if layer is not None] if places else []


class TargetCheck:
    """Warns where the layers that are adapted by default are not the encoder's, as far as a traced pass can tell."""

    def __init__(self) -> None:
        self._checked: BoundedCache[Hashable, bool] = BoundedCache(_MOST_CHECKS)

    def check(
        self,
        model: nn.Module,
        passed: Mapping[str, PassedLayer | None],
        records: Mapping[str, list[LayoutRecord]],
        notices: Notices,
    ) -> None:
        """Check the layers that ran in a pass. Another pass with the same layers is not checked again.

        Args:
            model: The model.
            passed: The layers that patches pass through, by name, in the order in which they run; None for an adapted
                layer.
            records: The records of each adapted layer's calls, by the layer's name.
            notices: Gives the warnings.
        """
        kinds = {name: frozenset(map(_kind_of_tokens, of_layer)) for name, of_layer in records.items()}
        key = (tuple(passed), tuple(kinds.items()))
        if self._checked.get(key):
            return
        self._checked[key] = True
        if names := left_out(model, passed):
            notices.note_left_out(names)
        if names := without_patches(kinds):
            notices.note_without_patches(names)


def _kind_of_tokens(record: LayoutRecord) -> str:
    """What a layer has received: "patches", "words", "one token" of each image, or "" if that is not known."""
    if record.layout is None:
        return "" if record.is_surprising else "one token"
    return "words" if record.text else "patches"
