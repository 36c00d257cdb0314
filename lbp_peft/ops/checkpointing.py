"""Tells the two forward passes of gradient checkpointing apart, so that unused results are not computed.

`torch.utils.checkpoint` with `use_reentrant=False` runs the forward pass with gradients on and throws away what is
saved for the backward pass. When the backward pass asks for it, the same function runs again, until the last tensor
that the first pass saved has been saved once more. Later operations are not run. (With `use_reentrant=True`
the first pass runs without gradients, so that nothing is saved, and the second one is differentiated itself.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from ..transforms import must_be_functional


def _code_of_pack_hook(class_name: str) -> CodeType | None:
    """The code of the hook by which one of the two passes saves tensors; None if PyTorch has no such hook.

    Args:
        class_name: The name of the class whose constructor defines the hook.
    """
    constructor = getattr(getattr(checkpoint, class_name, None), "__init__", None)
    code = getattr(constructor, "__code__", None)
    constants = getattr(code, "co_consts", ())
    hooks = [one for one in constants if isinstance(one, CodeType) and one.co_name == "pack_hook"]
    return hooks[0] if len(hooks) == 1 else None


_FIRST, _AGAIN = _code_of_pack_hook("_checkpoint_hook"), _code_of_pack_hook("_recomputation_hook")


def saved_tensors_are_discarded() -> bool:
    """Whether only the shape, dtype and device of tensors that are saved now will matter.

    It is False under dispatch modes: those of selective checkpointing count the operations of both passes.
    """
    return _FIRST is not None and _code_of_current_hook() is _FIRST


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of a shape and dtype on the device of another, without memory of its own and without values."""
    return like.new_empty((), dtype=dtype).expand(shape)


def only_saved_tensors_matter() -> bool:
    """Whether this is the second pass, which ends as soon as the last tensor has been saved."""
    return _AGAIN is not None and _code_of_current_hook() is _AGAIN


def _code_of_current_hook() -> CodeType | None:
    if must_be_functional():
        return None
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if not hooks or torch._C._len_torch_dispatch_stack() > 0:
        return None
    code: CodeType | None = getattr(inspect.unwrap(hooks[0]), "__code__", None)
    return code
