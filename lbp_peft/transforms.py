"""What follows the operations as they run, so that they have to be written another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vjp, vmap, ...) is under way, outside of `torch.compile`.

    What is compiled is transformed by the compiler's own means.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def must_be_functional() -> bool:
    """Whether results must be new tensors: `torch.compile` and transforms cannot follow writes into views or `out=`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def outside_transforms() -> AbstractContextManager:
    """Within, transforms of `torch.func` that are under way see nothing of what happens."""
    return temporarily_clear_interpreter_stack() if in_transform() else nullcontext()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation (`torch.func.jvp`, `jacfwd`, `hessian`) is under way."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


@contextmanager
def backward_pass() -> Iterator[None]:
    """Around the backward pass of an autograd function: `torch.no_grad()`, but where a transform may go on from it.

    There its results have to depend on what they are computed from, or a second derivative would be zero in silence
    where it is to be refused.

    Raises:
        RuntimeError: autograd asks for several backward passes at once, by `is_grads_batched=True`.
    """
    try:
        with nullcontext() if in_transform() else torch.no_grad():
            yield
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
        raise RuntimeError(
            "Low-rank backpropagation does not support is_grads_batched=True (vectorize=True in "
            "torch.autograd.functional). Use torch.func.jacrev, or lbp_peft.exact_backward(model)."
        ) from error


def tracked_by_transforms() -> AbstractContextManager:
    """For what an autograd function saves: likewise. Autograd disables gradients for all transforms around it, too."""
    return torch.enable_grad() if in_transform() else nullcontext()
