"""transformers' `Conv1D`, a linear layer whose weight is (C_in, C_out), with LBP-WHT adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...layer_types import register_layer_type, runs_forward_of
from ...ops.plan import BackwardPlan
from .linear import LBPWHTLinear


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module computes x W + b: transformers' `Conv1D`, a linear layer with its weight as (C_in, C_out)."""
    return runs_forward_of(module, Conv1D)


@register_layer_type("transformers' Conv1D", is_transposed_linear)
class LBPWHTTransposedLinear(LBPWHTLinear):
    """`transformers.pytorch_utils.Conv1D` with LBP-WHT adapters: see [`LBPWHTLinear`]."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(base_layer, *args, **kwargs)
        self.nx, self.nf = self.in_features, self.out_features

    def _num_features(self, base: Any) -> tuple[int, int]:
        return tuple(base.weight.shape)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None  # a Conv1D always has a bias
        return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    def _multiply_low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: BackwardPlan) -> Tensor:
        return super()._multiply_low_rank(x, weight.t(), bias, plan)
