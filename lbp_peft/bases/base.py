"""The interface of bases: sets of functions over the tokens that a backward pass keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..transforms import in_transform
from .grids import TokenLayout


class Basis(ABC):
    """A set of functions over the tokens of an image. Tokens are projected on them, and coefficients lifted to tokens.

    Instances are immutable, and can be compared and hashed: two are equal if they have the same functions.

    Tokens outside the grid usually pass through exactly: the matrices then have a row for each of them.
    """

    @abstractmethod
    def num_coefficients(self, layout: TokenLayout) -> int:
        """k, the number of rows that represent the L tokens of an image, including those outside the grid.

        L or more means that projecting would save nothing; the gradient is exact then.

        Raises:
            LayoutError: the basis does not exist for this layout.
        """

    @abstractmethod
    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix that projects tokens, shape (k, L)."""

    @abstractmethod
    def synthesis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix whose transpose lifts coefficients, shape (k, L); for orthonormal functions, the analysis."""

    def preserves_sums(self, layout: TokenLayout) -> bool:
        """Whether projecting and lifting preserve the sum over tokens, since the constant function is in the span.

        If so, the gradient of a bias is computed from the coefficients, otherwise from all tokens.
        """
        return False

    def keeps_outside(self, layout: TokenLayout) -> bool:
        """Whether the tokens outside the grid are coefficients as they are, those before it the first, in order."""
        return False

    def state(self) -> dict[str, Tensor]:
        """Tensors to save in the adapter's checkpoint, by name; none if the settings determine the basis."""
        return {}


def without_transforms(make: Callable[[], Tensor]) -> Tensor:
    """Make a tensor that can be kept for later passes.

    Inference tensors cannot be saved for backward, and tensors that are made within a transform of `torch.func` are
    wrapped by it. The tensor is neither.
    """
    with torch.inference_mode(False), torch.no_grad():
        tensor = make()
        return torch.func.debug_unwrap(tensor) if in_transform() else tensor
