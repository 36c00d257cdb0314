"""What is fastest for a layer, told from its shape and the [`lbp_peft.instructions`] of the device.

Nothing is timed while training: a run has to give the same bits when it is repeated. The constants of CPUs were read
off `examples/benchmarks/single_layers.py` and `projections.py`, see docs/results; those of GPUs were worked out from
the rates on data sheets and are not measured. Times are in multiply-adds of float32.
"""

from __future__ import annotations

import torch

from . import instructions
from .formats.full import CASTING_TO_BF16
from .formats.registry import FORMATS
from .instructions import multiplies_bf16, product_dtype

# The time of projecting, per element; of images more, since their channels come first.
_PROJECTING = {torch.float32: 100, torch.bfloat16: 45}
_PROJECTING_IMAGES = {torch.float32: 250, torch.bfloat16: 60}
_PROJECTING_ON_GPU = {torch.float32: 60, torch.float16: 20, torch.bfloat16: 20}
# Of PyTorch's own products in 16 bits on a CPU without instructions for them. The least that was measured is 2.4, with
# AVX-512, and most take far longer. Low-rank layers multiply in float32 there.
_SLOW_PRODUCT = 2.0


def fastest_precision(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> str:
    """The precision in which g W is fastest while its direction is kept to three digits.

    Args:
        rows: M, of g (M, C_out).
        out_features, in_features: C_out and C_in.
        dtype: Of g.
        device: It is asked for its instructions.
    """
    costs = _costs_of_product(rows, out_features, in_features, dtype, device)
    fastest = "full"
    for name, cost in costs.items():  # torch.compile does not trace min with a key
        fastest = name if cost < costs[fastest] else fastest
    return fastest


def faster_formats(dtype: torch.dtype, device: torch.device) -> list[str]:
    """The formats in which g W, with g of a dtype, can be faster than in full, for layers that are wide enough."""
    return [name for name, one in FORMATS.items() if one.is_faster(dtype, device)]


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
    costs = _costs_of_product(num_images * num_tokens, out_features, in_features, dtype, device)
    projecting = _PROJECTING_ON_GPU if device.type == "cuda" else _PROJECTING_IMAGES if on_images else _PROJECTING
    if device.type == "cpu" and product_dtype(dtype, device) != dtype:
        exact = _SLOW_PRODUCT
        price = projecting[torch.float32] + CASTING_TO_BF16
    else:
        exact = costs["full"]
        price = projecting.get(dtype, projecting[torch.float32])
    saved = exact * (1 - kept / num_tokens) + exact - min(costs.values())
    return saved > price * (1 / out_features + 1 / in_features)


def _costs_of_product(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """The cost of g W in each number format that may be chosen, see [`lbp_peft.formats.base.NumberFormat.cost`]."""
    costs = {name: one.cost(rows, out_features, in_features, dtype, device) for name, one in FORMATS.items()}
    return {name: cost for name, cost in costs.items() if cost is not None}


def one_matrix_pays(kept: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tokens are sooner projected by one matrix (k, L) than axis by axis.

    Args:
        kept: k, the multiply-adds for each value that is projected. Axis by axis these are few, and the time is that of
            reading and writing the values several times.
        dtype, device: Of the tokens.
    """
    if device.type == "cuda":
        return kept <= (40 if dtype.itemsize >= 4 else 160)
    return kept <= (32 * instructions.cpu_rates()[0] if dtype == torch.bfloat16 and multiplies_bf16(device) else 32)


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
