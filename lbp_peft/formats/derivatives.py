"""The derivative of an activation function in 4 bits for each input.

The backward pass of an elementwise function y = f(x) needs only f'(x), and f' of the usual functions has a small range,
for GELU from -0.13 to 1.13. LowMemoryBP (arXiv 2406.16282) approximates the derivative in 2 bits by that of other
functions. Here it is quantized:

    cell    i = clamp(ceil(x / step), -128, 127), step = R / 128, beyond [-R, R] f' is constant
    value   d_i = (f(i step) - f((i - 1) step)) / step, the mean of f' over the cell, or that of the tail
    levels  16 values, which minimise the sum over all cells of weight_i (d_i - level)^2
    code    of x: the index of the level nearest to d_i, two codes to a byte

Cells are open below and closed above, so that f' of ReLU at 0 is 0, and that of piecewise linear functions is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..bounded import BoundedCache

LEVELS = 16
_CELLS = 256
_RANGES = (4.0, 8.0, 16.0)
# The largest distance of f' from its limit at the end of the range. The 16 levels resolve no finer steps either.
_TOLERANCE = 0.01
# The number of values that CPUs compute at once, so that intermediate results stay in the cache, and leave only small
# gaps in the heap.
_VALUES_AT_ONCE = 2**17
_AS_PAIRS = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}


class DerivativeTable:
    """Levels of the derivative of one function, and the level of each range of inputs.

    Args:
        levels: Shape (16,), values of the derivative.
        codes: Shape (256,), integers from 0 to 15: the code of each cell, the lowest cell first.
        limit: R, the end of the range of cells.
    """

    def __init__(self, levels: np.ndarray, codes: np.ndarray, limit: float):
        self.levels, self.codes, self.limit = levels, codes, limit
        self._as_lists = [float(level) for level in levels], [int(code) for code in codes]  # for the compiler
        self.cells_per_unit = _CELLS / 2 / limit
        self._tensors: BoundedCache[tuple, Tensor] = BoundedCache(16)

    def __reduce__(self) -> tuple:
        return DerivativeTable, (self.levels, self.codes, self.limit)

    def pack(self, x: Tensor) -> Tensor:
        """The codes of the derivative at x, which may have any shape; uint8, shape (ceil(x.numel() / 2),)."""
        flat = x.reshape(-1)
        if flat.numel() % 2:
            flat = torch.cat((flat, flat.new_zeros(1)))
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            cells = (flat.float() * self.cells_per_unit).clamp(-128, 127).ceil().to(torch.int32).clamp(-128, 127) + 128
            codes = self._tensor("codes", x.device)[cells].view(-1, 2)
            return codes[:, 0] | codes[:, 1] << 4
        return self._pack_in_blocks(flat)

    def packed_shape(self, x: Tensor) -> tuple[int]:
        """The shape of what [`pack`] returns for x."""
        return (-(-x.numel() // 2),)

    def _pack_in_blocks(self, flat: Tensor) -> Tensor:
        packed = flat.new_empty(flat.numel() // 2, dtype=torch.uint8)
        size = min(flat.numel(), _VALUES_AT_ONCE)
        scaled, cells = flat.new_empty(size, dtype=torch.float32), flat.new_empty(size, dtype=torch.int8)
        pairs = flat.new_empty(size // 2, dtype=torch.int32)
        table = self._tensor("pairs of codes", flat.device)
        for inputs, codes in zip(flat.split(size), packed.split(size // 2), strict=True):
            n = len(inputs)
            in_cells = scaled[:n]
            if inputs.dtype == torch.float32:
                torch.mul(inputs, self.cells_per_unit, out=in_cells)
            else:  # operations on two dtypes are slow, except for copies
                in_cells.copy_(inputs).mul_(self.cells_per_unit)
            cells[:n] = in_cells.clamp_(-128, 127).ceil_()
            index = pairs[: n // 2].copy_(cells[:n].view(torch.int16)).add_(2**15)
            torch.index_select(table, 0, index, out=codes)
        return packed

    def times_derivative(self, grad: Tensor, packed: Tensor) -> Tensor:
        """`grad` times the derivative at the inputs that were packed; of the shape and dtype of `grad`."""
        if grad.device.type != "cpu" or torch.compiler.is_compiling() or grad.dtype not in _AS_PAIRS:
            both = torch.stack((packed & 15, packed >> 4), dim=1).flatten()[: grad.numel()]
            return grad * self._tensor("levels", grad.device)[both.to(torch.int32)].to(grad.dtype).view(grad.shape)
        if grad.numel() % 2:
            extended = torch.cat((grad.reshape(-1), grad.new_zeros(1)))
            return self._multiply_in_blocks(extended, packed)[:-1].view(grad.shape)
        return self._multiply_in_blocks(grad.reshape(-1), packed).view(grad.shape)

    def _multiply_in_blocks(self, flat: Tensor, packed: Tensor) -> Tensor:
        result = torch.empty_like(flat)
        size = min(flat.numel(), _VALUES_AT_ONCE)
        pairs = flat.new_empty(size // 2, dtype=torch.int32)
        table = self._tensor("pairs of levels", flat.device, flat.dtype)
        levels = flat.new_empty(size // 2, dtype=table.dtype)
        for grads, codes, out in zip(flat.split(size), packed.split(size // 2), result.split(size), strict=True):
            n = len(codes)
            torch.index_select(table, 0, pairs[:n].copy_(codes), out=levels[:n])
            torch.mul(grads, levels[:n].view(flat.dtype), out=out)
        return result

    def _tensor(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        if torch.compiler.is_compiling():  # the compiled graph keeps it
            levels, codes = self._as_lists
            if name == "codes":
                return torch.tensor(codes, dtype=torch.uint8, device=device)
            return torch.tensor(levels, dtype=torch.float32, device=device)
        key = (name, device, dtype)
        tensor = self._tensors.get(key)
        if tensor is None:
            with torch.inference_mode(False), torch.no_grad():
                tensor = _MAKERS[name](self, dtype).to(device)
            if type(tensor) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
                return tensor
            self._tensors[key] = tensor
        return tensor

    def _codes_tensor(self, dtype: torch.dtype | None) -> Tensor:
        return torch.from_numpy(self.codes.astype(np.uint8))

    def _levels_tensor(self, dtype: torch.dtype | None) -> Tensor:
        return torch.from_numpy(self.levels.astype(np.float32))

    def _pairs_of_codes(self, dtype: torch.dtype | None) -> Tensor:
        """Shape (65536,): the two codes of a pair of neighbouring inputs, by their cells as one 16-bit integer."""
        pairs = np.arange(-(2**15), 2**15).astype(np.int16).view(np.int8).reshape(-1, 2)
        codes = self.codes.astype(np.uint8)[pairs.astype(np.int64) + 128]
        return torch.from_numpy(codes[:, 0] | codes[:, 1] << 4)

    def _pairs_of_levels(self, dtype: torch.dtype | None) -> Tensor:
        """Shape (256,): the two levels of a byte that holds two codes, as one integer of twice the size."""
        assert dtype is not None
        byte = np.arange(256)
        both = torch.from_numpy(self.levels[np.stack((byte & 15, byte >> 4), 1)]).to(dtype)
        return both.view(_AS_PAIRS[dtype]).flatten()


_MAKERS: dict[str, Callable[[DerivativeTable, torch.dtype | None], Tensor]] = {
    "codes": DerivativeTable._codes_tensor,
    "levels": DerivativeTable._levels_tensor,
    "pairs of codes": DerivativeTable._pairs_of_codes,
    "pairs of levels": DerivativeTable._pairs_of_levels,
}


def derivative_table(function: Callable[[Tensor], Tensor]) -> DerivativeTable | None:
    """Make the table of an elementwise function.

    Args:
        function: A deterministic function of float64 tensors.

    Returns:
        The table; None if the function is not elementwise, or its derivative does not become constant at both ends.
    """
    for limit in _RANGES:
        step = 2 * limit / _CELLS
        edges = torch.arange(-_CELLS // 2 - 1, _CELLS // 2, dtype=torch.float64, device="cpu") * step
        outer = [-1e4, -4 * limit, -2 * limit, -limit, limit, 2 * limit, 4 * limit, 1e4]
        far = torch.tensor(outer, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            at_edges, at_far = function(edges).numpy(), function(far).numpy()
            if not np.array_equal(function(edges.flip(0)).numpy()[::-1], at_edges, equal_nan=True):
                return None
        slopes = np.diff(at_far) / np.diff(far.numpy())
        low, high = slopes[:3], slopes[4:]
        if not (np.isfinite(at_edges).all() and np.isfinite(slopes).all()):
            return None
        if np.ptp(low) > _TOLERANCE or np.ptp(high) > _TOLERANCE:
            continue
        values = np.diff(at_edges) / step
        values[0], values[-1] = low[0], high[-1]
        levels, codes = _nearest_levels(values, np.arange(-_CELLS // 2, _CELLS // 2) * step - step / 2)
        return DerivativeTable(levels, codes, limit)
    return None


def _nearest_levels(values: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the 16 levels of least squared error, and the index of the level nearest to each value.

    The inputs are assumed to follow a normal distribution of variance 2, mixed with a tenth of a uniform one.
    """
    weights = np.exp(-(centres**2) / 4)
    weights = weights / weights.sum() + 0.1 / len(values)
    weights[[0, -1]] = weights.max()  # all inputs beyond the range
    distinct, inverse = np.unique(np.round(values, 12), return_inverse=True)
    total = np.bincount(inverse.ravel(), weights)
    if len(distinct) > LEVELS:
        groups = _best_groups(distinct, total)
        levels = np.array([np.average(distinct[g], weights=total[g]) for g in groups])
    else:
        levels = distinct
    codes = np.abs(values[:, None] - levels).argmin(1)
    return np.pad(levels, (0, LEVELS - len(levels))), codes


def _best_groups(values: np.ndarray, weights: np.ndarray) -> list[slice]:
    """Cut sorted values into 16 runs of least squared error about their means, by dynamic programming."""
    n = len(values)
    w, wx, wxx = (np.concatenate(([0.0], np.cumsum(weights * values**power))) for power in range(3))
    start, stop = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    mass = np.where(stop > start, w[stop] - w[start], 1)
    cost = np.where(stop > start, wxx[stop] - wxx[start] - (wx[stop] - wx[start]) ** 2 / mass, np.inf)
    best, cuts = cost[0].copy(), []
    for _ in range(LEVELS - 1):
        totals = best[:, None] + cost
        cuts.append(totals.argmin(0))
        best = totals.min(0)
    groups, end = [], n
    for cut in reversed(cuts):
        groups.append(slice(int(cut[end]), end))
        end = int(cut[end])
    return [slice(0, end), *reversed(groups)]
