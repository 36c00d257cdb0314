"""The products of a backward pass, in low precision.

An exact input gradient dx = g W is the largest product of a step whose weight gradients are low-rank. Rounded to few
bits it keeps its direction, as HLQ found (arXiv 2406.15102), and integer units multiply several times faster. For int8,
with one scale for each row of g and one for each column of W,

    g ~ diag(a) G,   W ~ V diag(b)      G, V integers from -127 to 127
    g W ~ diag(a) (G V) diag(b)         G V summed exactly, in int32

On a device without instructions for a format the same rounded values are multiplied in float32: integers exactly, in
parts whose sums float32 can hold, and bfloat16 up to the order of summation. A format then saves no time, and costs
little more than float32.

An orthogonal matrix R between the two cancels, g W = (g R) (R^T W). A blockwise Hadamard matrix spreads what stands out
in a row over its block, so that it takes less of the range from the others.

Beside it, the small product of the weight gradient is of factors in bfloat16.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn

from .. import kernels
from ..bases.walsh import walsh_functions
from ..bounded import BoundedCache
from ..instructions import multiplies_bf16, multiplies_int8, product_dtype

PRECISIONS = ("full", "bf16", "int8", "fp8")
AUTO = "auto"  # one of them, as [`lbp_peft.heuristics.fastest_precision`] says


@dataclass(frozen=True)
class Precision:
    """How g W is multiplied.

    Attributes:
        name: "full", "bf16", "int8" or "fp8".
        rotation: For int8 and fp8: columns of g that a Hadamard matrix mixes before rounding, a power of two; 0: none.
            Where C_out is no multiple of it, the largest smaller block is taken.
    """

    name: str = "full"
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.name == "full":
            object.__setattr__(self, "rotation", 0)  # one way to say it, so that it equals FULL


FULL = Precision()


_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The factor of a row, _MAX / largest, exceeds float32 where the row is near the smallest normal number. So it is
# applied in two steps, the second a power of two, which leaves the first within range and changes no bit of the result.
_SECOND_FACTOR = {torch.int8: 32.0, torch.float8_e4m3fn: 128.0}
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# Sums of so many products of integers up to 127 are below 2^24: float32 holds them exactly, in whatever order.
_EXACT_TERMS = 2**24 // 127**2
_ROWS_AT_ONCE, _VALUES_AT_ONCE = 400, 2**18
_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Rounded:
    """Values of few bits, and the scales that they are to be multiplied by.

    Attributes:
        values: Shape (M, K), of an 8-bit type, or bfloat16.
        scales: Shape (M, 1) for one scale a row, (1, K) for one a column; None for bfloat16.
    """

    values: Tensor
    scales: Tensor | None


def rounded(matrix: Tensor, dtype: torch.dtype, dim: int) -> Rounded:
    """Round a matrix to 8 bits, with one scale for all values along `dim`; float32 scales.

    Rounding does not depend on the scale of the matrix: down to the smallest normal number of float32, a multiple by a
    power of two has the same values.
    """
    largest = largest_magnitude(matrix, dim)
    if matrix.device.type == "cpu" and dtype == torch.int8 and not torch.compiler.is_compiling():
        values = torch.empty(matrix.shape, dtype=dtype)
        _round_into(values, matrix, largest)
    else:
        scaled = scaled_to_range(matrix, largest, dtype)
        values = (scaled.round_() if dtype == torch.int8 else scaled).to(dtype)
    return Rounded(values, largest / _MAX[dtype])


def _round_into(values: Tensor, matrix: Tensor, largest: Tensor) -> None:
    """Integers for the matrix, of the dtype of `values`, by parts that stay in the cache from one step to the next."""
    at_once = max(_VALUES_AT_ONCE // max(matrix.shape[1], 1), 1)
    scaled = torch.empty(at_once, matrix.shape[1], dtype=torch.float32)
    for start in range(0, len(matrix), at_once):
        part = slice(start, start + at_once)
        found = scaled[: len(values[part])]
        scaled_to_range(matrix[part], largest if len(largest) == 1 else largest[part], torch.int8, out=found)
        values[part] = found.round_()


def largest_magnitude(matrix: Tensor, dim: int) -> Tensor:
    """The largest absolute value along `dim`, which is kept; float32, at least the smallest normal number."""
    largest = torch.maximum(matrix.amax(dim, keepdim=True), matrix.amin(dim, keepdim=True).neg_()).float()
    return largest.clamp_(min=_SMALLEST_NORMAL)  # what is all zero stays zero


def scaled_to_range(matrix: Tensor, largest: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix scaled such that `largest` becomes the largest number of an 8-bit dtype; float32, not yet rounded."""
    second = _SECOND_FACTOR[dtype]
    return torch.mul(matrix, _MAX[dtype] / second / largest, out=out).mul_(second)


