"""Attention that saves query, key and value in 8 bits.

The forward pass is PyTorch's own. The backward pass computes the attention matrix again from the saved tensors: by
matrix products, see [`lbp_peft.ops.attention`], or, with masks, on GPUs and for many keys, by PyTorch's own attention.
Neither the output nor the log-sum-exp is saved, so the rows of the attention matrix sum to one.

The mean of the keys shifts all logits of a query by the same amount, which softmax ignores, and the mean of the values
cancels in the gradients of query and key. Both are subtracted before rounding, which makes the rounding errors smaller.
Keys that a mask hides from all queries, such as padding, may have any magnitude and are left out of both means.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.in_groups import dequantize_groups
from ..instructions import multiplies_bf16
from ..transforms import backward_pass, in_forward_mode, in_transform
from .attention import attention, gradients_by_products
from .kept import keep_quantized
from .layer_state import to_save
from .once_differentiable import once_differentiable

# The most keys for which matrix products are used, on CPUs and in compiled graphs. With more of them, the attention
# matrix of a head is larger than the cache.
_KEYS_BY_PRODUCTS = 600
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _State:
    """Non-tensor state saved for backward."""

    is_causal: bool
    scale: float | None
    enable_gqa: bool
    by_products: bool


def compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, bit for bit, which saves query, key and value in 8 bits.

    Args:
        query: Shape (N, heads, L, d).
        key, value: Shapes (N, heads, S, d) and (N, heads, S, d_v).
        attn_mask, dropout_p, is_causal, scale, enable_gqa: As PyTorch's.

    [`lbp_peft.ops.attention.attention`] is called instead where this is not supported: a mask that requires a gradient,
    dropout, tensors in float64 or of several dtypes or without four axes, transforms of `torch.func`, forward mode, and
    under `torch.compile` with a mask, with causal attention or with many keys.

    Returns:
        Shape (N, heads, L, d_v).

    Raises:
        RuntimeError: in the backward pass, if it is differentiated again.
    """
    device = query.device.type
    tensors = (query, key, value)
    if torch.is_autocast_enabled(device):  # autocast casts in the forward pass only
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
        tensors = query, key, value
    by_products = attn_mask is None and not is_causal and query.shape[:2] == key.shape[:2] == value.shape[:2]
    by_products = by_products and scale != 0 and key.dim() == 4 and key.shape[-2] <= _KEYS_BY_PRODUCTS
    by_products = by_products and query.dtype != torch.float16
    is_compiling = torch.compiler.is_compiling()
    is_supported = not dropout_p and scale != 0 and not in_transform() and not in_forward_mode()
    is_supported = is_supported and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    is_supported = is_supported and not (attn_mask is not None and attn_mask.requires_grad)
    is_supported = is_supported and query.dtype in _FLOATS and query.dtype == key.dtype == value.dtype
    is_supported = (
        is_supported and query.dim() == key.dim() == value.dim() == 4 and query.numel() > 0 and key.numel() > 0
    )
    if not is_supported or (is_compiling and not by_products):
        return attention(*tensors, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    state = _State(is_causal, scale, enable_gqa, by_products and (is_compiling or device == "cpu"))
    return _CompressedAttention.apply(state, query, key, value, attn_mask)


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: _State, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.state, ctx.dtype = state, query.dtype
        mean = functools.partial(_mean_over_keys, mask=mask)
        rounded = *keep_quantized(query), *keep_quantized(key, mean), *keep_quantized(value, mean)
        ctx.save_for_backward(*rounded, *to_save([] if mask is None else [mask]))
        y = F.scaled_dot_product_attention(
            query, key, value, mask, 0.0, state.is_causal, scale=state.scale, enable_gqa=state.enable_gqa
        )
        return y.detach()  # not a view, see _LowRankLinear

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        saved = ctx.saved_tensors  # read once: gradient checkpointing returns each tensor a single time
        rounded, mask = saved[:6], saved[6] if len(saved) > 6 else None
        with backward_pass(), torch.autocast(grads[0].device.type, enabled=False):  # so that the logits are float32
            if ctx.state.by_products:
                gradients = _gradients_by_products(rounded, grads[0], ctx.state.scale)
            else:
                gradients = _gradients_by_autograd(rounded, mask, grads[0], ctx.state)
        return None, *(once_differentiable(gradients, grads[0]) if second_order else gradients), None


def _mean_over_keys(t: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (N, heads, 1, d) of the keys or values (N, heads, S, d) that a mask does not hide from all queries."""
    if mask is None:
        return t.mean(-2, keepdim=True)
    seen = mask
    if mask.dtype != torch.bool:  # exp(-104) is zero in float32; logits may differ by more, but any offset is exact
        seen = mask > mask.amax(-1, keepdim=True) - 104
    seen = seen.reshape((1,) * (4 - seen.dim()) + seen.shape).any(1, keepdim=True).any(2, keepdim=True).mT
    count = seen.expand(-1, -1, t.shape[-2], -1).sum(-2, keepdim=True).clamp_(min=1)
    return (t.where(seen, 0).sum(-2, keepdim=True, dtype=torch.float32) / count).to(t.dtype)


def _gradients_by_products(rounded: Sequence[Tensor], grad: Tensor, scale: float | None) -> list[Tensor]:
    values, scales = rounded[::2], rounded[1::2]
    flat = [(v.flatten(0, 1), s.flatten(0, 1)) for v, s in zip(values, scales, strict=True)]

    def of_heads(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (dequantize_groups(v[part], s[part], torch.float32) for v, s in flat)
        return q, k, v

    # Where there are instructions for bfloat16, its products are several times as fast, and its rounding is finer than
    # that to 8 bits.
    dtype = torch.bfloat16 if multiplies_bf16(grad.device) else torch.float32
    shapes = values[0].shape, values[1].shape, values[2].shape
    gradients = gradients_by_products(
        of_heads, shapes, grad.to(dtype), values[0].shape[-1] ** -0.5 if scale is None else scale
    )
    return [gradient.to(grad.dtype) for gradient in gradients]


def _gradients_by_autograd(rounded: Sequence[Tensor], mask: Tensor | None, grad: Tensor, state: _State) -> list[Tensor]:
    q, k, v = (
        dequantize_groups(t, s, grad.dtype).requires_grad_() for t, s in zip(rounded[::2], rounded[1::2], strict=True)
    )
    with torch.enable_grad():
        y = F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, state.is_causal, scale=state.scale, enable_gqa=state.enable_gqa
        )
        return list(torch.autograd.grad(y, (q, k, v), grad))
