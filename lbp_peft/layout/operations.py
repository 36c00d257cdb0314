"""Rules for how each operation of PyTorch changes positions, by the operation's name.

A rule takes the operation's own arguments and returns the positions of the result. To support another operation, add a
rule here. Positions are lost in an operation without a rule, which costs speed but never correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operation_names import names_in
from .positions import (
    FIRST_TEXT,
    LOST,
    NOWHERE,
    compact,
    joined,
    merged,
    mixed,
    place_in_image,
    pooled,
    resampled,
    same_places,
    sampled,
    source_of,
)

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule: (tracer, the operation's arguments) -> positions, a list of positions, or None if lost."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = function
        return function

    return register


# Operations that move data


def _moves(*names: str) -> None:
    for name in names:
        RULES[name] = _applied_to_positions(name)


_LIKE_OTHERS = ("view_as", "reshape_as", "expand_as")  # which read the shape of another tensor


def _applied_to_positions(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name, None) or getattr(torch, name)

    def rule(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Arguments may be tensors, for instance the number of times that each element is repeated.
        if name not in _LIKE_OTHERS and not _are_fixed((args, kwargs), tracer):
            return None
        return _run(method, tracer.positions(x), args, kwargs)

    return rule


def _are_fixed(values: Any, tracer: Any) -> bool:
    """Whether all tensors in nested arguments are the same in each pass."""
    if isinstance(values, Tensor):
        return bool(tracer.is_constant(values))
    if isinstance(values, slice):
        return _are_fixed((values.start, values.stop, values.step), tracer)
    if isinstance(values, dict):
        return _are_fixed(tuple(values.values()), tracer)
    if isinstance(values, (tuple, list)):
        return all(_are_fixed(value, tracer) for value in values)
    return True


def _run(function: Callable[..., Any], positions: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    return None if positions is None else function(positions, *args, **{k: v for k, v in kwargs.items() if k != "out"})


_moves(
    *names_in("""
        permute transpose swapaxes swapdims movedim moveaxis t adjoint squeeze unsqueeze flatten unflatten reshape
        ravel view_as reshape_as expand expand_as broadcast_to repeat tile repeat_interleave narrow select diagonal
        rot90 chunk split split_with_sizes tensor_split unbind hsplit vsplit unfold
    """)
)


@rule("roll", "flip", "fliplr", "flipud")
def _moved_along_axes(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Nothing moves along axes along which positions are expanded."""
    positions, name = tracer.positions(x), tracer.current_name
    if positions is None or not _are_fixed((args, kwargs), tracer):
        return None
    is_flattened = name == "roll" and kwargs.get("dims", args[1] if len(args) > 1 else ()) in ((), [], None)
    small = positions if is_flattened else compact(positions)
    return getattr(Tensor, name)(small, *args, **kwargs).expand(positions.shape)


