"""The interface of projections: tokens to coefficients of a basis, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..bases.base import Basis
from ..bases.grids import TokenLayout
from ..instructions import product_dtype
from ..ops.padding_check import zero_if_unused
from ..transforms import must_be_functional


class Projection(ABC):
    """Projects the tokens of layers on the functions of a basis, and lifts coefficients to tokens.

    Args:
        layout: The positions of the L tokens.
        basis: The functions that are kept.
        dtype: The dtype of the tokens to project. Matrices are made in float64 and rounded once.
        device: The device of the tokens to project.
        padding_mask: Shape (N, L), True where a token is padding, which is projected and lifted as zero. None: there is
            no padding.
    """

    def __init__(
        self,
        layout: TokenLayout,
        basis: Basis,
        dtype: torch.dtype,
        device: torch.device,
        padding_mask: Tensor | None = None,
    ):
        self.layout = layout
        self.basis = basis
        self.dtype = dtype
        self.device = device
        self.padding_mask = padding_mask
        self._make_matrices()

    def of_dtype(self, dtype: torch.dtype) -> Projection:
        """The same projection for tokens of another dtype."""
        if self.dtype == dtype:
            return self
        if product_dtype(dtype, self.device) == dtype:
            return type(self)(self.layout, self.basis, dtype, self.device, self.padding_mask)
        return Float32Projection(self.of_dtype(torch.float32), dtype)

    @abstractmethod
    def _make_matrices(self) -> None:
        """Set the attributes that the other methods multiply by."""

    @property
    @abstractmethod
    def num_coefficients(self) -> int:
        """k, the number of rows that represent the tokens of an image, including those outside the grid."""

    @property
    def may_be_kept(self) -> bool:
        """Whether its matrices are plain tensors, and not a tracer's fake ones, which must not be kept."""
        return all(type(value) is Tensor for value in vars(self).values() if isinstance(value, Tensor))

    @property
    def preserves_sums(self) -> bool:
        """Whether [`sum`] is exact."""
        return self.padding_mask is None and self.basis.preserves_sums(self.layout)

    @abstractmethod
    def sum(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (C,): the sum of the tokens over images and tokens, if the projection preserves sums."""

    def project(self, tokens: Tensor) -> Tensor:
        """(N, L, C) -> (N, k, C)."""
        return self._project(self._without_padding(tokens))

    @abstractmethod
    def _project(self, tokens: Tensor) -> Tensor:
        """[`project`] for tokens whose padding is zero already."""

    def project_gradient(self, tokens: Tensor) -> Tensor:
        """[`project`] for the gradient of a layer's output.

        Raises:
            RuntimeError: the loss depends on tokens that the padding mask calls padding.
        """
        if self.padding_mask is None:
            return self.project(tokens)
        return self._project(self._without_padding(tokens, zero_if_unused(tokens, self.padding_mask)))

    def fit(self, tokens: Tensor) -> tuple[Projection, Tensor]:
        """This projection, which is the same for all gradients, and [`project_gradient`], (N, L, C) -> (N, k, C)."""
        return self, self.project_gradient(tokens)

    def fit_image(self, image: Tensor) -> tuple[Projection, Tensor]:
        """[`fit`] for the gradient (N, C, H, W) or (N, C, L) of a convolution's outputs."""
        if image.dim() == 4:
            return self, self.project_image(image)
        return self.fit(image.transpose(1, 2))

    def _without_padding(self, tokens: Tensor, fill: float | Tensor = 0) -> Tensor:
        return tokens if self.padding_mask is None else tokens.masked_fill(self.padding_mask[:, :, None], fill)

    @abstractmethod
    def lift(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, L, C)."""

    @abstractmethod
    def project_image(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, k, C), for a layout without tokens outside the grid."""

    @abstractmethod
    def lift_image(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, C, H, W), for a layout without tokens outside the grid."""


class Float32Projection(Projection):
    """Projects tokens of a 16-bit dtype in float32, for CPUs without instructions for that dtype.

    Args:
        wide: The projection in float32.
        dtype: The dtype of the tokens to project.
    """

    def __init__(self, wide: Projection, dtype: torch.dtype):
        self.wide = wide
        super().__init__(wide.layout, wide.basis, dtype, wide.device, wide.padding_mask)

    def of_dtype(self, dtype: torch.dtype) -> Projection:
        return self if self.dtype == dtype else self.wide.of_dtype(dtype)

    def _make_matrices(self) -> None:
        """Do nothing: the projection in float32 has the matrices."""

    @property
    def num_coefficients(self) -> int:
        return self.wide.num_coefficients

    @property
    def may_be_kept(self) -> bool:
        return self.wide.may_be_kept

    def sum(self, coefficients: Tensor) -> Tensor:
        return self._apply("sum", coefficients)

    def _project(self, tokens: Tensor) -> Tensor:
        return self._apply("_project", tokens)

    def lift(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift", coefficients)

    def project_image(self, image: Tensor) -> Tensor:
        return self._apply("project_image", image)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift_image", coefficients)

    def _apply(self, name: str, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return getattr(self.wide, name)(values.float()).to(values.dtype)


def is_channels_last(image: Tensor) -> bool:
    """Whether flattening the pixels of an image (N, C, H, W) to tokens (N, L, C) is a view."""
    return image.is_contiguous(memory_format=torch.channels_last) and image.shape[1] > 1


def times(matrix: Tensor, x: Tensor, blocks: int) -> Tensor:
    """Multiply each block of x along its second axis by a matrix: (n, L / blocks), (M, L, C) -> (M, blocks n, C)."""
    batch, length, channels = x.shape
    x = x.reshape(batch * blocks, length // blocks, channels)
    return torch.bmm(matrix.expand(len(x), -1, -1), x).view(batch, len(matrix) * blocks, channels)


def bmm_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to `target`."""
    if must_be_functional():  # the compiler removes the copy
        target.copy_(torch.bmm(a, b))
    else:
        torch.bmm(a, b, out=target)
