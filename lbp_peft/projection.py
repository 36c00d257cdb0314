"""Project tokens to the small space, and lift them back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .bases.basis_set import BasisSet, TokenLayout, bases_along, check_side, grid_bases, num_bases
from .bases.packed import PackedLayout
from .bounded import BoundedCache
from .heuristics import one_matrix_pays, two_images_at_once_pay
from .instructions import product_dtype
from .ops.padding_check import zero_if_unused
from .transforms import in_transform, must_be_functional


def num_kept(layout: TokenLayout, bases: BasisSet | None) -> int:
    """k: the rows that represent the L = `layout.num_tokens` tokens, those outside the grid included.

    It is L, and nothing is gained, where `bases` is None or keeps no fewer rows than there are tokens.

    Raises:
        LayoutError: boundary="reflect" on a grid too small to be reflected.
    """
    if bases is None:
        return layout.num_tokens
    if isinstance(layout, PackedLayout):
        return sum(num_kept(part, bases) for part in layout.parts)
    for side in layout.grid:
        check_side(side, bases_along(layout.grid, bases).block_size, bases.boundary)
    on_grid = _num_bases(*layout.grid, bases.r, bases.block_size, bases.selection, bases.boundary)
    return min(layout.num_outside + on_grid, layout.num_tokens)


# torch.compile does not trace how bases come about: it takes the results of these three as constants. They deal in
# plain values for its sake.


@torch.compiler.assume_constant_result
def _num_bases(height: int, width: int, r: int, block_size: int, selection: str, boundary: str) -> int:
    return num_bases((height, width), BasisSet(r, block_size, selection, boundary))


@torch.compiler.assume_constant_result
def _functions_outnumber_tokens(height: int, width: int, *plain: Any) -> bool:
    """Along either axis. Only functions on a padded grid, which those of boundary="reflect" are, can do so."""
    found = grid_bases((height, width), BasisSet(*plain))
    return len(found.row_analysis) > height or len(found.column_analysis) > width


@torch.compiler.assume_constant_result
def _values(name: str, height: int, width: int, r: int, block_size: int, selection: str, boundary: str) -> list:
    return getattr(grid_bases((height, width), BasisSet(r, block_size, selection, boundary)), name).tolist()


_matrices: BoundedCache[tuple, Tensor] = BoundedCache(512)


def _matrix(name: str, grid: tuple[int, int], bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One of the arrays of [`GridBases`] as a tensor; made once per layout, bases, dtype and device."""
    if torch.compiler.is_compiling():  # the compiled graph keeps it
        values = _values(name, *grid, bases.r, bases.block_size, bases.selection, bases.boundary)
        return torch.tensor(values, dtype=dtype, device=device)
    key = (name, grid, bases, dtype, device)
    matrix = _matrices.get(key)
    if matrix is None:
        matrix = _constant(getattr(grid_bases(grid, bases), name), device, dtype)
        if type(matrix) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
            return matrix
        _matrices[key] = matrix
    return matrix