@rule("view")
def _view(tracer: Any, x: Tensor, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return None
    positions = tracer.positions(x)  # their strides may differ from those of the tensor, so that view would fail
    return None if positions is None else positions.reshape(*shape)


@rule("t_all")
def _transpose_all(tracer: Any, x: Tensor) -> Any:
    positions = tracer.positions(x)
    return None if positions is None else positions.permute(*reversed(range(positions.dim())))


@rule("cat", "concat", "concatenate", "hstack", "vstack", "dstack", "stack", "column_stack", "row_stack")
def _cat(tracer: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    given = {key: value for key, value in kwargs.items() if key != "out"}
    positions, name = [_or_nowhere(tracer, t) for t in tensors], tracer.current_name
    axis = args[0] if args else given.get("dim", given.get("axis", 0))
    if name == "stack":
        return joined([p.unsqueeze(axis) for p in positions], axis)
    return joined(positions, axis) if name.startswith(("cat", "conc")) else getattr(torch, name)(positions)


def _or_nowhere(tracer: Any, x: Tensor) -> Tensor:
    """Positions of any tensor: NOWHERE if it does not depend on the input, LOST if they are not known."""
    trail = tracer.trail(x)
    if trail is None:
        return torch.full((), NOWHERE, device=x.device).expand(x.shape)
    return torch.full((), LOST, device=x.device).expand(x.shape) if trail.positions is None else trail.positions


@rule("pad")
def _pad(tracer: Any, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    positions = tracer.positions(x)
    num_padded = len(pad) // 2
    for axis in range(positions.dim() - num_padded):
        if positions.shape[axis] > 1 and positions.stride(axis) == 0:
            positions = positions.narrow(axis, 0, 1)
    if mode == "constant":
        padded = F.pad(positions, tuple(pad), value=NOWHERE)
    else:
        padded = _by_index(positions, lambda index: F.pad(index, tuple(pad), mode=mode))
    return padded.expand(*x.shape[: x.dim() - num_padded], *padded.shape[x.dim() - num_padded :])


def _by_index(positions: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an operation to positions that does not support integers and fills with zeros."""
    index = torch.arange(1, positions.numel() + 1, dtype=torch.float64, device=positions.device).view(positions.shape)
    return torch.cat((positions.new_tensor([NOWHERE]), positions.flatten()))[function(index).long()]


@rule("im2col")
def _im2col(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _by_index(tracer.positions(x), lambda index: F.unfold(index, *args, **kwargs))


@rule("col2im")
def _col2im(tracer: Any, x: Tensor, output_size: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> Any:
    size = [_of_axis(output_size, i) for i in (0, 1)]
    pixels = torch.arange(1, size[0] * size[1] + 1, dtype=torch.float64, device=x.device).view(1, 1, *size)
    places = F.unfold(pixels, kernel_size, *args, **kwargs)[0].long() - 1  # (pixels of a patch, patches)
    if places.min() < 0 or places.numel() != size[0] * size[1] or len(places.unique()) != places.numel():
        return None  # patches overlap, or leave gaps
    *before, rows, columns = x.shape
    patches = tracer.positions(x).reshape(*before, rows // len(places), len(places) * columns)
    result = torch.empty_like(patches, memory_format=torch.contiguous_format)
    result[..., places.flatten()] = patches
    return result.unflatten(-1, size)


@rule("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _unshuffle(tracer: Any, x: Tensor, factor: int) -> Any:
    function = F.pixel_unshuffle if tracer.current_name == "pixel_unshuffle" else F.channel_shuffle
    return function(tracer.positions(x), factor)


@rule("pixel_shuffle")
def _pixel_shuffle(tracer: Any, x: Tensor, factor: int) -> Any:
    positions = mixed(tracer.positions(x), -3)
    for axis in (-2, -1):
        positions = resampled(positions, axis, positions.shape[axis] * factor)
    *before, channels, _, _ = x.shape
    return positions.expand(*before, channels // factor**2, *positions.shape[-2:])


@rule("view_as_complex")
def _view_as_complex(tracer: Any, x: Tensor) -> Any:
    return tracer.positions(x)[..., 0]


@rule("view_as_real")
def _view_as_real(tracer: Any, x: Tensor) -> Any:
    positions = tracer.positions(x)
    return positions[..., None].expand(*positions.shape, 2)


# Operations that pick elements by an index. An index from values of the input, or a random one, differs each time.


@rule("__getitem__")
def _getitem(tracer: Any, x: Tensor, index: Any) -> Any:
    positions = tracer.positions(x)
    if positions is None:
        return None
    picked = _picked_axes(index, x.dim(), tracer)
    return positions[index] if _same_along(positions, picked) else None


def _picked_axes(index: Any, num_axes: int, tracer: Any) -> list[int]:
    """The axes along which an index may pick other places in the next pass."""
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(_num_consumed(part) for part in parts)
    axis = 0
    picked: list[int] = []
    for part in parts:
        if part is Ellipsis:
            axis += num_axes - consumed
            continue
        width = _num_consumed(part)
        # Numbers, and lists of them, were chosen by Python code: see `dependencies.py`.
        if not _are_fixed(part, tracer):
            picked += range(axis, axis + width)
        axis += width
    return picked


def _num_consumed(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _same_along(positions: Tensor, axes: list[int]) -> bool:
    """Whether elements that differ in these axes only have the same place, though perhaps in different images."""
    small = place_in_image(compact(positions))
    return all(small.shape[axis] <= 1 or bool((small == small.narrow(axis, 0, 1)).all()) for axis in axes)


@rule("__setitem__")
def _setitem(tracer: Any, x: Tensor, index: Any, value: Any) -> Any:
    positions = _or_nowhere(tracer, x)
    if not isinstance(value, Tensor):  # replacing elements by a number does not move them
        return positions
    new = _or_nowhere(tracer, value)
    picked = _picked_axes(index, x.dim(), tracer)
    if picked and not (_same_along(positions, picked) and same_places(positions[index], new)):
        return None if bool((compact(new) >= 0).any()) else positions
    positions = positions.clone()
    positions[index] = new.to(positions.device)
    return positions


@rule("index_select", "take_along_dim", "gather")
def _index_select(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    positions, name = tracer.positions(x), tracer.current_name
    if positions is None:
        return None
    values = (
        dict(zip(("indices", "dim") if name == "take_along_dim" else ("dim", "index"), args, strict=False)) | kwargs
    )
    index, axis = values.get("index", values.get("indices")), values.get("dim")
    if axis is None or not (tracer.is_constant(index) or _same_along(positions, [axis])):
        return None
    return getattr(torch, name)(positions, *args, **{k: v for k, v in kwargs.items() if k != "sparse_grad"})


@rule("index_fill", "masked_fill")
def _changed_in_places(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Elements that get other values keep their positions."""
    return tracer.positions(x)


@rule("index_add", "index_reduce")
def _index_add(tracer: Any, x: Tensor, dim: int, index: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _added_in_places(tracer, x, dim, index, source, Tensor.index_copy)


@rule("scatter_add")
def _scatter_add(tracer: Any, x: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    return _added_in_places(tracer, x, dim, index, src, Tensor.scatter)


def _added_in_places(
    tracer: Any, x: Tensor, axis: int, index: Tensor, source: Tensor, put: Callable[..., Tensor]
) -> Any:
    """The positions of a sum; as in other sums, those of x if it is not known what is added to which of its elements.

    Args:
        put: The operation that puts elements in these places instead of adding them.
    """
    positions, added = tracer.positions(x), tracer.positions(source)
    if positions is None or added is None or not tracer.is_constant(index):
        return positions
    return merged([positions, put(torch.full(x.shape, NOWHERE, device=x.device), axis, index, added)], x.shape)


@rule("index_copy", "index_put", "masked_scatter", "scatter", "scatter_reduce")
def _copied_to_places(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Elements of a source take the places of others. Image features that are put into a text become its words."""
    positions = tracer.positions(x)
    sources = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and tracer.trail(t) is not None]
    if positions is not None and (not sources or bool((source_of(compact(positions)) >= FIRST_TEXT).any())):
        return positions
    if tracer.current_name != "index_copy" or len(args) != 3:
        return None
    axis, index, source = args
    moved = _or_nowhere(tracer, source)
    fixed = tracer.is_constant(index) or _same_along(moved, [axis])
    return _or_nowhere(tracer, x).index_copy(axis, index, moved) if fixed else None


# Element-wise operations


def _element_wise(tracer: Any, *args: Any, **kwargs: Any) -> Any:
    """The positions of those operands that have any.

    A sum of tokens with known places and of others with unknown places, such as x + f(x) where f has no rule, keeps the
    known places: they are right for the residual stream, which is where the tokens need to be smooth. A factor that is
    only broadcast, such as a gate of each token, says nothing about the order of the tokens that it is applied to, so
    the places of these have to be known.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    operands = [p for x in tensors if (p := tracer.positions(x)) is not None]
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    lost = [x for x in tensors if (trail := tracer.trail(x)) is not None and trail.positions is None]
    if any(x.shape == shape for x in lost) and not any(p.shape == shape for p in operands):
        return None
    return merged(operands, shape)


for _name in names_in("""
    add sub rsub mul div true_divide divide multiply subtract floor_divide remainder fmod pow float_power neg abs
    exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan tanh sinh cosh asin acos atan atan2
    sigmoid logsigmoid erf erfc erfinv sign sgn round floor ceil trunc frac clamp clip clamp_min clamp_max maximum
    minimum fmax fmin where lerp addcmul addcdiv nan_to_num hypot logaddexp xlogy eq ne lt le gt ge isnan isinf
    isfinite logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor bitwise_not
"""):
    RULES[_name] = _element_wise


def _like_the_first(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The positions of the first argument; those of the others do not matter."""
    return tracer.positions(x)


@rule("where")
def _where(tracer: Any, condition: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Each element is one of two, so the positions of both have to be known, and which one it is unless they agree."""
    values = [*args, *(kwargs[name] for name in ("self", "input", "other") if name in kwargs)]
    if (
        len(values) == 2 and isinstance(values[0], Tensor) and values[0].dtype == torch.bool
    ):  # x.where(condition, other)
        condition, values = values[0], [condition, values[1]]
    if len(values) != 2 or any((t := tracer.trail(x)) and t.positions is None for x in values if isinstance(x, Tensor)):
        return None
    a, b = (_or_nowhere(tracer, x) if isinstance(x, Tensor) else None for x in values)
    if a is None or b is None:  # replacing elements by a number does not move them
        kept = b if a is None else a
        return None if kept is None else kept.expand(torch.broadcast_shapes(kept.shape, condition.shape))
    shape = torch.broadcast_shapes(condition.shape, a.shape, b.shape)
    a, b = compact(a), compact(b)
    chosen = torch.where(condition, a, b) if tracer.is_constant(condition) else torch.full_like(a, LOST)
    either = torch.where(a == NOWHERE, b, torch.where((b == NOWHERE) | (a == b), a, chosen))
    return None if bool((either == LOST).all()) else either.expand(shape)


for _name in names_in("""
    relu relu6 gelu silu mish softplus elu celu selu leaky_relu prelu hardswish hardsigmoid hardtanh hardshrink
    softshrink tanhshrink softsign threshold dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout softmax log_softmax softmin normalize layer_norm rms_norm group_norm batch_norm
    instance_norm native_layer_norm local_response_norm to type float half bfloat16 double long int bool contiguous
    clone detach cpu cuda type_as requires_grad alias resolve_conj resolve_neg conj positive pin_memory tril triu
"""):
    RULES[_name] = _like_the_first


@rule("copy")
def _copy(tracer: Any, x: Tensor, source: Tensor, *args: Any) -> Any:
    return _or_nowhere(tracer, source).expand(x.shape)


@rule("fill", "zero")
def _filled(tracer: Any, x: Tensor, *args: Any) -> Any:
    return torch.full((), NOWHERE, device=x.device).expand(x.shape)


@rule("glu")
def _glu(tracer: Any, x: Tensor, dim: int = -1) -> Any:
    return tracer.positions(x).chunk(2, dim)[0]


@rule("embedding")
def _embedding(tracer: Any, index: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    positions = tracer.positions(index)
    return None if positions is None else positions[..., None].expand(*positions.shape, weight.shape[-1])


# Reductions


def _reduced(tracer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):  # the larger or smaller of two
        return _element_wise(tracer, x, *args)
    positions = tracer.positions(x)
    axes = kwargs.get("dim", kwargs.get("axis"))
    arguments = list(args)
    if tracer.current_name in ("norm", "quantile"):  # its order comes first
        arguments = arguments[1:]
    if axes is None and arguments and not isinstance(arguments[0], Tensor):
        axes = arguments.pop(0)
    keepdim = kwargs.get("keepdim", arguments[0] if arguments and isinstance(arguments[0], bool) else False)
    if positions is None or axes is None or isinstance(axes, str):
        return None
    axes = [axes] if isinstance(axes, int) else list(axes)
    for axis in axes:
        positions = mixed(positions, axis)
    if not keepdim:
        for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
            positions = positions.squeeze(axis)
    return [positions]


for _name in names_in("""
    mean sum amax amin max min prod std var logsumexp norm vector_norm any all median nanmean nansum
"""):
    RULES[_name] = _reduced


# Products


@rule("linear")
def _linear(tracer: Any, x: Tensor, weight: Tensor, bias: Any = None) -> Any:
    return with_mixed_channels(tracer.positions(x), weight.shape[0])


def with_mixed_channels(positions: Tensor | None, size: int, axis: int = -1) -> Tensor | None:
    """Positions of a result in which every output channel is a mixture of all input channels."""
    if positions is None:
        return None
    shape = list(positions.shape)
    shape[axis] = size
    return mixed(positions, axis).expand(shape)


@rule("matmul", "bmm", "mm", "mv", "dot")
def _matmul(tracer: Any, a: Tensor, b: Tensor) -> Any:
    """The positions of the rows of a, if they have any, or else those of the columns of b."""
    if a.dim() < 2 or b.dim() < 2:
        return None
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for x, axis in ((a, -1), (b, -2)):
        positions = tracer.positions(x)
        if positions is not None:
            positions = mixed(positions, axis)
            if bool((compact(positions) >= 0).any()):
                return positions.expand(shape)
    return None


@rule("addmm", "baddbmm", "addbmm")
def _addmm(tracer: Any, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    return _matmul(tracer, a, b)


@rule("einsum")
def _einsum(tracer: Any, equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str):
        return None
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not output or any("." in term for term in (*terms, output)):
        return None
    sizes = {
        letter: n for term, x in zip(terms, operands, strict=True) for letter, n in zip(term, x.shape, strict=True)
    }
    for term, x in zip(terms, operands, strict=True):
        positions = tracer.positions(x)
        if positions is None or len(set(term)) < len(term):
            continue
        for axis in sorted((i for i, letter in enumerate(term) if letter not in output), reverse=True):
            positions = mixed(positions, axis).squeeze(axis)
        if bool((compact(positions) >= 0).any()):
            kept = [letter for letter in term if letter in output]
            ordered = positions.permute([kept.index(letter) for letter in output if letter in kept])
            index = tuple(slice(None) if letter in kept else None for letter in output)
            return ordered[index].expand([sizes[letter] for letter in output])
    return None


@rule("scaled_dot_product_attention", "flex_attention")
def _attention(tracer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An output has the position of its query, or, in attention among channels, that of its column of the values."""
    positions = with_mixed_channels(tracer.positions(query), value.shape[-1])
    if positions is not None and bool((compact(positions) >= 0).any()):
        return positions
    of_values = tracer.positions(value)
    if of_values is None:
        return positions
    of_values = mixed(of_values, -2)
    if not bool((compact(of_values) >= 0).any()) or of_values.shape[:-2] != query.shape[:-2]:
        return positions
    return of_values.expand(*query.shape[:-1], value.shape[-1])


@rule("grid_sample", "grid_sampler")
def _grid_sample(tracer: Any, x: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An output has the position of the token that chose the places to sample, as in deformable attention."""
    positions = tracer.positions(grid)
    if positions is None:
        return None
    positions = mixed(positions, -1).squeeze(-1)[:, None]
    return positions.expand(x.shape[0], x.shape[1], *positions.shape[2:])


@rule("multi_head_attention_forward")
def _multi_head_attention(tracer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    return [with_mixed_channels(tracer.positions(query), query.shape[-1])]


# Convolutions, pooling, resizing: an output has the position of the centre of its window.


@rule("conv1d", "conv2d", "conv3d")
def _convolution(
    tracer: Any,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    num_axes = weight.dim() - 2
    positions = tracer.positions(x)
    if positions is None:
        return None
    channels_axis = -num_axes - 1
    if groups == 1 or compact(positions).shape[channels_axis] == 1:
        positions = mixed(positions, channels_axis)
    else:
        of_groups = [mixed(p, channels_axis) for p in positions.chunk(groups, channels_axis)]
        positions = torch.cat(of_groups, channels_axis)
    positions = _windowed(positions, weight.shape[2:], stride, padding, dilation)
    shape = list(positions.shape)
    if shape[channels_axis] != weight.shape[0]:
        if shape[channels_axis] != 1:
            positions = positions.repeat_interleave(weight.shape[0] // shape[channels_axis], channels_axis)
        shape[channels_axis] = weight.shape[0]
    return positions.expand(shape)


def _windowed(
    positions: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> Tensor:
    num_axes = len(kernel)
    for i in range(num_axes):
        axis, k = i - num_axes, int(kernel[i])
        s, d = _of_axis(stride, i), _of_axis(dilation, i)
        before = after = _of_axis(padding, i) if not isinstance(padding, str) else 0
        if padding == "same":
            before = d * (k - 1) // 2
            after = d * (k - 1) - before
        span = positions.shape[axis] + before + after - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        if ceil_mode and (count - 1) * s >= positions.shape[axis] + before:
            count -= 1
        first = torch.arange(count) * s - before
        centre = first + d * (k - 1) // 2
        if s > 1 and d == 1:  # otherwise each output stands for the element at its centre
            positions = pooled(positions, axis, first, k, centre)
        else:
            positions = sampled(positions, axis, centre)
    return positions


def _of_axis(value: Any, i: int) -> int:
    if isinstance(value, int):
        return value
    return int(value[i] if len(value) > 1 else value[0])


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool2d")
@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def _pool(
    tracer: Any, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any
) -> Any:
    is_max = tracer.current_name.startswith("max")
    dilation = kwargs.get("dilation", args[0] if is_max and args else 1)
    ceil_mode = kwargs.get("ceil_mode", (args[1:2] if is_max else args[:1]) or (False,))
    ceil_mode = ceil_mode[0] if isinstance(ceil_mode, tuple) else ceil_mode
    num_axes = int(next(c for c in tracer.current_name if c in "123"))
    kernel = [_of_axis(kernel_size, i) for i in range(num_axes)]
    return [
        _windowed(tracer.positions(x), kernel, kernel if stride in (None, []) else stride, padding, dilation, ceil_mode)
    ]


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_avg_pool3d")
def _adaptive_pool(tracer: Any, x: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Any:
    num_axes = int(next(c for c in tracer.current_name if c in "123"))
    sizes = [output_size] * num_axes if isinstance(output_size, int) else list(output_size)
    return [_resized(tracer.positions(x), [x.shape[i - num_axes] if n is None else n for i, n in enumerate(sizes)])]


def _resized(positions: Tensor, sizes: list[int]) -> Tensor:
    for i, size in enumerate(sizes):
        axis = i - len(sizes)
        positions = mixed(positions, axis) if size == 1 else resampled(positions, axis, int(size))
    return positions


def _resized_like_result(tracer: Any, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    positions = tracer.positions(x)
    return None if positions is None else _resized(positions, list(result.shape[2:]))


def _transposed_convolution(tracer: Any, result: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    positions = tracer.positions(x)
    if positions is None:
        return None
    num_axes = weight.dim() - 2
    positions = _resized(mixed(positions, -num_axes - 1), list(result.shape[-num_axes:]))
    return positions.expand(result.shape)


# Rules that also get the result, whose shape they need.
RULES_BY_RESULT: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("interpolate", "upsample", "upsample_bilinear", "upsample_nearest"), _resized_like_result),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
}