def rotated(matrix: Tensor, block: int) -> Tensor:
    """Multiply blocks of columns by a symmetric orthogonal Hadamard matrix; (M, K) -> (M, K), block divides K.

    Of the matrix's dtype, or float32 where the device has no instructions for products in that.
    """
    matrix = matrix.to(product_dtype(matrix.dtype, matrix.device))
    return (matrix.reshape(-1, block) @ _hadamard(block, matrix.dtype, matrix.device)).view_as(matrix)


def _fitting_block(rotation: int, features: int) -> int:
    """The largest block, at most `rotation`, that divides C_out; 1 or 0: no rotation."""
    while rotation > 1 and features % rotation:
        rotation //= 2
    return rotation


def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not torch.compiler.is_compiling():
        return _kept_hadamard(block, dtype, device)
    matrix = torch.ones(1, 1, dtype=dtype, device=device)  # the same once more, since NumPy's steps are not traced
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    sign_changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[sign_changes.argsort()] * block**-0.5


_hadamards: BoundedCache[tuple, Tensor] = BoundedCache(64)


def _kept_hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (block, dtype, device)
    matrix = _hadamards.get(key)
    if matrix is None:
        matrix = torch.from_numpy(walsh_functions(block) * block**-0.5).to(device, dtype)
        if type(matrix) is not Tensor:  # a tracer's fake tensor must not outlive the tracing
            return matrix
        _hadamards[key] = matrix
    return matrix


def product(grad: Tensor, weight: Tensor, precision: Precision, source: Tensor | Origin | None = None) -> Tensor:
    """g W in a precision.

    Args:
        grad: Shape (..., C_out).
        weight: Shape (C_out, C_in), of any floating dtype.
        precision: See [`Precision`].
        source: The parameter that `weight` is, or is a cast or a transpose of, or the [`origin`] of that parameter. On
            CPUs its copy in int8 is kept for as long as it stays the same.

    Returns:
        Shape (..., C_in), of the dtype of `grad`.

    Raises:
        ValueError: the device has no products in fp8.
    """
    name = precision.name
    if name == "full":
        return _product_of_one_dtype(grad, weight.to(grad.dtype))
    check_precision(name, grad.device)
    with without_autocast(grad.device):
        return _product_of_rounded(grad, weight, precision, source)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Where products of float32 are in float32, although backward may be called under autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _product_of_rounded(grad: Tensor, weight: Tensor, precision: Precision, source: Tensor | Origin | None) -> Tensor:
    name = precision.name
    rotation = _fitting_block(precision.rotation, weight.shape[0])
    right = _rounded_weight(weight, name, rotation, source)
    rows = grad.reshape(-1, grad.shape[-1])
    if right.scales is None:
        found = _product_of_one_dtype(rows.to(right.values.dtype), right.values)
    elif rows.device.type == "cpu" and name == "int8" and not torch.compiler.is_compiling():
        found = _int8_product_by_parts(rows, rotation, right)
    else:
        found = rescaled_product(_rounded_rows(rows, rotation, right.values.dtype), right)
    return found.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])


def kept_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """What projected inputs of a dtype are kept in for the weight gradient."""
    return torch.bfloat16 if precision.name != "full" and dtype == torch.float32 else dtype


def weight_grad(g_hat: Tensor, x_hat: Tensor) -> Tensor:
    """The gradient of a weight, (N, k, C_out), (N, k, C_in) -> (C_out, C_in), of the dtype of `g_hat`.

    x_hat may be of a narrower dtype. If products are faster in that dtype, `g_hat` is cast to it.
    """
    left, right = g_hat.flatten(0, 1), x_hat.flatten(0, 1)
    dtype = left.dtype
    if left.dtype != right.dtype and multiplies_bf16(g_hat.device):
        dtype = right.dtype
    columns = left.to(dtype).t()
    if columns.device.type == "cpu" and columns.dtype == torch.bfloat16 and len(columns) < right.shape[1]:
        columns = columns.contiguous()  # the product itself takes longer to transpose them
    return _product_of_one_dtype(columns, right.to(dtype)).to(g_hat.dtype)


