"""Refuses a loss that depends on padding, also where the backward pass is compiled.

`torch.compile` cannot trace a Python `if` on the values of a tensor. The check is a custom operator there, and its
result is used, so that the compiler does not remove it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import in_transform


def zero_if_unused(grad: Tensor, padding_mask: Tensor) -> Tensor | float:
    """Check that padding has no gradient, and return the zero to fill it with; the check only runs if that is used.

    Args:
        grad: Shape (N, L, C), the gradient of the tokens.
        padding_mask: Shape (N, L), True where a token is padding.

    Returns:
        0, or a tensor of shape () and the dtype of `grad`.

    Raises:
        RuntimeError: a padding token has a gradient.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lbp_peft.zero_if_unused(grad, padding_mask)
    if in_transform():  # within vmap, values can only be read for all samples together
        is_used = torch.func.debug_unwrap(((grad != 0) & padding_mask[:, :, None]).any())
    else:
        is_used = grad[padding_mask]
    _raise_if_any(is_used)
    return 0.0


def _raise_if_any(is_used: Tensor) -> None:
    if is_used.any():
        raise RuntimeError(
            "Tokens that attention_mask calls padding have a gradient: the loss depends on them, and low-rank "
            "backpropagation would leave them out. Pass no attention_mask if they are to count, keep them out of "
            "the loss, or leave these layers out with exclude_modules."
        )


# A CUDA graph cannot contain the check, since the CPU waits for a value from the device.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@torch.library.custom_op("lbp_peft::zero_if_unused", mutates_args=(), tags=_TAGS)
def _zero_if_unused(grad: Tensor, padding_mask: Tensor) -> Tensor:
    _raise_if_any(grad[padding_mask])
    return grad.new_zeros(())


@_zero_if_unused.register_fake
def _(grad: Tensor, padding_mask: Tensor) -> Tensor:
    return grad.new_zeros(())
