"""Rules for element-wise operations, and for reductions of axes to one element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operation_names import names_in
from ..positions import LOST, NOWHERE, compact, merge, mix
from .registry import Result, Tracer, positions_or_nowhere, rule


@rule(
    *names_in("""
        add sub rsub mul div true_divide divide multiply subtract floor_divide remainder fmod pow float_power neg abs
        exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan tanh sinh cosh asin acos atan atan2
        sigmoid logsigmoid erf erfc erfinv sign sgn round floor ceil trunc frac clamp clip clamp_min clamp_max maximum
        minimum fmax fmin lerp addcmul addcdiv nan_to_num hypot logaddexp xlogy eq ne lt le gt ge isnan isinf
        isfinite logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor bitwise_not
    """)
)
def _element_wise(tracer: Tracer, *args: object, **kwargs: object) -> Result:
    """The result has the positions of those operands that have any.

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
    return merge(operands, shape)


@rule("where")
def _where(tracer: Tracer, condition: Tensor, *args: object, **kwargs: object) -> Result:
    """Each element comes from one of two tensors. If their positions differ, the condition has to be known too."""
    values = [*args, *(kwargs[name] for name in ("self", "input", "other") if name in kwargs)]
    if (
        len(values) == 2 and isinstance(values[0], Tensor) and values[0].dtype == torch.bool
    ):  # x.where(condition, other)
        condition, values = values[0], [condition, values[1]]
    if len(values) != 2 or any((t := tracer.trail(x)) and t.positions is None for x in values if isinstance(x, Tensor)):
        return None
    a, b = (positions_or_nowhere(tracer, x) if isinstance(x, Tensor) else None for x in values)
    if a is None or b is None:  # replacing elements by a number does not move them
        operand = b if a is None else a
        return None if operand is None else operand.expand(torch.broadcast_shapes(operand.shape, condition.shape))
    shape = torch.broadcast_shapes(condition.shape, a.shape, b.shape)
    a, b = compact(a), compact(b)
    chosen = torch.where(condition, a, b) if tracer.is_constant(condition) else torch.full_like(a, LOST)
    either = torch.where(a == NOWHERE, b, torch.where((b == NOWHERE) | (a == b), a, chosen))
    return None if bool((either == LOST).all()) else either.expand(shape)


@rule(
    *names_in("""
        relu relu6 gelu silu mish softplus elu celu selu leaky_relu prelu hardswish hardsigmoid hardtanh hardshrink
        softshrink tanhshrink softsign threshold dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
        feature_alpha_dropout softmax log_softmax softmin normalize layer_norm rms_norm group_norm batch_norm
        instance_norm native_layer_norm local_response_norm to type float half bfloat16 double long int bool contiguous
        clone detach cpu cuda type_as requires_grad alias resolve_conj resolve_neg conj positive pin_memory tril triu
    """)
)
def _keep_first(tracer: Tracer, x: Tensor, *args: object, **kwargs: object) -> Result:
    """The result has the positions of the first argument; those of the others do not matter."""
    return tracer.positions(x)


@rule("copy")
def _copy(tracer: Tracer, x: Tensor, source: Tensor, *args: object) -> Result:
    return positions_or_nowhere(tracer, source).expand(x.shape)


@rule("fill", "zero")
def _fill(tracer: Tracer, x: Tensor, *args: object) -> Result:
    return torch.full((), NOWHERE, device=x.device).expand(x.shape)


@rule("glu")
def _glu(tracer: Tracer, x: Tensor, dim: int = -1) -> Result:
    positions = tracer.positions(x)
    return None if positions is None else positions.chunk(2, dim)[0]


@rule("embedding")
def _embedding(tracer: Tracer, index: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Result:
    positions = tracer.positions(index)
    return None if positions is None else positions[..., None].expand(*positions.shape, weight.shape[-1])


@rule(
    *names_in("""
        mean sum amax amin max min prod std var logsumexp norm vector_norm any all median nanmean nansum
    """)
)
def _reduce(tracer: Tracer, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    if args and isinstance(args[0], Tensor):  # the maximum or minimum of two tensors
        return _element_wise(tracer, x, *args)
    positions = tracer.positions(x)
    axes = kwargs.get("dim", kwargs.get("axis"))
    arguments = list(args)
    if tracer.current_name == "norm":  # its order is the first argument
        arguments = arguments[1:]
    if axes is None and arguments and not isinstance(arguments[0], Tensor):
        axes = arguments.pop(0)
    keepdim = kwargs.get("keepdim", arguments[0] if arguments and isinstance(arguments[0], bool) else False)
    if positions is None or axes is None or isinstance(axes, str):
        return None
    axes = [axes] if isinstance(axes, int) else list(axes)
    for axis in axes:
        positions = mix(positions, axis)
    if not keepdim:
        for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
            positions = positions.squeeze(axis)
    return [positions]