def _product_of_one_dtype(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of their dtype; multiplied in float32 where the device has no instructions for it."""
    dtype = product_dtype(left.dtype, left.device)
    if dtype == left.dtype:
        return left @ right
    with without_autocast(left.device):
        return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def _rounded_rows(rows: Tensor, rotation: int, dtype: torch.dtype) -> Rounded:
    if kernels.IN_USE and kernels.serve_rows(rows, rotation):
        return Rounded(*kernels.round_rows(rows, rotation, dtype))
    return rounded(rotated(rows, rotation) if rotation > 1 else rows, dtype, dim=1)


def rescaled_product(left: Rounded, right: Rounded) -> Tensor:
    """(M, K), (K, N) -> (M, N), of values of 8 bits; float32, or bfloat16 for fp8."""
    assert left.scales is not None and right.scales is not None
    if left.values.dtype != torch.int8:
        return _fp8_product(left.values, right.values, left.scales, right.scales)
    return torch.mul(_int_product(left.values, right.values), right.scales).mul_(left.scales)


def _fp8_product(left: Tensor, right: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Of multiples of 16 only, the right factor column by column."""
    (rows, inner), columns = left.shape, right.shape[1]
    if rows == 0:
        return of_rows.new_empty(0, columns, dtype=torch.bfloat16)

    def padded(values: Tensor, pads: tuple[int, ...]) -> Tensor:
        return F.pad(values.view(torch.int8), pads).view(values.dtype)  # all bits zero are zero in either type

    left = padded(left, (0, -inner % 16))
    right = padded(right.t().contiguous(), (0, -inner % 16, 0, -columns % 16)).t()
    of_columns = F.pad(of_columns, (0, -columns % 16))
    found = torch._scaled_mm(left, right, scale_a=of_rows, scale_b=of_columns, out_dtype=torch.bfloat16)
    return found[:, :columns]


def _int8_product_by_parts(rows: Tensor, rotation: int, right: Rounded) -> Tensor:
    """The same for some hundred rows at a time, whose steps in between stay in the cache."""
    assert right.scales is not None
    (num_rows, inner), columns = rows.shape, right.values.shape[1]
    at_once = -(-num_rows // max(round(num_rows / _ROWS_AT_ONCE), 1))
    in_integers = multiplies_int8(rows.device)
    weight = right.values if in_integers else right.values.float()
    product = rows.new_empty(num_rows, columns)
    values = rows.new_empty(at_once, inner, dtype=weight.dtype)
    sums = rows.new_empty(at_once, columns, dtype=torch.int32)
    # Of two dtypes at once all but copies are slow.
    is_wide = rows.dtype == torch.float32
    size = 0 if is_wide else at_once
    wide_rows = rows.new_empty(size, inner, dtype=torch.float32)
    wide_product = rows.new_empty(size, columns, dtype=torch.float32)
    for part, found in zip(rows.split(at_once), product.split(at_once), strict=True):
        n = len(part)
        wide = part if is_wide else wide_rows[:n].copy_(part)
        wide = rotated(wide, rotation) if rotation > 1 else wide
        largest = largest_magnitude(wide, dim=1)
        scaled = found if is_wide else wide_product[:n]
        if in_integers:
            _round_into(values[:n], wide, largest)
            scaled.copy_(torch._int_mm(values[:n], weight, out=sums[:n]))
        else:
            scaled_to_range(wide, largest, torch.int8, out=values[:n]).round_()
            _sum_exactly(values[:n], weight, sums[:n], scaled)
        scaled.mul_(right.scales).mul_(largest / 127)  # the sums of large gradients would leave float32's range
        if not is_wide:
            found.copy_(scaled)
    return product


def _sum_exactly(left: Tensor, right: Tensor, sums: Tensor, result: Tensor) -> None:
    """left @ right of integers in float32 into `result`, as if rounded once; `sums`, int32, is for steps between."""
    inner = left.shape[1]
    torch.mm(left[:, :_EXACT_TERMS], right[:_EXACT_TERMS], out=result)
    if inner <= _EXACT_TERMS:
        return
    sums.copy_(result)
    for start in range(_EXACT_TERMS, inner, _EXACT_TERMS):
        part = slice(start, start + _EXACT_TERMS)
        sums += torch.mm(left[:, part], right[part], out=result).to(torch.int32)
    result.copy_(sums)


def _int_product(left: Tensor, right: Tensor) -> Tensor:
    """int32, or the same integers in float32."""
    (rows, inner), columns = left.shape, right.shape[1]
    if not multiplies_int8(left.device):
        parts = zip(left.float().split(_EXACT_TERMS, 1), right.float().split(_EXACT_TERMS), strict=True)
        sums = [a @ b for a, b in parts]
        return sums[0] if len(sums) == 1 else sum(part.to(torch.int32) for part in sums)
    if left.device.type != "cuda":
        return torch._int_mm(left, right)
    # On GPUs only of more than 16 rows, and of multiples of 8 otherwise.
    left = F.pad(left, (0, -inner % 8, 0, max(17 - rows, 0)))
    right = F.pad(right, (0, -columns % 8, 0, -inner % 8))
    return torch._int_mm(left, right)[:rows, :columns]


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError where a device lacks a precision."""
    if precision == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ValueError(
            f'grad_input_dtype="fp8" needs a GPU of compute capability 8.9 or later; this is {device}. Use "int8" or '
            '"auto".'
        )


class Origin(NamedTuple):
    """Where the values of a parameter lie in memory. It keeps neither the parameter nor its memory alive.

    It refers to the storage and not to the parameter, since a parameter with weak references cannot be swapped, which
    is how `nn.Module.to` and `load_state_dict` may be told to convert parameters (`torch.__future__`).
    """

    storage: Callable[[], UntypedStorage | None]
    offset: int


def origin(source: Tensor | None) -> Origin | None:
    """The origin of a parameter; None for any other tensor, of which no copy is kept."""
    if not isinstance(source, nn.Parameter):
        return None
    return Origin(weakref.ref(source.untyped_storage()), int(source.storage_offset()))


# Rounded copies of weights by storage and offset, with how they were rounded and the fingerprint of what was. They go
# when the storage goes.
_copies: weakref.WeakKeyDictionary[UntypedStorage, dict[int, tuple]] = weakref.WeakKeyDictionary()


def forget(parameters: Iterable[Tensor]) -> None:
    """Free the copies that are kept of these, if any."""
    for parameter in parameters:
        _copies.pop(parameter.untyped_storage(), None)


def _rounded_weight(weight: Tensor, name: str, rotation: int, source: Tensor | Origin | None) -> Rounded:
    # On other devices to wait for a fingerprint would take longer than to round again, and so it does for bf16.
    cheap = weight.device.type != "cpu" or name == "bf16"
    if cheap or torch.compiler.is_compiling():
        return _round_weight(weight, name, rotation)
    place = origin(source) if isinstance(source, Tensor) else source
    storage = None if place is None else place.storage()
    if place is None or storage is None:
        return _round_weight(weight, name, rotation)
    key, fingerprint = (name, rotation, weight.dtype, weight.shape, weight.stride()), _fingerprint(weight)
    copies = _copies.setdefault(storage, {})
    kept = copies.get(place.offset)
    if kept is None or kept[0] != key or not torch.equal(kept[1], fingerprint):
        kept = copies[place.offset] = (key, fingerprint, _round_weight(weight, name, rotation))
    rounded_weight: Rounded = kept[2]
    return rounded_weight


def _fingerprint(weight: Tensor) -> Tensor:
    """Shape (C_in,); changes with the weight.

    Version counter and address do not: PEFT merges adapters by `weight.data += ...`, and some optimisers and sharded
    training write past the counter too.
    """
    return torch.mv(weight.float().t(), torch.from_numpy(_weights_of_rows(len(weight))))


@functools.lru_cache(maxsize=256)
def _weights_of_rows(rows: int) -> np.ndarray:
    """Random numbers from 1 to 2: none leaves a row out, and no pattern among rows cancels."""
    return np.random.default_rng(0).uniform(1, 2, rows).astype(np.float32)


def _round_weight(weight: Tensor, name: str, rotation: int) -> Rounded:
    if name == "bf16":
        return Rounded(weight.to(torch.bfloat16), None)
    if rotation > 1:
        weight = rotated(weight.t(), rotation).t()
    return rounded(weight, _TYPES[name], dim=0)
