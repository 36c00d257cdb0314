"""Attention in bfloat16 on CPUs: the same forward pass, and a backward pass of matrix products.

PyTorch's fused attention goes backward on CPUs more slowly in bfloat16 than in float32, for 65 tokens six times, which
takes longer than all that low-rank layers leave of the backward pass. With P = softmax(s q k^T), y = P v, g = dLoss/dy:

    dv = P^T g
    dP = g v^T
    dS = P * (dP - rowsum(P * dP))
    dq = s dS k,  dk = s dS^T q

That is exact: only the order of rounding differs. P is computed again: no more than q, k and v are kept. In dS the mean
of v over the keys cancels. It is taken off before, so that what cancels is not what is left of rounding it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import heuristics
from ..transforms import backward_pass, in_forward_mode, in_transform
from .once_differentiable import once_differentiable

# Entries of the attention matrices that are worked on at once. Those of more would not stay in the cache.
_ENTRIES_AT_ONCE = 2**20


class AttentionMode(TorchFunctionMode):
    """Within this context, `F.scaled_dot_product_attention` is another function, whoever calls it.

    Args:
        attention: Takes its place: [`attention`], or [`lbp_peft.ops.compressed_attention.compressed_attention`].

    Attributes:
        was_called: Whether anybody has.
    """

    was_called = False

    def __init__(self, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.was_called = True
            return self.attention(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, bit for bit, with another backward pass where that is faster.

    Args:
        query: Shape (N, heads, L, d).
        key, value: Shapes (N, heads, S, d) and (N, heads, S, d_v).
        attn_mask, dropout_p, is_causal, enable_gqa: With any of these set it *is* `F.scaled_dot_product_attention`, and
            so it is for tensors that are not all bfloat16, on other devices than CPUs, for long sequences, within
            transforms of `torch.func` and in forward mode.
        scale: s; None: d^-0.5. With 0 it is PyTorch's too.

    Double backward raises RuntimeError.

    Returns:
        Shape (N, heads, L, d_v).
    """
    tensors = (query, key, value)
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    plain = plain and scale != 0  # a product times 0 leaves in its result what was there before
    plain = plain and not (in_transform() or in_forward_mode())
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if plain and wanted and _is_regular(*tensors) and _is_faster_by_products(key):
        return _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _is_faster_by_products(key: Tensor) -> bool:
    return heuristics.active().use_attention_by_products(key.shape[-2], key.dtype, key.device)


def _is_regular(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether nothing has to be broadcast or cast, and there is something at all."""
    return (
        query.numel() > 0
        and key.numel() > 0
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.dtype == key.dtype == value.dtype
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale).detach()  # no view, see _LowRankLinear

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        second_order = torch.is_grad_enabled()
        with backward_pass(), torch.autocast(grads[0].device.type, enabled=False):  # the logits have to be float32
            gradients = _gradients(query, key, value, grads[0], ctx.scale)
        return *(once_differentiable(gradients, grads[0]) if second_order else gradients), None


def _gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """Those of query, key and value."""
    queries, keys, values = (t.flatten(0, 1).contiguous() for t in (query, key, value))

    def some(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        v = values[part]
        return queries[part], keys[part], v - v.mean(1, keepdim=True)  # what cancels may well be rounded

    return gradients_by_products(some, (query.shape, key.shape, value.shape), grad, scale)


def gradients_by_products(
    some: Callable[[slice], tuple[Tensor, Tensor, Tensor]],
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    grad: Tensor,
    scale: float,
) -> list[Tensor]:
    """The gradients of query, key and value, a few heads at a time. See this module.

    Args:
        some: Returns query, key, and value less its mean over the keys, of some heads; shapes (heads, L or S, d or
            d_v), float32 or the dtype of `grad`.
        shapes: Of query, key and value.
        grad: Gradient of the result; float32 or bfloat16.
        scale: s.

    Returns:
        Of these shapes, of the dtype of `grad`.
    """
    grads, dtype = grad.flatten(0, 1).contiguous(), grad.dtype
    of_queries, of_keys, of_values = (grads.new_empty(shape[0] * shape[1], *shape[2:]) for shape in shapes)
    heads, rows, columns = len(grads), grads.shape[1], shapes[1][2]
    at_once, starts = heads, [0]
    if not torch.compiler.is_compiling():  # in which a loop would be made for batches of one size
        parts = -(-heads * rows * columns // _ENTRIES_AT_ONCE)
        at_once = -(-heads // min(parts, heads))
        starts = list(range(0, heads, at_once))
    wide, weights = (grads.new_empty(at_once, rows, columns, dtype=torch.float32) for _ in range(2))
    is_wide = dtype == torch.float32
    size = 0 if is_wide else at_once
    rounded, narrow = (grads.new_empty(size, rows, columns) for _ in range(2))
    for start in starts:
        part = slice(start, start + at_once)
        (q, k, v), g = some(part), grads[part]
        logits, p = wide[: len(q)], weights[: len(q)]
        _scaled_product(q.float(), k.float().transpose(1, 2), scale, logits)
        torch.softmax(logits, dim=-1, out=p)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        p_rounded = p if is_wide else rounded[: len(q)].copy_(p)
        torch.bmm(p_rounded.transpose(1, 2), g, out=of_values[part])
        ds = logits if is_wide else narrow[: len(q)]
        torch.bmm(g, v.transpose(1, 2), out=ds)
        # In float32, since the difference may be far smaller than its terms; copied, since of two dtypes at once all
        # but copies are slow. The sum is of the very values that it is taken from: rows of dS then sum to zero.
        weighted = (logits if is_wide else logits.copy_(ds)).mul_(p)
        weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        if not is_wide:
            ds.copy_(weighted)
        _scaled_product(ds, k, scale, of_queries[part])
        _scaled_product(ds.transpose(1, 2), q, scale, of_keys[part])
    return [found.view(shape) for found, shape in zip((of_queries, of_keys, of_values), shapes, strict=True)]


def _scaled_product(a: Tensor, b: Tensor, scale: float, result: Tensor) -> None:
    torch.baddbmm(result, a, b, beta=0, alpha=scale, out=result)
