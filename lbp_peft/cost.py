"""What is fastest for a layer, told from its shape and the instructions of the device.

Nothing is timed while training: a run has to give the same bits when it is repeated. The constants were read off
`examples/benchmarks/single_layers.py`, see docs/results.md.
"""

from __future__ import annotations

import functools

import torch

# Rounding a matrix to int8 takes as long as this many multiply-adds in float32 for each of its elements, and so does
# scaling the product; in bfloat16, as many multiply-adds in bfloat16.
_ROUNDING = {torch.float32: 160, torch.bfloat16: 200}
# And projecting a tensor as long as this many for each of its elements; more on images, whose channels come first.
_PROJECTING, _PROJECTING_16_BITS, _PROJECTING_IMAGES = 128, 160, 400


def fastest_precision(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> str:
    """The precision in which g W is fastest while its direction is kept to three digits.

    Args:
        rows: M, of g (M, C_out).
        out_features, in_features: C_out and C_in.
        dtype: Of g.
        device: It is asked for its instructions.
    """
    if device.type == "cuda":
        return "bf16" if dtype == torch.float32 and multiplies_bf16(device) else "full"
    if device.type == "cpu" and dtype in _ROUNDING and _cpu_multiplies_int8():
        pays = _ROUNDING[dtype] * (1 / rows + 1 / out_features + 1 / in_features) < 1
        return "int8" if pays else "full"
    return "full"


def low_rank_pays(
    num_tokens: int,
    kept: int,
    out_features: int,
    in_features: int,
    on_images: bool = False,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether the weight gradient of k rows instead of L makes up for projecting x and g, of C_in and C_out columns.

    Args:
        num_tokens: L.
        kept: k.
        on_images: Whether x is (N, C_in, H, W).
        dtype: Of x and g.
    """
    saved = (num_tokens - kept) * out_features * in_features
    projecting = _PROJECTING_IMAGES if on_images else _PROJECTING if dtype.itemsize >= 4 else _PROJECTING_16_BITS
    return saved > projecting * num_tokens * (out_features + in_features)


def one_matrix_pays(kept: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tokens are sooner projected by one matrix (k, L) than axis by axis.

    Args:
        kept: k, the multiply-adds for each value that is projected. Axis by axis these are few, and the time is that of
            reading and writing the values several times.
        dtype, device: Of the tokens.
    """
    if device.type == "cuda":
        # By the ratio of arithmetic to bandwidth on the data sheets of A100 and H100; not measured.
        return kept <= (40 if dtype.itemsize >= 4 else 160)
    return kept <= (64 if dtype == torch.bfloat16 and multiplies_bf16(device) else 32)


def attention_by_products_pays(keys: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention goes backward sooner by matrix products than fused.

    Args:
        keys: Of each query. With more of them, the matrices outgrow the cache.
        dtype, device: Of query, key and value.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and keys <= 600 and multiplies_bf16(device)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products are faster in bfloat16 than in float32 there: whether there are instructions for them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_multiplies_bf16()


@torch.compiler.assume_constant_result  # torch.compile does not trace what is asked here
def _cpu_multiplies_bf16() -> bool:
    found = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is not None and bool(supported()) for supported in found)


@functools.cache
def _cpu_multiplies_int8() -> bool:
    """Whether the processor has instructions for it (VNNI); without them int8 is slower than float32."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())
