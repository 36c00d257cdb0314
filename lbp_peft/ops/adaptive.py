"""An input gradient in a basis that is fitted to each image's own gradient, in the backward pass.

Fixed Walsh functions approximate g = dLoss/dy badly where its energy is concentrated in a few irregular patterns over
the tokens, such as those that attention makes. A basis found from g itself has no such weakness. A randomised range
finder (Halko, Martinsson and Tropp, SIAM Review 53, 2011, section 4.5) approximates the k leading left singular vectors
of g, shape (L, C_out), in a few products with k columns. For each image, with S (k, L) fixed random signs:

    Z = S g             (k, C_out)    a sketch of the features that occur
    Y = Z g^T           (k, L)        their patterns over the tokens: half a power iteration
    Q = orth(Y)         (k, L)        orthonormal rows, by Cholesky's factorisation of Y Y^T
    dx = Q^T ((Q g) W)  (L, C_in)     in place of g W

The third product, Q g, is needed with any basis. Together, the products take 3 L k C_out + k C_out C_in + L k C_in
multiply-adds, instead of L C_out C_in. Q has orthonormal rows, so dx is the exact input gradient of the nearest
gradient in their span. If k is at least the rank of g, that is g itself, and dx is exact.

From one layer to the next the leading patterns change little, because most of the gradient passes along the residual
connections. Within one backward pass of autograd, the Q of the previous layer is therefore added to S: the span is then
nearer to the leading patterns of g, and since successive layers keep and lose the same patterns, their errors add up
less. [`sign_matrix`] gives the same S for all images, layers and steps, and the order of the layers in a backward pass
is always the same, so a run can be repeated to the bit. Gradient checkpointing changes nothing, except for PyTorch's
reentrant variant, which runs a backward pass of its own for each block.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.grids import TokenLayout
from ..bases.packed import PackedLayout
from ..bounded import BoundedCache
from ..formats.full import without_autocast
from ..instructions import product_dtype
from ..transforms import must_be_functional, outside_transforms
from .padding_check import zero_if_unused
from .plan import InputGradient

# The share of the trace of Y Y^T that is added to its diagonal, so that it is positive definite where g has a rank
# below k. It is far above the rounding errors of float64 and far below those of Y, which is computed in float32.
_SHIFT = 1e-13
# The length of the rows of S relative to those of the previous Q, which have length 1. Values from 0.03 to 0.3 give the
# same results.
_LENGTH_OF_SIGNS = 0.1


@dataclass(frozen=True)
class AdaptiveBasis(InputGradient):
    """dx = Q^T ((Q g) W), where Q is fitted to the gradient g of each image.

    The layout need not be known. If it is, tokens outside the grid ([CLS], registers) and padding are left out of the
    fit. The input gradients of tokens outside the grid are exact, and those of padding are zero.

    Images of several sizes that are packed into one sequence have exact input gradients.

    Attributes:
        rank: k, the number of rows of Q for each image. If it is at least the number of tokens that are fitted, dx is
            exact.
        energy: The share of the squared norm of g that is to be kept, above 0 and at most 1. If the Q of the previous
            layer in the backward pass keeps this share in all images of a batch, that Q is used and none is fitted.
            Rows that no image needs for this share are left out of the product with W. None: a Q is always fitted, and
            all k rows are used.
    """

    rank: int
    energy: float | None = None

    uses_layout = True

    def num_coefficients(self, layout: TokenLayout) -> int:
        if isinstance(layout, PackedLayout):
            return layout.num_tokens
        return min(self.rank + layout.num_outside, layout.num_tokens)

    def num_coefficients_of(self, num_tokens: int) -> int:
        return min(self.rank, num_tokens)

    def projection(
        self, layout: TokenLayout | None, dtype: torch.dtype, device: torch.device, padding_mask: Tensor | None
    ) -> RangeFinder | None:
        if isinstance(layout, PackedLayout):
            return None
        return RangeFinder(self.rank, self.energy, layout, padding_mask)


class RangeFinder:
    """Finds the [`AdaptiveProjection`] of a gradient.

    Args:
        rank, energy: See [`AdaptiveBasis`].
        layout: The positions of the tokens; None if they are not known.
        padding_mask: Shape (N, L), True where a token is padding.
    """

    basis = None  # it is found for each gradient

    def __init__(self, rank: int, energy: float | None, layout: TokenLayout | None, padding_mask: Tensor | None):
        self.rank = rank
        self.energy = energy
        self.layout = layout
        self.padding_mask = padding_mask

    def of_dtype(self, dtype: torch.dtype) -> RangeFinder:
        """The same for tokens of another dtype."""
        return self

    def fit(self, tokens: Tensor) -> tuple[AdaptiveProjection | None, Tensor]:
        """The projection for a gradient, and the gradient's coefficients.

        A gradient with NaN or infinity gives coefficients that are not finite in its image, and no error.

        Args:
            tokens: Shape (N, L, C), the gradient of the outputs.

        Returns:
            The projection, None where it would be the identity, and shape (N, k, C).

        Raises:
            RuntimeError: the loss depends on padding.
        """
        if self.padding_mask is not None:
            tokens = tokens.masked_fill(self.padding_mask[:, :, None], zero_if_unused(tokens, self.padding_mask))
        length = tokens.shape[1]
        before, after = (0, 0) if self.layout is None else _outside(self.layout)
        fitted = tokens[:, before : length - after]
        if self.rank >= min(fitted.shape[1:]) or tokens.numel() == 0:
            return None, tokens
        with without_autocast(tokens.device):
            # Sums over tokens of a small loss's gradients can be too small for float16.
            is_half = fitted.dtype == torch.float16
            wide = fitted.to(torch.float32 if is_half else product_dtype(fitted.dtype, fitted.device))
            basis, coefficients = self._fit(wide)
            if self.energy is not None:
                basis, coefficients = _rows_that_keep(self.energy, basis, coefficients, wide)
        coefficients = coefficients.to(tokens.dtype)
        if before or after:
            coefficients = torch.cat((tokens[:, :before], coefficients, tokens[:, length - after :]), dim=1)
        return AdaptiveProjection(basis, self.layout), coefficients

    def _fit(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Q, shape (N, k, L), and Q g, shape (N, k, C)."""
        signs, previous = sign_matrix(self.rank, g.shape[1], g.dtype, g.device), _previous_basis(g, self.rank)
        if previous is None:
            sketch = torch.matmul(signs, g)
        elif self.energy is None:
            sketch = torch.bmm(torch.add(previous, signs, alpha=_LENGTH_OF_SIGNS * g.shape[1] ** 0.5), g)
        else:
            sketch = torch.bmm(previous, g)
            if bool((sketch.square().sum((1, 2)) >= self.energy * g.square().sum((1, 2))).all()):
                return previous, sketch
            sketch = torch.add(sketch, torch.matmul(signs, g), alpha=_LENGTH_OF_SIGNS * g.shape[1] ** 0.5)
        basis = orthonormal_rows(_patterns_of(sketch, g)).to(g.dtype)
        _keep_for_next(basis)
        return basis, torch.bmm(basis, g)

    def fit_image(self, image: Tensor) -> tuple[AdaptiveProjection | None, Tensor]:
        """[`fit`] for the gradient (N, C, H, W) or (N, C, L) of a convolution's outputs."""
        return self.fit(image.flatten(2).transpose(1, 2))


