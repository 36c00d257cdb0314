"""What follows the operations as they run, so that they have to be written another way."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vjp, vmap, ...) is under way, outside of `torch.compile`.

    What is compiled is transformed by the compiler's own means.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def must_be_functional() -> bool:
    """Whether results must be new tensors: `torch.compile` and transforms cannot follow writes into views or `out=`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation (`torch.func.jvp`, `jacfwd`, `hessian`) is under way."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
