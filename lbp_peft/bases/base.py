"""The interface of bases: which functions over the tokens a backward pass keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..transforms import in_transform
from .grids import TokenLayout


class Basis(ABC):
    """A set of functions over the tokens of an image; tokens are projected on it and lifted from it.

    Instances are immutable, and can be compared and hashed: two are equal if they keep the same functions.

    Tokens outside the grid are usually kept as they are: the matrices then have a row for each of them.
    """

    @abstractmethod
    def num_coefficients(self, layout: TokenLayout) -> int:
        """k, the number of rows that represent the L tokens of an image, those outside the grid included.

        L or more means that projecting would save nothing; the gradient is exact then.

        Raises:
            LayoutError: the basis does not exist for this layout.
        """

    @abstractmethod
    def analysis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix that projects tokens, shape (k, L)."""

    @abstractmethod
    def synthesis(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix whose transpose lifts coefficients, shape (k, L); of orthonormal functions it is the analysis."""

    def preserves_sums(self, layout: TokenLayout) -> bool:
        """Whether projecting and lifting preserve the sum over tokens: the constant function is in the span.

        The gradient of a bias is computed from the coefficients if so, and from all tokens otherwise.
        """
        return False

    def state(self) -> dict[str, Tensor]:
        """Tensors to be saved in the adapter's checkpoint, by name; none if its settings determine the basis."""
        return {}


def without_transforms(make: Callable[[], Tensor]) -> Tensor:
    """Make a tensor that may be kept: no inference tensor, which could not be saved for backward, and not wrapped.

    A transform of `torch.func` wraps every tensor that is made within it.
    """
    with torch.inference_mode(False), torch.no_grad():
        tensor = make()
        return torch.func.debug_unwrap(tensor) if in_transform() else tensor