class AdaptiveProjection:
    """Tokens as combinations of k patterns of their own image.

    Args:
        basis: Shape (N, k, L - p - s), orthonormal rows for each image; superfluous rows of an image are zero.
        layout: The layout of the tokens, p of which are before those that the basis is for and s after them. These are
            their own coefficients. None: there are none.
    """

    def __init__(self, basis: Tensor, layout: TokenLayout | None):
        self.basis = basis
        self.layout = layout
        self.before, self.after = (0, 0) if layout is None else _outside(layout)

    def of_dtype(self, dtype: torch.dtype) -> AdaptiveProjection:
        """The same for tokens of another dtype."""
        return self

    def lift(self, coefficients: Tensor) -> Tensor:
        """(N, p + k + s, C) -> (N, L, C)."""
        before, after, length = self.before, self.after, self.basis.shape[2]
        inner = coefficients[:, before : coefficients.shape[1] - after].to(self.basis.dtype)
        with without_autocast(coefficients.device):
            if before + after == 0:
                return torch.bmm(self.basis.mT, inner).to(coefficients.dtype)
            if must_be_functional() or inner.dtype != coefficients.dtype:
                lifted = torch.bmm(self.basis.mT, inner).to(coefficients.dtype)
                prefix, suffix = coefficients[:, :before], coefficients[:, coefficients.shape[1] - after :]
                return torch.cat((prefix, lifted, suffix), dim=1)
            tokens = coefficients.new_empty(len(coefficients), before + length + after, coefficients.shape[2])
            tokens[:, :before] = coefficients[:, :before]
            torch.bmm(self.basis.mT, inner, out=tokens[:, before : before + length])
            tokens[:, before + length :] = coefficients[:, coefficients.shape[1] - after :]
            return tokens

    def lift_image(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, C, H, W), for a layout without tokens outside the grid."""
        assert self.layout is not None
        inner = coefficients.to(self.basis.dtype)
        with without_autocast(coefficients.device):
            pixels = torch.bmm(inner.mT, self.basis).to(coefficients.dtype)
        return pixels.unflatten(2, self.layout.grid)


def _outside(layout: TokenLayout) -> tuple[int, int]:
    return layout.num_prefix_tokens, layout.num_suffix_tokens


class _Previous(threading.local):
    """The last Q that this thread fitted, and the number of the backward pass of autograd in which it did.

    Its N k L values stay in memory until the next one is fitted.
    """

    basis: Tensor | None = None
    backward_pass = -1


_previous = _Previous()


def _backward_pass_number() -> int:
    """The number of the backward pass that runs in this thread; -1: there is none, or it is compiled or transformed."""
    return -1 if must_be_functional() else int(torch._C._current_graph_task_id())


def _previous_basis(g: Tensor, rank: int) -> Tensor | None:
    """The Q of the previous layer in this backward pass; None if its shape, dtype or device is another."""
    if (number := _backward_pass_number()) == -1:
        return None
    basis = _previous.basis
    if basis is None or _previous.backward_pass != number:
        return None
    fits = basis.shape == (g.shape[0], rank, g.shape[1]) and basis.dtype == g.dtype and basis.device == g.device
    return basis if fits else None


def _keep_for_next(basis: Tensor) -> None:
    if (number := _backward_pass_number()) != -1:
        # The backward pass of another model may run within this one, and must not get its NaN.
        _previous.basis, _previous.backward_pass = basis.nan_to_num(0.0, 0.0, 0.0), number


def _patterns_of(sketch: Tensor, g: Tensor) -> Tensor:
    """Y of the module's description from Z: (N, k, C), (N, L, C) -> (N, k, L), each image up to a factor."""
    # Divided so that no product of two small or two large values leaves the range of the dtype.
    largest = sketch.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return torch.bmm(sketch / largest, g.mT)


