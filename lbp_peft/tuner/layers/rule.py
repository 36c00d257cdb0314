"""Rules: the settings of an adapter for the backward pass of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from ...bases.base import Basis
from ...calibration import CalibratedSelection
from ...ops.plan import ExactProduct, InputGradient

# The words that `compress_activations` may contain.
COMPRESSIBLE = ("activation", "norm", "attention", "projection")


@dataclass(frozen=True)
class BackwardRule:
    """The settings of an adapter for the backward pass of one layer.

    Attributes:
        weight_basis: The basis of the weight gradient.
        input_gradient: How the input gradient is computed. The name of its precision may be "auto".
        compress: The words of `compress_activations`, which say what is saved in few bits in the layer's block.
        exact_forward: Whether the forward pass of a LoRA on which LBP-WHT is stacked gives LoRA's own bits.
        grid_size, num_prefix_tokens, num_suffix_tokens: The values in the configuration.
        chosen_by: The selection by which calibration chooses the weight basis, and its placeholder before that. None:
            the basis is fixed.
    """

    weight_basis: Basis
    input_gradient: InputGradient = ExactProduct()
    compress: tuple[str, ...] = ()
    exact_forward: bool = False
    grid_size: tuple[int, int] | None = None
    num_prefix_tokens: int | None = None
    num_suffix_tokens: int | None = None
    chosen_by: CalibratedSelection | None = None
