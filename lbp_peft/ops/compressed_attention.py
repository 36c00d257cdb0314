"""Attention that keeps query, key and value in 8 bits.

The forward pass is PyTorch's own. The backward pass computes the attention matrix again from what was kept: by matrix
products, see [`lbp_peft.ops.attention`], or, with masks, on GPUs and for many keys, by running PyTorch's once more.
Neither its result nor the log-sum-exp is kept, so that the rows of the attention matrix sum to one.

What all keys have in common shifts the logits of a query alike, which softmax does not see, and what all values have in
common cancels in the gradients of query and key. Both are taken off before rounding, which then is finer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.in_groups import restored, rounded_in_groups
from ..instructions import multiplies_bf16
from ..transforms import backward_pass, in_forward_mode, in_transform
from .attention import attention, gradients_by_products
from .kept import keep
from .layer_state import to_save
from .once_differentiable import once_differentiable

# On CPUs, and in compiled graphs. With more keys the attention matrices of a head outgrow the cache.
_KEYS_BY_PRODUCTS = 600
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _How:
    """All that is no tensor."""

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
    """`F.scaled_dot_product_attention`, bit for bit, which keeps query, key and value in 8 bits.

    Args:
        query: Shape (N, heads, L, d).
        key, value: Shapes (N, heads, S, d) and (N, heads, S, d_v).
        attn_mask: With one that requires a gradient it *is* [`lbp_peft.ops.attention.attention`], and so it is with
            dropout, for tensors that are not of four axes or not of one dtype, float64, within transforms of
            `torch.func`, in forward mode, and under `torch.compile` with a mask, causal, or with many keys.
        dropout_p, is_causal, scale, enable_gqa: As PyTorch's.

    Double backward raises RuntimeError.

    Returns:
        Shape (N, heads, L, d_v).
    """
    device = query.device.type
    tensors = (query, key, value)
    if torch.is_autocast_enabled(device):  # it casts in the forward pass only
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
        tensors = query, key, value
    by_products = attn_mask is None and not is_causal and query.shape[:2] == key.shape[:2] == value.shape[:2]
    by_products = by_products and scale != 0 and key.dim() == 4 and key.shape[-2] <= _KEYS_BY_PRODUCTS
    by_products = by_products and query.dtype != torch.float16
    is_compiling = torch.compiler.is_compiling()
    serves = not dropout_p and scale != 0 and not in_transform() and not in_forward_mode()
    serves = serves and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    serves = serves and not (attn_mask is not None and attn_mask.requires_grad)
    serves = serves and query.dtype in _FLOATS and query.dtype == key.dtype == value.dtype
    serves = serves and query.dim() == key.dim() == value.dim() == 4 and query.numel() > 0 and key.numel() > 0
    if not serves or (is_compiling and not by_products):
        return attention(*tensors, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    how = _How(is_causal, scale, enable_gqa, by_products and (is_compiling or device == "cpu"))
    return _CompressedAttention.apply(how, query, key, value, attn_mask)


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.how, ctx.dtype = how, query.dtype
        kept: list[Tensor] = []
        for t, offset in ((query, None), (key, key.mean(-2, keepdim=True)), (value, value.mean(-2, keepdim=True))):
            kept += map(keep, rounded_in_groups(t, offset))
        ctx.save_for_backward(*kept, *to_save([] if mask is None else [mask]))
        y = F.scaled_dot_product_attention(
            query, key, value, mask, 0.0, how.is_causal, scale=how.scale, enable_gqa=how.enable_gqa
        )
        return y.detach()  # no view, see _LowRankLinear

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second_order = torch.is_grad_enabled()
        saved = ctx.saved_tensors  # read once: gradient checkpointing returns each tensor a single time
        kept, mask = saved[:6], saved[6] if len(saved) > 6 else None
        with backward_pass(), torch.autocast(grads[0].device.type, enabled=False):  # the logits have to be float32
            if ctx.how.by_products:
                gradients = _by_products(kept, grads[0], ctx.how.scale)
            else:
                gradients = _run_again(kept, mask, grads[0], ctx.how)
        return None, *(once_differentiable(gradients, grads[0]) if second_order else gradients), None


def _by_products(kept: Sequence[Tensor], grad: Tensor, scale: float | None) -> list[Tensor]:
    values, scales = kept[::2], kept[1::2]
    flat = [(v.flatten(0, 1), s.flatten(0, 1)) for v, s in zip(values, scales, strict=True)]

    def some(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (restored(v[part], s[part], torch.float32) for v, s in flat)
        return q, k, v

    # Products in bfloat16 are several times as fast, where there are instructions for them, and what they multiply has
    # been rounded more coarsely. Without them they are in float32.
    dtype = torch.bfloat16 if multiplies_bf16(grad.device) else torch.float32
    shapes = values[0].shape, values[1].shape, values[2].shape
    found = gradients_by_products(some, shapes, grad.to(dtype), values[0].shape[-1] ** -0.5 if scale is None else scale)
    return [gradient.to(grad.dtype) for gradient in found]


def _run_again(kept: Sequence[Tensor], mask: Tensor | None, grad: Tensor, how: _How) -> list[Tensor]:
    q, k, v = (restored(t, s, grad.dtype).requires_grad_() for t, s in zip(kept[::2], kept[1::2], strict=True))
    with torch.enable_grad():
        y = F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, how.is_causal, scale=how.scale, enable_gqa=how.enable_gqa
        )
        return list(torch.autograd.grad(y, (q, k, v), grad))
