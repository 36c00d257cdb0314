"""The choice of what is fastest for a layer, by its shape and the [`lbp_peft.instructions`] of the device.

Nothing is timed while training: a run has to give the same bits when it is repeated. The constants of CPUs were read
off `examples/benchmarks/single_layers.py` and `projections.py`, see docs/results; those of GPUs were calculated from
the rates on data sheets, and were not measured. Times are in multiply-adds of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import instructions
from .formats.full import CASTING_TO_BF16
from .formats.registry import FORMATS
from .instructions import multiplies_bf16, product_dtype

# The time that projecting takes, per element. Images take more, since their channels come first.
_PROJECTING = {torch.float32: 100, torch.bfloat16: 45}
_PROJECTING_IMAGES = {torch.float32: 250, torch.bfloat16: 60}
_PROJECTING_ON_GPU = {torch.float32: 60, torch.float16: 20, torch.bfloat16: 20}
# The cost of PyTorch's own products in 16 bits on a CPU without instructions for them. The least that was measured is
# 2.4, with AVX-512, and most take far longer. Low-rank layers multiply in float32 there.
_SLOW_PRODUCT = 2.0
# The cost of products with few rows, in float32 on a CPU with AVX-512 or AVX2, relative to that of a large one.
_SMALL_PRODUCTS = 1.5
# The batch size that is assumed in a compiled graph, which has to serve all batch sizes.
USUAL_BATCH = 8


class Heuristics:
    """The choices of `"auto"`, and between ways to the same result. Replace them by a subclass and [`using`]."""

    def fastest_precision(
        self, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> str:
        """The precision in which g W is fastest while its direction is kept to three digits.

        Args:
            rows: M, of g (M, C_out).
            out_features, in_features: C_out and C_in.
            dtype: The dtype of g.
            device: The device, on whose instructions the choice depends.
        """
        costs = _costs_of_product(rows, out_features, in_features, dtype, device)
        fastest = "full"
        for name, cost in costs.items():  # torch.compile does not trace min with a key
            fastest = name if cost < costs[fastest] else fastest
        return fastest

    def faster_formats(self, dtype: torch.dtype, device: torch.device) -> list[str]:
        """The formats in which g W, with g of a dtype, can be faster than in full, for layers that are wide enough."""
        return [name for name, one in FORMATS.items() if one.is_faster(dtype, device)]

    def use_low_rank(
        self,
        num_images: int,
        num_tokens: int,
        kept: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        on_images: bool = False,
    ) -> bool:
        """Whether a low-rank weight gradient, with g W in the fastest precision, is faster than exact backpropagation.

        Args:
            num_images: N.
            num_tokens: L, the tokens of each image.
            kept: k, the rows that the weight gradient is computed from.
            out_features, in_features: C_out and C_in.
            dtype: The dtype of x and g.
            device: The device of x and g.
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

    def use_adaptive_basis(self, num_tokens: int, rank: int, out_features: int, in_features: int) -> bool:
        """Whether an input gradient in an adaptive basis is faster than an exact one.

        Args:
            num_tokens: L.
            rank: k, the rows of the basis of each image.
            out_features, in_features: C_out and C_in.
        """
        products = 3 * rank / in_features + rank / out_features + rank / num_tokens
        return _SMALL_PRODUCTS * products < 1

    def sum_weights(self, rows: int, out_features: int, in_features: int) -> bool:
        """Whether one product with W + s B A is faster than products with W, A and B whose results are added.

        The sum costs some passes over C_out C_in elements, and the small products as many over those of the inputs and
        outputs. Measured, the latter take about twice as long for each element.

        Args:
            rows: M, of the input (M, C_in), or of the gradient (M, C_out).
            out_features, in_features: C_out and C_in.
        """
        return rows * (out_features + in_features) > out_features * in_features

    def use_dense_projection(self, kept: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether projecting tokens by one matrix (k, L) is faster than axis by axis.

        Args:
            kept: k, the multiply-adds for each value that is projected. Axis by axis these are few, and the time is
                that of reading and writing the values several times.
            dtype, device: The dtype and the device of the tokens.
        """
        if device.type == "cuda":
            return kept <= (40 if dtype.itemsize >= 4 else 160)
        return kept <= (32 * instructions.cpu_rates()[0] if dtype == torch.bfloat16 and multiplies_bf16(device) else 32)

    def project_images_in_pairs(self, kept: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether projecting two images in one product, half of it zeros, is faster than in a product for each.

        With AMX, products in bfloat16 of 33 to some 50 rows are cut into tiles that leave half of the units idle.
        Without it, multiplying the zeros takes as long as multiplying other numbers.

        Args:
            kept: k, the coefficients of each image.
            num_tokens: L, the tokens of each image.
            dtype, device: The dtype and the device of the tokens.
        """
        fits = 32 < kept <= 50 and num_tokens <= 300
        return fits and device.type == "cpu" and dtype == torch.bfloat16 and instructions.of_cpu().amx

    def use_attention_by_products(self, keys: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether matrix products run the backward pass of attention faster than PyTorch's fused operation.

        Args:
            keys: The number of keys. With more of them, the matrices outgrow the cache.
            dtype, device: The dtype and the device of query, key and value.
        """
        return device.type == "cpu" and dtype == torch.bfloat16 and keys <= 600 and multiplies_bf16(device)


def _costs_of_product(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """The cost of g W in each number format that may be chosen, see [`lbp_peft.formats.base.NumberFormat.cost`]."""
    costs = {name: one.cost(rows, out_features, in_features, dtype, device) for name, one in FORMATS.items()}
    return {name: cost for name, cost in costs.items() if cost is not None}


_active = Heuristics()


def active() -> Heuristics:
    """The heuristics in use."""
    return _active


@contextmanager
def using(heuristics: Heuristics) -> Iterator[Heuristics]:
    """Use other heuristics within the block, in all threads, since autograd may run backward passes in another."""
    global _active
    before, _active = _active, heuristics
    try:
        yield heuristics
    finally:
        _active = before
