"""The masks of a model's texts, which distinguish words from padding.

There are three conventions. In transformers, an argument called ..._attention_mask has ones, or True, at words. A mask
of a floating dtype with negative values is added to attention scores: it is 0 at words, and a large negative number or
minus infinity at padding. In PyTorch, an argument called ..._padding_mask is True at padding.

If a model has yet another convention, words are taken for padding. They have gradients, which padding must not have, so
the backward pass raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ATTENTION, _PADDING = "attention_mask", "padding_mask"
# Below any bias that a model may add to attention scores, and above the values that represent minus infinity.
_FAR_BELOW = -1000
_KINDS = (_ATTENTION, "key_padding_mask", _PADDING)


def padding_masks_in(inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """The padding masks of the texts among a model's inputs, by the names of these masks."""
    masks = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and is_mask(name, value)}
    return {name: padding_mask_of(name, mask) for name, mask in masks.items()}


def is_mask(name: str, value: Tensor) -> bool:
    """Whether an argument is a mask (N, L) of the words of a text."""
    if value.dim() != 2 or value.requires_grad:
        return False
    is_bool = not value.is_floating_point() and not value.is_complex()
    return name.endswith(_ATTENTION) or (name.endswith(_PADDING) and is_bool)


def padding_mask_of(name: str, mask: Tensor) -> Tensor:
    """A tensor of the shape of the mask that is True where a word is padding."""
    if name.endswith(_PADDING):
        return mask != 0
    if mask.is_floating_point():
        is_added = (mask < 0).any() | ~(mask != 0).any()
        return torch.where(is_added, mask < _FAR_BELOW, mask == 0)
    return mask == 0


def mask_of(masks: dict[str, Tensor], text: str) -> Tensor | None:
    """The mask that belongs to a text, by name: decoder_attention_mask to decoder_input_ids."""
    for ending in ("input_ids", "inputs_embeds", ""):
        if not text.endswith(ending):
            continue
        start = text.removesuffix(ending) if ending else f"{text}_"
        for kind in _KINDS:
            if (mask := masks.get(f"{start}{kind}")) is not None:
                return mask
    return None
