"""Side tuning: a small network beside the frozen backbone, trained without a backward pass through the backbone.

The method follows the idea of ladder side-tuning (arXiv 2206.06522), with pooled features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput


class SideTuned(nn.Module):
    """A frozen classifier whose logits a side network corrects.

    The side network reads the outputs of the tapped layers, averaged over tokens or pixels: each is normalised and
    projected to `width` features, which are summed up from the first layer to the last with a GELU in between.

    Args:
        model: The classifier, frozen except for its head.
        taps: The names of the layers whose outputs are read: linear layers or pointwise convolutions.
        width: The number of features of the side network.
    """

    def __init__(self, model: nn.Module, taps: list[str], width: int):
        super().__init__()
        self.model = model
        self._pooled: dict[int, Tensor] = {}
        layers = [model.get_submodule(name) for name in taps]
        self.norms, self.projections = nn.ModuleList(), nn.ModuleList()
        for index, layer in enumerate(layers):
            features = layer.weight.shape[0]
            self.norms.append(nn.LayerNorm(features))
            self.projections.append(nn.Linear(features, width))
            layer.register_forward_hook(partial(self._pool, index))
        self.last = nn.Linear(width, model.config.num_labels)
        nn.init.zeros_(self.last.weight)  # training begins with the backbone's own logits
        nn.init.zeros_(self.last.bias)

    def _pool(self, index: int, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        axes = (2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(1, output.dim() - 1))
        self._pooled[index] = output.detach().mean(axes)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> ImageClassifierOutput:
        self._pooled.clear()
        logits = self.model(**inputs).logits
        state = torch.zeros_like(logits[:, :1])
        for index, (norm, projection) in enumerate(zip(self.norms, self.projections, strict=True)):
            state = F.gelu(state + projection(norm(self._pooled[index])))
        self._pooled.clear()
        logits = logits + self.last(state)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
