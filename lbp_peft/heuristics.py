"""What is fastest for a layer, told from its shape and the [`lbp_peft.instructions`] of the device.

Nothing is timed while training: a run has to give the same bits when it is repeated. The constants of CPUs were read
off `examples/benchmarks/single_layers.py` and `projections.py`, see docs/results; those of GPUs were worked out from
the rates on data sheets and are not measured. Times are in multiply-adds of float32.
"""

from __future__ import annotations

import torch

from . import instructions
from .instructions import multiplies_bf16, multiplies_int8, product_dtype

# Of the factors and the result of a product, what rounding takes for each element.
_CASTING_TO_BF16 = 40
_ROUNDING_TO_INT8 = {torch.float32: 120, torch.bfloat16: 50}
# Of what is projected, likewise; of images more, since their channels come first.
_PROJECTING = {torch.float32: 100, torch.bfloat16: 45}
_PROJECTING_IMAGES = {torch.float32: 250, torch.bfloat16: 60}
_PROJECTING_ON_GPU = {torch.float32: 60, torch.float16: 20, torch.bfloat16: 20}
_GPU_RATE_IN_16_BITS = 15.0
# Of PyTorch's own products in 16 bits on a CPU without instructions for them. The least that was measured is 2.4, with
# AVX-512, and most take far longer. Low-rank layers multiply in float32 there.
_SLOW_PRODUCT = 2.0
# Of products with few rows, in float32 on a CPU with AVX-512 or AVX2, relative to that of a large one.
_SMALL_PRODUCTS = 1.5


def fastest_precision(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> str:
    """The precision in which g W is fastest while its direction is kept to three digits.

    Args:
        rows: M, of g (M, C_out).
        out_features, in_features: C_out and C_in.
        dtype: Of g.
        device: It is asked for its instructions.
    """
    times = _times_of_product(rows, out_features, in_features, dtype, device)
    fastest = "full"
    for name, time in times.items():  # torch.compile does not trace min with a key
        fastest = name if time < times[fastest] else fastest
    return fastest


def faster_formats(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Which of "bf16" and "int8" can be faster than "full" for g W of a dtype, on layers wide enough for it."""
    from_bf16 = ["bf16"] if dtype == torch.float32 and multiplies_bf16(device) else []
    return from_bf16 + (["int8"] if multiplies_int8(device) else [])


def low_rank_pays(
    num_images: int,
    num_tokens: int,
    kept: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    on_images: bool = False,
) -> bool:
    """Whether a backward pass with a low-rank weight gradient, and g W in the fastest precision, is sooner done.

    Args:
        num_images: N.
        num_tokens: L, of each image.
        kept: k of them, for the weight gradient.
        out_features, in_features: C_out and C_in.
        dtype: Of x and g.
        device: Where they are.
        on_images: Whether x is (N, C_in, H, W).
    """
    times = _times_of_product(num_images * num_tokens, out_features, in_features, dtype, device)
    projecting = _PROJECTING_ON_GPU if device.type == "cuda" else _PROJECTING_IMAGES if on_images else _PROJECTING
    if device.type == "cpu" and product_dtype(dtype, device) != dtype:
        exact = _SLOW_PRODUCT
        price = projecting[torch.float32] + _CASTING_TO_BF16
    else:
        exact = times["full"]
        price = projecting.get(dtype, projecting[torch.float32])
    saved = exact * (1 - kept / num_tokens) + exact - min(times.values())
    return saved > price * (1 / out_features + 1 / in_features)


def adaptive_basis_pays(num_tokens: int, rank: int, out_features: int, in_features: int) -> bool:
    """Whether an input gradient in an adaptive basis takes less time than an exact one.

    Args:
        num_tokens: L.
        rank: k, the rows of the basis of each image.
        out_features, in_features: C_out and C_in.
    """
    products = 3 * rank / in_features + rank / out_features + rank / num_tokens
    return _SMALL_PRODUCTS * products < 1


def _times_of_product(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Of g W, for each of its multiply-adds, by precision, as [`lbp_peft.formats.products.product`] computes it."""
    if device.type == "cuda":
        if dtype == torch.float32 and multiplies_bf16(device):
            return {"full": 1.0, "bf16": 1 / _GPU_RATE_IN_16_BITS}
        return {"full": 1.0 if dtype.itemsize >= 4 else 1 / _GPU_RATE_IN_16_BITS}
    if device.type != "cpu" or dtype not in _ROUNDING_TO_INT8:
        return {"full": 1.0}
    of_bf16, of_int8 = _cpu_rates()
    edges = 1 / max(rows, 1) + 1 / out_features + 1 / in_features
    in_bf16 = 1 / of_bf16 + _CASTING_TO_BF16 * edges
    times = {"full": 1.0, "bf16": in_bf16}
    if dtype == torch.bfloat16:
        times = {"full": in_bf16 if product_dtype(dtype, device) != dtype else 1 / of_bf16}
    times["int8"] = 1 / of_int8 + _ROUNDING_TO_INT8[dtype] * edges
    return times


def one_matrix_pays(kept: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tokens are sooner projected by one matrix (k, L) than axis by axis.

    Args:
        kept: k, the multiply-adds for each value that is projected. Axis by axis these are few, and the time is that of
            reading and writing the values several times.
        dtype, device: Of the tokens.
    """
    if device.type == "cuda":
        return kept <= (40 if dtype.itemsize >= 4 else 160)
    return kept <= (32 * _cpu_rates()[0] if dtype == torch.bfloat16 and multiplies_bf16(device) else 32)


def two_images_at_once_pay(kept: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one matrix projects two images in one product, half of it zeros, sooner than one in each.

    In bfloat16 on CPUs, products of 33 to some 50 rows are cut into tiles that leave half of the units idle.

    Args:
        kept: k of each image.
        num_tokens: L of each image.
        dtype, device: Of the tokens.
    """
    fits = 32 < kept <= 50 and num_tokens <= 300
    return fits and device.type == "cpu" and dtype == torch.bfloat16 and multiplies_bf16(device)


def attention_by_products_pays(keys: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention goes backward sooner by matrix products than fused.

    Args:
        keys: Of each query. With more of them, the matrices outgrow the cache.
        dtype, device: Of query, key and value.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and keys <= 600 and multiplies_bf16(device)


def _cpu_rates() -> tuple[float, float]:
    """How many times faster than in float32 the CPU multiplies in bfloat16 and in int8, by its instructions.

    1 where it has none, since then the products are computed in float32.
    """
    cpu = instructions.of_cpu()
    if cpu.amx:
        return 6.5, 9.0
    return (2.0 if cpu.bf16 else 1.0), (4.0 if cpu.int8 else 1.0)
