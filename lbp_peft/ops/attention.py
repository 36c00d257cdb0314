"""Attention in bfloat16 on CPUs: the same forward pass, and a backward pass of matrix products.

On CPUs, the backward pass of PyTorch's fused attention is slower in bfloat16 than in float32, for 65 tokens six times
slower. That is more time than everything else in the backward pass of a model with low-rank layers takes. With
P = softmax(s q k^T), y = P v and g = dLoss/dy,

    dv = P^T g
    dP = g v^T
    dS = P * (dP - rowsum(P * dP))
    dq = s dS k,  dk = s dS^T q

These are exact gradients: only rounding differs. P is computed again in the backward pass, so that only q, k and v are
saved. The mean of v over the keys cancels in dS. It is subtracted from v beforehand, so that its rounding errors do not
enter dS.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.overrides import TorchFunctionMode

from .. import heuristics
from ..transforms import backward_pass, in_forward_mode, in_transform
from .once_differentiable import once_differentiable

# Entries of the attention matrices that are computed at once. More of them would not fit into the cache.
_ENTRIES_AT_ONCE = 2**20


class AttentionMode(TorchFunctionMode):
    """Replaces `F.scaled_dot_product_attention` by another function within the context, for all callers.

    Args:
        attention: The other function: [`attention`], or [`lbp_peft.ops.compressed_attention.compressed_attention`].

    Attributes:
        was_called: Whether the function was called.
    """

    was_called = False

    def __init__(self, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            self.was_called = True
            return self.attention(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def outside_attention_mode() -> AbstractContextManager:
    """Context for an operation that contains no attention: the innermost mode is left if it is an [`AttentionMode`].

    PyTorch asks a mode about every function and every attribute of a tensor, which takes microseconds each time.
    """
    if torch.compiler.is_compiling() or not isinstance(overrides._get_current_function_mode(), AttentionMode):
        return nullcontext()
    return overrides._pop_mode_temporarily()


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
        attn_mask, dropout_p, is_causal, enable_gqa: If any of these is set, PyTorch's function is called. It is also
            called for tensors that are not all bfloat16, on devices other than CPUs, for long sequences, within
            transforms of `torch.func`, and in forward mode.
        scale: s; None: d^-0.5. For 0 PyTorch's function is called too.

    Returns:
        Shape (N, heads, L, d_v).

    Raises:
        RuntimeError: in the backward pass, if it is differentiated again.
    """
    tensors = (query, key, value)
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    plain = plain and scale != 0  # baddbmm with alpha=0 does not write to its result
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
    """Whether the tensors need no broadcasting or cast, and are not empty."""
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
        return F.scaled_dot_product_attention(query, key, value, scale=scale).detach()  # not a view, see _LowRankLinear

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        second_order = torch.is_grad_enabled()
        with backward_pass(), torch.autocast(grads[0].device.type, enabled=False):  # so that the logits are float32
            gradients = _gradients(query, key, value, grads[0], ctx.scale)
        return *(once_differentiable(gradients, grads[0]) if second_order else gradients), None


def _gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """The gradients of query, key and value."""
    queries, keys, values = (t.flatten(0, 1).contiguous() for t in (query, key, value))

    def of_heads(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        v = values[part]
        centred = v - v.mean(1, keepdim=True)  # in the dtype of v: rounding the mean has no effect, since it cancels
        return queries[part], keys[part], centred

    return gradients_by_products(of_heads, (query.shape, key.shape, value.shape), grad, scale)


def gradients_by_products(
    of_heads: Callable[[slice], tuple[Tensor, Tensor, Tensor]],
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    grad: Tensor,
    scale: float,
) -> list[Tensor]:
    """The gradients of query, key and value, computed for a few heads at a time by the equations of this module.

    Args:
        of_heads: Returns query, key and centred value (value less its mean over the keys) of a slice of the heads.
            Shapes (heads, L, d), (heads, S, d) and (heads, S, d_v), float32 or the dtype of `grad`.
        shapes: The shapes of query, key and value.
        grad: The gradient of the output, shape (N, heads, L, d_v), float32 or bfloat16.
        scale: s.

    Returns:
        Tensors of these shapes, of the dtype of `grad`.
    """
    grads, dtype = grad.flatten(0, 1).contiguous(), grad.dtype
    of_queries, of_keys, of_values = (grads.new_empty(shape[0] * shape[1], *shape[2:]) for shape in shapes)
    heads, rows, columns = len(grads), grads.shape[1], shapes[1][2]
    at_once, starts = heads, [0]
    if not torch.compiler.is_compiling():  # a compiled loop would fit only batches of one size
        parts = -(-heads * rows * columns // _ENTRIES_AT_ONCE)
        at_once = -(-heads // min(parts, heads))
        starts = list(range(0, heads, at_once))
    wide, weights = (grads.new_empty(at_once, rows, columns, dtype=torch.float32) for _ in range(2))
    is_wide = dtype == torch.float32
    size = 0 if is_wide else at_once
    rounded, narrow = (grads.new_empty(size, rows, columns) for _ in range(2))
    for start in starts:
        part = slice(start, start + at_once)
        (q, k, v), g = of_heads(part), grads[part]
        logits, p = wide[: len(q)], weights[: len(q)]
        _scaled_product(q.float(), k.float().transpose(1, 2), scale, logits)
        torch.softmax(logits, dim=-1, out=p)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        p_rounded = p if is_wide else rounded[: len(q)].copy_(p)
        torch.bmm(p_rounded.transpose(1, 2), g, out=of_values[part])
        ds = logits if is_wide else narrow[: len(q)]
        torch.bmm(g, v.transpose(1, 2), out=ds)
        # In float32, since the difference may be far smaller than its terms. Copied first, since operations on two
        # dtypes other than copies are slow. The sum is over the very values that it is subtracted from, so that the
        # rows of dS sum to zero.
        weighted = (logits if is_wide else logits.copy_(ds)).mul_(p)
        weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        if not is_wide:
            ds.copy_(weighted)
        _scaled_product(ds, k, scale, of_queries[part])
        _scaled_product(ds.transpose(1, 2), q, scale, of_keys[part])
    return [gradient.view(shape) for gradient, shape in zip((of_queries, of_keys, of_values), shapes, strict=True)]


def _scaled_product(a: Tensor, b: Tensor, scale: float, result: Tensor) -> None:
    torch.baddbmm(result, a, b, beta=0, alpha=scale, out=result)
