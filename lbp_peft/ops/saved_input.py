"""What a layer saves of its input for the gradient of its weight: the input's projection, which layers may share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..projection import Projection
from ..transforms import in_transform, must_be_functional, tracked_by_transforms
from .checkpointing import saved_tensors_are_discarded
from .plan import BackwardPlan
from .tokens import as_tokens


class _Shared(threading.local):
    """The last projected input in the innermost [`shared_projections`] of this thread; None outside of any."""

    last: _ProjectedInput | None = None


@dataclass
class _ProjectedInput:
    """An input and its saved projection, by weak references, so that neither tensor is kept alive."""

    x: Callable[[], Tensor | None] = lambda: None
    x_hat: Callable[[], Tensor | None] = lambda: None
    key: tuple = ()


_shared = _Shared()


@contextmanager
def shared_projections() -> Iterator[None]:
    """Let consecutive layers that receive the same tensor (query, key and value) share its projection.

    Enter it for one forward pass of the module that owns these layers, which must not change their input in between.
    Changes cannot be detected with certainty, since version counters miss writes through `.data` or NumPy. Nested
    blocks and other threads share nothing with it.
    """
    before, _shared.last = _shared.last, _ProjectedInput()
    try:
        yield
    finally:
        _shared.last = before


def input_to_save(x: Tensor, projection: Projection | None, plan: BackwardPlan, source: Tensor | None = None) -> Tensor:
    """The tensor to save of an input for the gradient of a weight: its projection, or the input itself.

    Args:
        x: Shape (N, ..., C).
        projection: The projection of the weight gradient; None: all tokens are saved.
        plan: The plan of the backward pass.
        source: The tensor that x was cast from; None: x itself.

    Returns:
        Shape (N, k, C) in the form of [`BackwardPlan.to_saved`], or (N, L, C) without a projection. It has no values in
        the first pass of gradient checkpointing, which discards saved tensors.
    """
    layout = plan.layout
    if projection is None:
        return as_tokens(x, layout)
    if saved_tensors_are_discarded():
        *_, channels = x.shape
        num_images = x.numel() // (channels * projection.layout.num_tokens)
        num_rows = projection.num_coefficients
        return plan.empty_saved(x, (num_images, num_rows, channels))
    if in_transform():
        with tracked_by_transforms():
            return projection.project(as_tokens(x, layout)).to(x.dtype)
    source = x if source is None else source
    # The compiler finds common expressions itself, and that of torch 2.11 cannot read what is shared. Inference tensors
    # have no version counter, and tensors of other classes, such as a tracer's, no address.
    last = None if must_be_functional() else _shared.last
    if last is None or source.is_inference() or type(source) is not Tensor:
        return plan.to_saved(projection.project(as_tokens(x, layout)))
    identity = source._version, source.data_ptr(), source.shape, source.stride()
    key = (
        *identity,
        x.dtype,
        plan.saved_dtype(x.dtype),
        plan.saves_8_bits,
        projection.layout,
        projection.basis,
        id(projection.padding_mask),
    )
    if last.x() is source and last.key == key and (x_hat := last.x_hat()) is not None:
        return x_hat
    x_hat = plan.to_saved(projection.project(as_tokens(x, layout)))
    last.x, last.x_hat, last.key = weakref.ref(source), weakref.ref(x_hat), key
    return x_hat
