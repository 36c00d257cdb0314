"""Which tokens of a text are only padding? Read off the attention masks that a model's text tower is given."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .hints import takes


class PaddingFinder:
    """Remembers the attention mask of the forward pass under way or last done, by its shape (N, L)."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], Tensor | None] = {}
        # Shapes for which several masks were seen since the last backward pass that ran layers again.
        self._several: set[tuple[int, int]] = set()
        self._reran = False
        self._hooks: dict[nn.Module, Any] = {}

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            if module not in self._hooks and takes(module, "input_ids", "attention_mask"):
                self._hooks[module] = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def detach(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def padding(self, shape: torch.Size, in_backward: bool) -> Tensor | None:
        """Shape (N, L), True where a token of an input (N, L, C) is only padding; None if no mask was given.

        Raises:
            RuntimeError: layers are run again, and it cannot be told for which of several masks.
        """
        key = (int(shape[0]), int(shape[1]))
        if in_backward:
            self._reran = True
            if key in self._several:
                raise RuntimeError(
                    "Gradient checkpointing runs layers again, and texts with different attention masks went through "
                    "the model before this backward pass: they cannot be told apart. Call backward after each, or do "
                    "without gradient checkpointing."
                )
        return self._last.get(key)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        words, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(words, Tensor) or words.dim() != 2 or not torch.is_grad_enabled():
            return
        if mask is not None and mask.shape != words.shape:  # made from one that was noted before
            return
        if self._reran:
            self._several.clear()
            self._last.clear()
            self._reran = False
        key = (words.shape[0], words.shape[1])
        padding = None if mask is None else mask == 0
        if key in self._last and not _equal(self._last[key], padding):
            self._several.add(key)
        self._last[key] = padding


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
