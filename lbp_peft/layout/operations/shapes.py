"""Rules for operations that move whole tensors: views, permutations, and joining."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operation_names import names_in
from ..positions import compact, join
from .registry import Result, Tracer, are_constant, positions_or_nowhere, rule

# These read only the shape of their other argument.
_LIKE_OTHERS = ("view_as", "reshape_as", "expand_as")


@rule(
    *names_in("""
        permute transpose swapaxes swapdims movedim moveaxis t adjoint squeeze unsqueeze flatten unflatten reshape
        ravel view_as reshape_as expand expand_as broadcast_to repeat tile repeat_interleave narrow select diagonal
        rot90 chunk split split_with_sizes tensor_split unbind hsplit vsplit unfold
    """)
)
def _move(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """These operations can be applied to the positions as they are."""
    positions, name = tracer.positions(x), tracer.current_name
    # Arguments may be tensors, for instance the number of times that each element is repeated.
    if (name not in _LIKE_OTHERS and not are_constant(tracer, (args, kwargs))) or positions is None:
        return None
    function = getattr(Tensor, name, None) or getattr(torch, name)
    result: Result = function(positions, *args, **{key: value for key, value in kwargs.items() if key != "out"})
    return result


@rule("roll", "flip", "fliplr", "flipud")
def _roll(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Nothing moves along axes along which positions are expanded."""
    positions, name = tracer.positions(x), tracer.current_name
    if positions is None or not are_constant(tracer, (args, kwargs)):
        return None
    is_flattened = name == "roll" and kwargs.get("dims", args[1] if len(args) > 1 else ()) in ((), [], None)
    compacted = positions if is_flattened else compact(positions)
    moved: Tensor = getattr(Tensor, name)(compacted, *args, **kwargs)
    return moved.expand(positions.shape)


@rule("view")
def _view(tracer: Tracer, x: Tensor, *shape: Any, **kwargs: Any) -> Result:
    if kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return None
    positions = tracer.positions(x)  # their strides may differ from those of the tensor, so that view would fail
    return None if positions is None else positions.reshape(*shape)


@rule("t_all")
def _transpose_all(tracer: Tracer, x: Tensor) -> Result:
    positions = tracer.positions(x)
    return None if positions is None else positions.permute(*reversed(range(positions.dim())))


@rule("view_as_complex")
def _view_as_complex(tracer: Tracer, x: Tensor) -> Result:
    positions = tracer.positions(x)
    return None if positions is None else positions[..., 0]


@rule("view_as_real")
def _view_as_real(tracer: Tracer, x: Tensor) -> Result:
    positions = tracer.positions(x)
    return None if positions is None else positions[..., None].expand(*positions.shape, 2)


@rule("cat", "concat", "concatenate", "hstack", "vstack", "dstack", "stack", "column_stack", "row_stack")
def _cat(tracer: Tracer, tensors: Any, *args: Any, **kwargs: Any) -> Result:
    positions, name = [positions_or_nowhere(tracer, t) for t in tensors], tracer.current_name
    axis = args[0] if args else kwargs.get("dim", kwargs.get("axis", 0))
    if name == "stack":
        return join([p.unsqueeze(axis) for p in positions], axis)
    if name.startswith(("cat", "conc")):
        return join(positions, axis)
    stacked: Tensor = getattr(torch, name)(positions)
    return stacked
