"""fp8 (e4m3), with one scale per row of g and one per column of W; for GPUs of compute capability 8.9 or later."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import EightBitFormat, Quantized


class Float8(EightBitFormat):
    """g and W are rounded to floating-point numbers of 8 bits."""

    name = "fp8"
    dtype = torch.float8_e4m3fn
    requirement = "a GPU of compute capability 8.9 or later"

    def is_supported(self, device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)

    def multiply_quantized(self, left: Quantized, right: Quantized) -> Tensor:
        """Multiply into bfloat16. GPUs need sizes that are multiples of 16, and a column-major right factor."""
        assert left.scales is not None and right.scales is not None
        (rows, inner), columns = left.values.shape, right.values.shape[1]
        if rows == 0:
            return left.scales.new_empty(0, columns, dtype=torch.bfloat16)
        a = _padded(left.values, (0, -inner % 16))
        b = _padded(right.values.t().contiguous(), (0, -inner % 16, 0, -columns % 16)).t()
        scale_b = F.pad(right.scales, (0, -columns % 16))
        result = torch._scaled_mm(a, b, scale_a=left.scales, scale_b=scale_b, out_dtype=torch.bfloat16)
        return result[:, :columns]


def _padded(values: Tensor, pads: tuple[int, ...]) -> Tensor:
    return F.pad(values.view(torch.int8), pads).view(values.dtype)  # zero has all bits zero in both types
