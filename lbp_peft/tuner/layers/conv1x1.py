"""A convolution with kernel 1 with LBP-WHT adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bases.basis_set import TokenLayout
from ...encoder import is_pointwise_conv
from ...ops.conv1x1 import low_rank_pointwise_conv
from ...ops.plan import BackwardPlan
from .base import check_image_layout
from .linear import LBPWHTLinear


class LBPWHTPointwiseConv(LBPWHTLinear):
    """`nn.Conv2d` or `nn.Conv1d` with kernel 1, stride 1 and one group, with LBP-WHT adapters: see [`LBPWHTLinear`]."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(base_layer, *args, **kwargs)
        base: Any = self.get_base_layer()
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(base, name))  # models read these of their convolutions

    def _is_plain(self, base: nn.Module) -> bool:
        return is_pointwise_conv(base)

    def _num_features(self, base: Any) -> tuple[int, int]:
        return base.in_channels, base.out_channels

    def _shape_of_tokens(self, x: Tensor) -> torch.Size:
        has_batch = x.dim() == self.weight.dim()
        return torch.Size((x.shape[0], *x.shape[2:], x.shape[1])) if has_batch else x.shape[:1]

    def _channels_axis(self, x: Tensor) -> int:
        return 1

    def _check_layout(self, x: Tensor, layout: TokenLayout) -> None:
        check_image_layout(x, layout)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (F.conv1d if weight.dim() == 3 else F.conv2d)(x, weight, bias)

    def _multiply_low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: BackwardPlan) -> Tensor:
        return low_rank_pointwise_conv(x, weight, bias, plan=plan, parameter=self._parameter_of_weight())
