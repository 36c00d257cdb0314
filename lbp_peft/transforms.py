"""Tells whether `torch.compile` or a transform of `torch.func` is active, and provides contexts for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vjp, vmap, ...) is active, outside `torch.compile`.

    Within `torch.compile` the compiler handles the transforms itself.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def must_be_functional() -> bool:
    """Whether results must be new tensors: `torch.compile` and transforms cannot trace writes into views or `out=`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode`, such as that of selective checkpointing, is active, outside `torch.compile`."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def outside_transforms() -> AbstractContextManager:
    """Hide all operations within the block from the active transforms of `torch.func`."""
    return temporarily_clear_interpreter_stack() if in_transform() else nullcontext()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation (`torch.func.jvp`, `jacfwd`, `hessian`) is active."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def backward_pass() -> AbstractContextManager:
    """Context for the backward pass of an autograd function: `torch.no_grad()`, except within a transform.

    A transform may differentiate the results again. They must stay connected to their inputs then, because otherwise a
    second derivative would silently be zero instead of being refused.

    Raises:
        RuntimeError: autograd runs several backward passes at once (`is_grads_batched=True`).
    """
    # In a compiled backward pass, a generator-based context would leave autograd disabled for good (torch 2.14.1).
    return torch.no_grad() if torch.compiler.is_compiling() else _eager_backward_pass()


@contextmanager
def _eager_backward_pass() -> Iterator[None]:
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
    """Context for tensors that an autograd function saves: within a transform, they stay connected to the inputs.

    Autograd disables gradients in its functions, and thereby for all enclosing transforms too.
    """
    return torch.enable_grad() if in_transform() else nullcontext()