def _constant(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that may be kept."""
    # from_numpy, unlike torch.tensor, ignores a default device; inference tensors could not be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        return _without_transforms(torch.from_numpy(values).to(device, dtype))


def _without_transforms(tensor: Tensor) -> Tensor:
    """A transform of torch.func wraps every tensor that is made within it."""
    return torch.func.debug_unwrap(tensor) if in_transform() else tensor


_orders: BoundedCache[tuple, tuple[Tensor, Tensor]] = BoundedCache(64)


def _order(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices that bring tokens row by row, and back."""
    key = (layout, device)
    order = _orders.get(key)
    if order is None:
        with torch.inference_mode(False):
            back = torch.tensor(layout.order, device=device)
            order = _orders[key] = (_without_transforms(back.argsort()), _without_transforms(back))
    return order


_wholes: BoundedCache[tuple, Tensor] = BoundedCache(64)


def _whole_matrix(name: str, layout: TokenLayout, bases: BasisSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Shape (k, L): "analysis" or "synthesis" of all tokens, those outside the grid as they are."""
    if torch.compiler.is_compiling():  # made in each pass: to hold it, the graph would take a list of its values
        return _whole_matrix_compiled(name, layout, bases, device).to(dtype)
    key = (name, layout, bases, dtype, device)
    matrix = _wholes.get(key)
    if matrix is None:
        on_grid = getattr(grid_bases(layout.grid, bases), f"dense_{name}")()
        if layout.order:
            on_grid = on_grid[:, list(layout.order)]
        prefix, suffix = layout.num_prefix_tokens, layout.num_suffix_tokens
        whole = np.zeros((layout.num_outside + len(on_grid), layout.num_tokens))
        whole[:prefix, :prefix] = np.eye(prefix)
        whole[prefix : len(whole) - suffix, prefix : layout.num_tokens - suffix] = on_grid
        whole[len(whole) - suffix :, layout.num_tokens - suffix :] = np.eye(suffix)
        matrix = _constant(whole, device, dtype)
        if type(matrix) is not Tensor:
            return matrix
        _wholes[key] = matrix
    return matrix


def _whole_matrix_compiled(name: str, layout: TokenLayout, bases: BasisSet, device: torch.device) -> Tensor:
    def part(which: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return _matrix(which, layout.grid, bases, dtype, device)

    on_grid = torch.kron(part(f"row_{name}"), part(f"column_{name}"))[part("kept", torch.int64)]
    if layout.order:
        on_grid = on_grid[:, _order(layout, device)[1]]
    before, after = (torch.eye(n, device=device) for n in (layout.num_prefix_tokens, layout.num_suffix_tokens))
    return torch.block_diag(before, on_grid, after)


class Projection:
    """The linear maps between L tokens and their k coefficients, for one layout, dtype and device.

    With boundary="orthogonal", `lift` is the transpose of `project` and `project(lift(z)) == z`. The two axes of the
    grid are transformed one after the other, and the first, larger step is one matrix product over contiguous memory.
    Nothing larger than the tokens is ever made, bar where there are more functions along an axis than tokens: see
    [`projection`]. [`OneMatrix`] does the same at once.

    Args:
        layout: Where the L tokens lie.
        bases: Which bases are kept.
        dtype: Of the tokens to project. The matrices are built in float64 and rounded once.
        device: Of the tokens to project.
        padding: Shape (N, L), True where a token is only padding: taken, and lifted, as zero. None: none is.
    """

    def __init__(
        self,
        layout: TokenLayout,
        bases: BasisSet,
        dtype: torch.dtype,
        device: torch.device,
        padding: Tensor | None = None,
    ):
        self.layout = layout
        self.bases = bases
        self.dtype = dtype
        self.device = device
        self.padding = padding
        self._make_matrices()

    def _make_matrices(self) -> None:
        layout, bases = self.layout, self.bases
        block_size = bases_along(layout.grid, bases).block_size
        self.row_blocks, self.column_blocks = (_like_blocks(side, block_size, layout) for side in layout.grid)

        def matrix(name: str, blocks: int) -> Tensor:
            whole = _matrix(name, layout.grid, bases, self.dtype, self.device)
            return whole[: len(whole) // blocks, : whole.shape[1] // blocks]

        self.row_analysis = matrix("row_analysis", self.row_blocks)
        self.row_synthesis = matrix("row_synthesis", self.row_blocks)
        self.column_analysis = matrix("column_analysis", self.column_blocks)
        self.column_synthesis = matrix("column_synthesis", self.column_blocks)
        self.kept = _matrix("kept", layout.grid, bases, torch.int64, self.device)

    def of_dtype(self, dtype: torch.dtype) -> Projection:
        """The same for tokens of another dtype."""
        if self.dtype == dtype:
            return self
        multiplies_it = product_dtype(dtype, self.device) == dtype
        return (type(self) if multiplies_it else InFloat32)(self.layout, self.bases, dtype, self.device, self.padding)

    @property
    def keeps_sums(self) -> bool:
        """Whether [`sum`] is exact: whether the constant functions are among what is kept, and it is a projection."""
        # The constant is the first basis of every block.
        return self.bases.boundary == "orthogonal" and self.padding is None

    def sum(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (C,): the sum over images and tokens of what was projected."""
        of_rows = self.row_analysis.sum(1).repeat(self.row_blocks)
        of_columns = self.column_analysis.sum(1).repeat(self.column_blocks)
        of_bases = torch.outer(of_rows, of_columns).flatten()[self.kept]
        before, after = self.layout.num_prefix_tokens, self.layout.num_suffix_tokens
        weights = torch.cat((of_bases.new_ones(before), of_bases, of_bases.new_ones(after)))
        return weights @ coefficients.sum(dim=0)

    def project(self, tokens: Tensor) -> Tensor:
        """(N, L, C) -> (N, k, C)."""
        if _kernels_serve(tokens, self):
            return kernels.project_tokens(tokens, self.layout, self.bases)
        return self._project_all(self._without_padding(tokens))

    def _without_padding(self, tokens: Tensor, fill: float | Tensor = 0) -> Tensor:
        return tokens if self.padding is None else tokens.masked_fill(self.padding[:, :, None], fill)

    def _project_all(self, tokens: Tensor) -> Tensor:
        """[`project`], of tokens whose padding is zero already."""
        (height, width), prefix = self.layout.grid, self.layout.num_prefix_tokens
        batch, _, channels = tokens.shape
        grid = tokens[:, prefix : prefix + height * width]
        if self.layout.order:
            grid = grid.index_select(1, _order(self.layout, tokens.device)[0])
        grid = grid.reshape(batch, height, width * channels)
        rows = _times(self.row_analysis, grid, self.row_blocks)
        both = _times(self.column_analysis, rows.reshape(-1, width, channels), self.column_blocks)
        both = both.reshape(batch, rows.shape[1] * both.shape[1], channels)
        if self.layout.num_outside == 0:
            return both.index_select(1, self.kept)
        before, after = tokens[:, :prefix], tokens[:, prefix + height * width :]
        if must_be_functional():  # the compiler saves the copy by itself
            return torch.cat((before, both.index_select(1, self.kept), after), dim=1)
        # Under autocast the products are narrower than the tokens.
        small = both.new_empty(batch, self.layout.num_outside + len(self.kept), channels)
        small[:, :prefix] = before
        torch.index_select(both, 1, self.kept, out=small[:, prefix : prefix + len(self.kept)])
        small[:, prefix + len(self.kept) :] = after
        return small

    def project_gradient(self, tokens: Tensor) -> Tensor:
        """[`project`], of the gradient of outputs.

        Raises:
            RuntimeError: the loss depends on what was said to be padding.
        """
        if self.padding is None:
            return self.project(tokens)
        return self._project_all(self._without_padding(tokens, zero_if_unused(tokens, self.padding)))

    def fit(self, tokens: Tensor) -> tuple[Projection, Tensor]:
        """Itself, since it is the same for all gradients, and [`project_gradient`] of one, (N, L, C) -> (N, k, C)."""
        return self, self.project_gradient(tokens)

    def fit_image(self, image: Tensor) -> tuple[Projection, Tensor]:
        """[`fit`] for the gradient (N, C, H, W) or (N, C, L) of a convolution's outputs."""
        if image.dim() == 4:
            return self, self.project_image(image)
        return self.fit(image.transpose(1, 2))

    def lift(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, L, C)."""
        if _kernels_serve(coefficients, self):
            return kernels.lift_coefficients(coefficients, self.layout, self.bases)
        (height, width), prefix = self.layout.grid, self.layout.num_prefix_tokens
        batch, _, channels = coefficients.shape
        num_rows = len(self.row_synthesis) * self.row_blocks
        num_columns = len(self.column_synthesis) * self.column_blocks
        both = coefficients.new_zeros(batch, num_rows * num_columns, channels)
        both.index_copy_(1, self.kept, coefficients[:, prefix : prefix + len(self.kept)])
        rows = _times(self.column_synthesis.t(), both.reshape(-1, num_columns, channels), self.column_blocks)
        rows = rows.reshape(batch, num_rows, width * channels)
        if self.row_blocks > 1 or self.layout.order:
            grid = _times(self.row_synthesis.t(), rows, self.row_blocks).view(batch, height * width, channels)
            if self.layout.order:
                grid = grid.index_select(1, _order(self.layout, grid.device)[1])
            tokens = self._with_outside(coefficients, grid)
        else:
            # Written in place, since to join prefix and grid afterwards would cost as much as all of the above.
            tokens = coefficients.new_empty(batch, self.layout.num_tokens, channels)
            tokens[:, :prefix] = coefficients[:, :prefix]
            tokens[:, prefix + height * width :] = coefficients[:, prefix + len(self.kept) :]
            grid = tokens[:, prefix : prefix + height * width].view(batch, height, width * channels)
            _bmm_into(grid, self.row_synthesis.t().expand(batch, -1, -1), rows)
        return tokens if self.padding is None else tokens.masked_fill_(self.padding[:, :, None], 0)

    def _with_outside(self, coefficients: Tensor, grid: Tensor) -> Tensor:
        """The grid's tokens between those that were never projected."""
        if self.layout.num_outside == 0:
            return grid
        prefix = self.layout.num_prefix_tokens
        return torch.cat((coefficients[:, :prefix], grid, coefficients[:, prefix + len(self.kept) :]), dim=1)

    def project_image(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, k, C), for a layout without prefix tokens."""
        batch, channels, height, width = image.shape
        if image.is_contiguous(memory_format=torch.channels_last) and channels > 1:  # the tokens as they lie there
            return self.project(image.permute(0, 2, 3, 1).flatten(1, 2))
        columns = image.reshape(-1, width // self.column_blocks) @ self.column_analysis.t()
        # The rows of each channel as a whole: block by block these products would be too small to pay.
        rows = torch.block_diag(*[self.row_analysis] * self.row_blocks)
        both = _times(rows, columns.view(batch * channels, height, columns.shape[1] * self.column_blocks), 1)
        return both.view(batch, channels, both.shape[1] * both.shape[2]).index_select(2, self.kept).transpose(1, 2)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        """(N, k, C) -> (N, C, H, W), for a layout without prefix tokens."""
        (height, width), (batch, _, channels) = self.layout.grid, coefficients.shape
        num_rows = len(self.row_synthesis) * self.row_blocks
        num_columns = len(self.column_synthesis) * self.column_blocks
        both = coefficients.new_zeros(batch, channels, num_rows * num_columns)
        both.index_copy_(2, self.kept, coefficients.transpose(1, 2))
        rows = torch.block_diag(*[self.row_synthesis] * self.row_blocks)
        columns = _times(rows.t(), both.view(batch * channels, num_rows, num_columns), 1)
        pixels = columns.view(-1, len(self.column_synthesis)) @ self.column_synthesis
        return pixels.view(batch, channels, height, width)


class OneMatrix(Projection):
    """A [`Projection`] by one matrix (k, L): more multiply-adds than axis by axis, in a single pass over the tokens."""

    def _make_matrices(self) -> None:
        self.analysis, self.synthesis = (
            _whole_matrix(name, self.layout, self.bases, self.dtype, self.device) for name in ("analysis", "synthesis")
        )

    def sum(self, coefficients: Tensor) -> Tensor:
        return self.analysis.sum(dim=1) @ coefficients.sum(dim=0)

    def project(self, tokens: Tensor) -> Tensor:
        return self._project_all(self._without_padding(tokens))

    def _project_all(self, tokens: Tensor) -> Tensor:
        if not self._takes_two_at_once(tokens):
            return _times(self.analysis, tokens, 1)
        # The zeros keep two images apart as long as both are finite.
        two = _times(torch.block_diag(self.analysis, self.analysis), tokens.unflatten(0, (-1, 2)).flatten(1, 2), 1)
        return two.unflatten(1, (2, -1)).flatten(0, 1)

    def _takes_two_at_once(self, tokens: Tensor) -> bool:
        if must_be_functional():  # the compiler would make one graph for even batches and one for odd ones
            return False
        fitting = len(tokens) > 0 and len(tokens) % 2 == 0 and tokens.is_contiguous()  # else they would be copied
        return fitting and two_images_at_once_pay(len(self.analysis), tokens.shape[1], tokens.dtype, tokens.device)

    def lift(self, coefficients: Tensor) -> Tensor:
        tokens = _times(self.synthesis.t(), coefficients, 1)
        return tokens if self.padding is None else tokens.masked_fill_(self.padding[:, :, None], 0)

    def project_image(self, image: Tensor) -> Tensor:
        if image.is_contiguous(memory_format=torch.channels_last) and image.shape[1] > 1:
            return self.project(image.permute(0, 2, 3, 1).flatten(1, 2))  # the tokens as they lie there
        return (image.flatten(2) @ self.analysis.t()).transpose(1, 2)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        pixels = coefficients.transpose(1, 2) @ self.synthesis
        return pixels.unflatten(2, self.layout.grid)


class InFloat32(Projection):
    """A [`Projection`] of tokens of 16 bits, multiplied in float32: for CPUs without instructions for their dtype."""

    def _make_matrices(self) -> None:
        wide = projection(self.layout, self.bases, torch.float32, self.device, self.padding)
        assert wide is not None  # since this is no identity
        self.wide = wide

    def of_dtype(self, dtype: torch.dtype) -> Projection:
        return self if self.dtype == dtype else self.wide.of_dtype(dtype)

    def sum(self, coefficients: Tensor) -> Tensor:
        return self._apply("sum", coefficients)

    def _project_all(self, tokens: Tensor) -> Tensor:
        return self._apply("_project_all", tokens)

    def lift(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift", coefficients)

    def project_image(self, image: Tensor) -> Tensor:
        return self._apply("project_image", image)

    def lift_image(self, coefficients: Tensor) -> Tensor:
        return self._apply("lift_image", coefficients)

    def _apply(self, name: str, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return getattr(self.wide, name)(values.float()).to(values.dtype)


def _kernels_serve(tokens: Tensor, projection: Projection) -> bool:
    """Whether there are kernels to project, or lift, (N, L or k, C). Transforms of torch.func know nothing of them."""
    if not kernels.IN_USE or in_transform():
        return False
    return kernels.serve_tokens(tokens, projection.layout, projection.bases, projection.padding)


def _like_blocks(side: int, block_size: int, layout: TokenLayout) -> int:
    """How many blocks of a side are transformed by one and the same matrix; 1: the side is transformed as a whole.

    Block by block takes fewer multiply-adds, in more and smaller products. That pays from three blocks on, where no
    tokens outside make the batch's grids lie apart.
    """
    blocks, rest = divmod(side, block_size)
    return blocks if rest == 0 and blocks >= 3 and layout.num_outside == 0 else 1


def _times(matrix: Tensor, x: Tensor, blocks: int) -> Tensor:
    """(n, L / blocks), (M, L, C) -> (M, blocks n, C): the matrix times every block of x along its second axis."""
    outer, length, channels = x.shape
    x = x.reshape(outer * blocks, length // blocks, channels)
    return torch.bmm(matrix.expand(len(x), -1, -1), x).view(outer, len(matrix) * blocks, channels)


def _bmm_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    if must_be_functional():  # the compiler saves the copy by itself
        target.copy_(torch.bmm(a, b))
    else:
        torch.bmm(a, b, out=target)


def projection(
    layout: TokenLayout | None,
    bases: BasisSet | None,
    dtype: torch.dtype,
    device: torch.device,
    padding: Tensor | None = None,
) -> Projection | None:
    """The [`Projection`] of a layout, the way that is fastest and makes nothing larger than the tokens.

    None where it would be the identity.
    """
    if bases is None:
        return None
    if layout is None:
        raise ValueError("To project tokens on bases, it has to be known where they lie: give a layout.")
    kept = num_kept(layout, bases)
    if kept == layout.num_tokens:
        return None
    if isinstance(layout, PackedLayout):
        from .packed_projection import PackedProjection  # which makes projections, too

        return PackedProjection(layout, bases, dtype, device, padding)
    if not kernels.IN_USE and product_dtype(dtype, device) != dtype:
        return InFloat32(layout, bases, dtype, device, padding)
    by_axis_is_larger = _functions_outnumber_tokens(
        *layout.grid, bases.r, bases.block_size, bases.selection, bases.boundary
    )
    at_once = not kernels.IN_USE and (by_axis_is_larger or one_matrix_pays(kept, dtype, device))
    return (OneMatrix if at_once else Projection)(layout, bases, dtype, device, padding)
