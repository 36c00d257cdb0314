"""A convolution with kernel 1 with LBP-WHT adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bases.grids import TokenLayout
from ...layer_types import register_layer_type, runs_forward_of
from ...ops.conv1x1 import low_rank_pointwise_conv
from ...ops.plan import BackwardPlan
from .base import check_image_layout
from .linear import LBPWHTLinear


def is_pointwise_conv(module: nn.Module) -> bool:
    """Whether a module multiplies the channels of every pixel by one matrix: a 1-D or 2-D convolution with kernel 1."""
    return (
        runs_forward_of(module, nn.Conv1d, nn.Conv2d)
        and {*module.kernel_size, *module.stride, *module.dilation} == {1}
        and module.padding in ((0,), (0, 0), 0, "same", "valid")
        and module.groups == 1
    )


@register_layer_type(
    "torch.nn.Conv1d and Conv2d with kernel 1, stride 1 and one group", is_pointwise_conv, channels_axis=1
)
class LBPWHTPointwiseConv(LBPWHTLinear):
    """`nn.Conv2d` or `nn.Conv1d` with kernel 1, stride 1 and one group, with LBP-WHT adapters: see [`LBPWHTLinear`]."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(base_layer, *args, **kwargs)
        base: Any = self.get_base_layer()
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(base, name))  # models read these of their convolutions

    def _num_features(self, base: Any) -> tuple[int, int]:
        return base.in_channels, base.out_channels

    def _shape_of_tokens(self, x: Tensor) -> torch.Size:
        has_batch = x.dim() == self.weight.dim()
        return torch.Size((x.shape[0], *x.shape[2:], x.shape[1])) if has_batch else x.shape[:1]

    def _check_layout(self, x: Tensor, layout: TokenLayout) -> None:
        check_image_layout(x, layout)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (F.conv1d if weight.dim() == 3 else F.conv2d)(x, weight, bias)

    def _multiply_low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: BackwardPlan) -> Tensor:
        return low_rank_pointwise_conv(x, weight, bias, plan=plan, parameter=self._parameter_of_weight())
