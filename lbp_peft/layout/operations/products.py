"""Rules for matrix products and attention: an output has the position of its row, or of its query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..positions import compact, mix, mix_channels
from .registry import Result, Tracer, rule


@rule("linear")
def _linear(tracer: Tracer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Result:
    return mix_channels(tracer.positions(x), weight.shape[0])


@rule("matmul", "bmm", "mm", "mv", "dot")
def _matmul(tracer: Tracer, a: Tensor, b: Tensor) -> Result:
    """The result has the positions of the rows of a, if they have any, or else those of the columns of b."""
    if a.dim() < 2 or b.dim() < 2:
        return None
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for x, axis in ((a, -1), (b, -2)):
        positions = tracer.positions(x)
        if positions is not None:
            positions = mix(positions, axis)
            if bool((compact(positions) >= 0).any()):
                return positions.expand(shape)
    return None


@rule("addmm", "baddbmm", "addbmm")
def _addmm(tracer: Tracer, bias: Tensor, a: Tensor, b: Tensor, **kwargs: object) -> Result:
    return _matmul(tracer, a, b)


@rule("einsum")
def _einsum(tracer: Tracer, equation: object, *operands: Any) -> Result:
    if not isinstance(equation, str):
        return None
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not output or any("." in term for term in (*terms, output)):
        return None
    sizes = {
        letter: n for term, x in zip(terms, operands, strict=True) for letter, n in zip(term, x.shape, strict=True)
    }
    for term, x in zip(terms, operands, strict=True):
        positions = tracer.positions(x)
        if positions is None or len(set(term)) < len(term):
            continue
        for axis in sorted((i for i, letter in enumerate(term) if letter not in output), reverse=True):
            positions = mix(positions, axis).squeeze(axis)
        if bool((compact(positions) >= 0).any()):
            remaining = [letter for letter in term if letter in output]
            ordered = positions.permute([remaining.index(letter) for letter in output if letter in remaining])
            index = tuple(slice(None) if letter in remaining else None for letter in output)
            return ordered[index].expand([sizes[letter] for letter in output])
    return None


@rule("scaled_dot_product_attention", "flex_attention")
def _attention(tracer: Tracer, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Result:
    """An output has the position of its query, or, in attention between channels, of its column of the values."""
    positions = mix_channels(tracer.positions(query), value.shape[-1])
    if positions is not None and bool((compact(positions) >= 0).any()):
        return positions
    of_values = tracer.positions(value)
    if of_values is None:
        return positions
    of_values = mix(of_values, -2)
    if not bool((compact(of_values) >= 0).any()) or of_values.shape[:-2] != query.shape[:-2]:
        return positions
    return of_values.expand(*query.shape[:-1], value.shape[-1])


@rule("grid_sample", "grid_sampler")
def _grid_sample(tracer: Tracer, x: Tensor, grid: Tensor, *args: object, **kwargs: object) -> Result:
    """An output has the position of the token that chose the places to sample, as in deformable attention."""
    positions = tracer.positions(grid)
    if positions is None:
        return None
    positions = mix(positions, -1).squeeze(-1)[:, None]
    return positions.expand(x.shape[0], x.shape[1], *positions.shape[2:])


@rule("multi_head_attention_forward")
def _multi_head_attention(tracer: Tracer, query: Tensor, *args: object, **kwargs: object) -> Result:
    return [mix_channels(tracer.positions(query), query.shape[-1])]
