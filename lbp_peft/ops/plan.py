"""The plan of a layer's backward pass: an immutable description that all operations take.

The three operations ([`lbp_peft.ops.linear`], [`lbp_peft.ops.conv1x1`], [`lbp_peft.ops.recompute`]) take the same plan.
The way to compute the input gradient is an object of its own, a subclass of [`InputGradient`], because the ways have
different settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..bases.base import Basis
from ..bases.grids import TokenLayout
from ..formats.in_groups import BYTES_OF_SCALE, dequantize_rows, quantize_rows
from ..formats.products import Precision, saved_dtype
from ..projection import Projection, num_coefficients, projection
from .checkpointing import empty
from .kept import keep


class Lifting(Protocol):
    """Lifts the product of coefficients and W to tokens."""

    def of_dtype(self, dtype: torch.dtype) -> Lifting:
        """The same for tokens of another dtype."""

    def lift(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, L, C)."""

    def lift_image(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, C, H, W), for a layout without tokens outside the grid."""


class InputProjection(Protocol):
    """Projects the gradient of the outputs before its product with W."""

    @property
    def basis(self) -> Basis | None:
        """The fixed basis that it projects on; None: the basis depends on g.

        If the weight gradient has the same basis, g is projected once for both.
        """

    def of_dtype(self, dtype: torch.dtype) -> InputProjection:
        """The same for tokens of another dtype."""

    def fit(self, tokens: Tensor) -> tuple[Lifting | None, Tensor]:
        """The lifting for the product, None if it is the identity, and the coefficients of g.

        Args:
            tokens: g, shape (N, L, C).

        Returns:
            The lifting, such as a [`lbp_peft.projection.Projection`], or None; and shape (N, k, C).
        """

    def fit_image(self, image: Tensor) -> tuple[Lifting | None, Tensor]:
        """[`fit`] for the gradient (N, C, H, W) or (N, C, L) of a convolution's outputs."""


@dataclass(frozen=True)
class InputGradient:
    """A way to compute the input gradient dx from g = dLoss/dy and W; use one of the subclasses.

    A subclass is a frozen dataclass, so that plans and the rules of adapters can be compared and hashed.

    Attributes:
        precision: The number format of the product with W. If it is low, the projected input of the weight gradient is
            saved in bfloat16 too.
        needs_layout: Whether it can only be computed if the layout of the tokens is known.
        uses_layout: Whether it uses the layout if that is known.
    """

    # A default factory, here and below, since torch.compile before 2.13 refuses dataclasses with objects as defaults.
    precision: Precision = field(default_factory=Precision, kw_only=True)

    needs_layout = False
    uses_layout = False

    @property
    def is_exact(self) -> bool:
        """Whether this is plain backpropagation, bit for bit."""
        return False

    def with_precision(self, precision: Precision) -> InputGradient:
        """The same way with another number format."""
        return replace(self, precision=precision)

    def num_coefficients(self, layout: TokenLayout) -> int:
        """The number of rows that represent the L tokens in the product with W; L: all of them."""
        return layout.num_tokens

    def num_coefficients_of(self, num_tokens: int) -> int:
        """[`num_coefficients`] of L tokens whose layout is not known."""
        return num_tokens

    def projection(
        self, layout: TokenLayout | None, dtype: torch.dtype, device: torch.device, padding_mask: Tensor | None
    ) -> InputProjection | None:
        """The projection of g before the product with W; None if g is multiplied as it is."""
        return None


@dataclass(frozen=True)
class ExactProduct(InputGradient):
    """dx = g W, exact up to the rounding of the number format."""

    @property
    def is_exact(self) -> bool:
        return self.precision.name == "full"


@dataclass(frozen=True)
class FixedBasis(InputGradient):
    """dx = P^T ((P g) W), where P is the same for all images and all steps.

    Attributes:
        basis: The rows of P. If it has as many functions as there are tokens, dx is exact.
    """

    basis: Basis

    needs_layout = uses_layout = True

    def num_coefficients(self, layout: TokenLayout) -> int:
        return num_coefficients(layout, self.basis)

    def projection(
        self, layout: TokenLayout | None, dtype: torch.dtype, device: torch.device, padding_mask: Tensor | None
    ) -> Projection | None:
        return projection(layout, self.basis, dtype, device, padding_mask)


@dataclass(frozen=True)
class BackwardPlan:
    """How a layer runs its backward pass.

    Attributes:
        layout: The layout of the L tokens. It may be None if no basis is used, and for images (N, C, H, W), whose
            layout is their grid.
        weight_basis: The basis of the weight gradient. The input is saved as its projection on this basis. The weight
            gradient is exact if it is None, or if it has as many functions as there are tokens.
        input_gradient: The way to compute the input gradient; by default, an exact product.
        padding_mask: Shape (N, L), bool, True where a token is padding. Padding is projected and lifted as zero, so it
            does not enter the gradients of other tokens. None: there is no padding.
        saves_8_bits: Whether the projection of the input is saved in int8, with one scale for each row.
    """

    layout: TokenLayout | None = None
    weight_basis: Basis | None = None
    input_gradient: InputGradient = field(default_factory=ExactProduct)
    padding_mask: Tensor | None = None
    saves_8_bits: bool = False

    @property
    def precision(self) -> Precision:
        """The number format of the product in the input gradient."""
        return self.input_gradient.precision

    def num_rows(self, num_tokens: int) -> tuple[int, int]:
        """k of L tokens, from which the gradient of the weight and that of the input are computed; L: exact.

        Args:
            num_tokens: L, which counts only if there is no layout.

        Raises:
            LayoutError: a basis does not exist for the layout.
        """
        if self.layout is None:
            return num_tokens, self.input_gradient.num_coefficients_of(num_tokens)
        return num_coefficients(self.layout, self.weight_basis), self.input_gradient.num_coefficients(self.layout)

    def saved_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the projection of an input of a dtype is saved for the weight gradient."""
        return saved_dtype(dtype, self.precision)

    def to_saved(self, x_hat: Tensor) -> Tensor:
        """Convert a projected input, shape (N, k, C), to the form in which it is saved for the weight gradient."""
        if self.saves_8_bits and x_hat.dtype != torch.float64:
            return keep(quantize_rows(x_hat))
        return x_hat.to(self.saved_dtype(x_hat.dtype))

    def empty_saved(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """A tensor like the result of [`to_saved`] for a projection of x of this shape, without memory of its own."""
        if self.saves_8_bits and x.dtype != torch.float64:
            *rows, channels = shape
            return empty(x, (*rows, channels + BYTES_OF_SCALE), torch.int8)
        return empty(x, shape, self.saved_dtype(x.dtype))

    def from_saved(self, saved: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of [`to_saved`], up to rounding; `dtype` is that of the layer's input or of its gradient."""
        return dequantize_rows(saved, self.saved_dtype(dtype)) if saved.dtype == torch.int8 else saved

    def weight_projection(self, dtype: torch.dtype, device: torch.device) -> Projection | None:
        """The projection for the weight gradient; None: it is exact."""
        return projection(self.layout, self.weight_basis, dtype, device, self.padding_mask)

    def input_projection(self, dtype: torch.dtype, device: torch.device) -> InputProjection | None:
        """The projection for the input gradient; None: g is multiplied as it is."""
        return self.input_gradient.projection(self.layout, dtype, device, self.padding_mask)

    def with_precision(self, precision: Precision) -> BackwardPlan:
        """The same plan with another number format for the product in the input gradient."""
        return replace(self, input_gradient=self.input_gradient.with_precision(precision))