def orthonormal_rows(matrices: Tensor) -> Tensor:
    """Orthonormal rows with the same span, by Cholesky's factorisation of the Gram matrix (Cholesky QR).

    In float64, except on devices without it, since the Gram matrix has the square of the condition number. Where a
    matrix has a rank below k, the superfluous rows come out shorter than 1, down to 0. As a projection, Q^T Q never
    lengthens a vector.

    Args:
        matrices: Shape (N, k, L), k at most L.

    Returns:
        Shape (N, k, L), float64, or float32 on devices without that. Its entries are not finite where those of the
        matrix are not.
    """
    precise = torch.float32 if matrices.device.type == "mps" else torch.float64
    shift = _SHIFT if precise == torch.float64 else 1e-6
    rows = matrices.to(precise)
    # Dividing first keeps the squares of float32's largest and smallest numbers in the range of float32, too.
    largest = rows.abs().amax((1, 2), keepdim=True)
    rows = rows / largest.clamp_min(torch.finfo(precise).tiny)
    gram = torch.bmm(rows, rows.mT)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    added = (shift * trace).clamp_min(torch.finfo(precise).tiny)
    identity = torch.eye(rows.shape[1], dtype=precise, device=rows.device)
    factor = torch.linalg.cholesky_ex(gram + added[:, None, None] * identity)[0]
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _rows_that_keep(energy: float, basis: Tensor, coefficients: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest rows of the basis that keep a share of each image's energy, and their coefficients.

    All images have the same number of rows, since they are multiplied together. All rows are returned if even they keep
    less, and within transforms and compiled graphs, whose shapes must not depend on values.
    """
    if must_be_functional():
        return basis, coefficients
    of_rows, order = coefficients.float().square().sum(2).sort(dim=1, descending=True)
    wanted = energy * g.float().square().sum((1, 2))
    needed = int((of_rows.cumsum(1) < wanted[:, None]).sum(1).max()) + 1
    if needed >= basis.shape[1]:
        return basis, coefficients
    index = order[:, :needed, None]
    return basis.take_along_dim(index, 1), coefficients.take_along_dim(index, 1)


_signs: BoundedCache[tuple, Tensor] = BoundedCache(256)


def sign_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed pseudorandom signs, divided by the number of columns; the same on all devices and in all processes.

    They are divided so that products with values of the dtype stay in its range.
    """
    if torch.compiler.is_compiling():
        return _make_signs(rows, columns, dtype, device)
    key = (rows, columns, dtype, device)
    matrix = _signs.get(key)
    if matrix is None:
        with outside_transforms(), torch.inference_mode(False), torch.no_grad():
            matrix = _make_signs(rows, columns, dtype, device)
        if type(matrix) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
            return matrix
        _signs[key] = matrix
    return matrix


def _make_signs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Signs from one bit of a hash of each entry's row and column, so that no random generator has to be restored."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    bits = _scramble(_scramble(row + 1) + column)
    return (1 - 2 * (bits & 1)).to(dtype) / columns


def _scramble(values: Tensor) -> Tensor:
    """Apply a bijection of the integers below 2**32. Every bit of the result depends on all bits of the argument.

    It alternates multiplications by odd numbers and shifts. Argument and result are int64 tensors.
    """
    mask = 0xFFFFFFFF
    values = values & mask
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        values = ((values ^ (values >> shift)) * factor) & mask
    return values ^ (values >> 15)
