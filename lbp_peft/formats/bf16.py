"""bfloat16: 8 bits of mantissa and the range of float32, so no scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import instructions
from ..instructions import multiplies_bf16
from .base import NumberFormat, Quantized, edges
from .full import CASTING_TO_BF16, GPU_RATE_IN_16_BITS, product_of_one_dtype


class BFloat16(NumberFormat):
    """g and W are rounded to bfloat16."""

    name = "bf16"

    def quantize(self, tensor: Tensor, dim: int) -> Quantized:
        return Quantized(tensor.to(torch.bfloat16))

    def multiply(self, g: Tensor, weight: Quantized, hadamard_size: int) -> Tensor:
        return product_of_one_dtype(g.to(torch.bfloat16), weight.values)

    def is_faster(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype == torch.float32 and multiplies_bf16(device)

    def cost(
        self, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> float | None:
        if dtype != torch.float32:  # bfloat16 itself is "full", and float16 would lose bits
            return None
        if device.type == "cuda":
            return 1 / GPU_RATE_IN_16_BITS if multiplies_bf16(device) else None
        if device.type != "cpu":
            return None
        return 1 / instructions.cpu_rates()[0] + CASTING_TO_BF16 * edges(rows, out_features, in_features)
