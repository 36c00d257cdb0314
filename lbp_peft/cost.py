"""What is fastest for a layer, told from its shape and the instructions of the device.

Nothing is timed while training: a run has to give the same bits when it is repeated. The constants were read off
`examples/benchmarks/single_layers.py`, see docs/results.md.
"""

from __future__ import annotations

import torch

# What rounding the factors of a product and scaling it take, in multiply-adds of float32 for each of their elements.
_CASTING_TO_BF16 = 40
_ROUNDING_TO_INT8 = {torch.float32: 120, torch.bfloat16: 50}
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
    if device.type != "cpu" or dtype not in _ROUNDING_TO_INT8:
        return "full"
    of_bf16, of_int8 = _cpu_rates()
    edges = 1 / rows + 1 / out_features + 1 / in_features
    # In multiply-adds of float32, for each that is to be done.
    times = {"full": 1.0 if dtype == torch.float32 else 1 / of_bf16}
    if dtype == torch.float32:
        times["bf16"] = 1 / of_bf16 + _CASTING_TO_BF16 * edges
    times["int8"] = 1 / of_int8 + _ROUNDING_TO_INT8[dtype] * edges
    return min(times, key=lambda name: times[name])


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
    return device.type == "cpu" and _cpu_rates()[0] > 1


@torch.compiler.assume_constant_result  # torch.compile does not trace what is asked here
def _cpu_rates() -> tuple[float, float]:
    """How many times faster than in float32 the processor multiplies in bfloat16 and in int8, by its instructions."""

    def has(name: str) -> bool:
        supported = getattr(torch.cpu, f"_is_{name}_supported", None)
        return supported is not None and bool(supported())

    if has("amx_tile"):
        return 6.5, 9.0
    of_int8 = 4.0 if has("vnni") else 0.5
    return (2.0 if has("avx512_bf16") else 0.5), of_int8
