"""Triton kernels for projecting, lifting and quantizing.

They are used only if the environment variable LBP_PEFT_KERNELS is "triton" when this package is imported. On an H200
they pass their tests and are faster than plain PyTorch on large tensors, see docs/results.md. Plain PyTorch handles
the tensors that they do not support, and is the reference in their tests.

Each kernel is a custom operator with a fake implementation, so that it is one node of a compiled graph, and with a
formula for FLOP counters if it multiplies. The operators take a layout and bases as plain values and look up the tables
that the kernels read, so that compiled graphs contain no tables.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..bases.basis_set import BasisSet
from ..bases.grids import TokenLayout

VARIABLE = "LBP_PEFT_KERNELS"
_asked_for = os.environ.get(VARIABLE, "")
if _asked_for not in ("", "triton"):
    raise ValueError(f'{VARIABLE} is {_asked_for!r}; it must be "triton" or unset.')
IN_USE = _asked_for == "triton"

# Triton decides when it is imported whether it interprets kernels on the CPU or compiles them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if IN_USE:
    try:
        from . import lift, project, quantize  # noqa: F401  importing them registers the operators
    except ModuleNotFoundError as error:
        raise ImportError(f"{VARIABLE}=triton needs triton, which comes with PyTorch's builds for CUDA.") from error

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_BLOCK = 8  # a program keeps a block of 8 x 8 tokens in registers
_HADAMARD_SIZES = (0, 1, 16, 32, 64, 128)
_LARGEST_ROW = 8192  # a program keeps a row in registers


def serve_tokens(tokens: Tensor, layout: TokenLayout, bases: BasisSet, padding_mask: Tensor | None) -> bool:
    """Whether the kernels support projecting tokens (N, L, C), or lifting coefficients (N, k, C)."""
    return _served(tokens) and bases.block_size <= _LARGEST_BLOCK and padding_mask is None and not layout.order


def serve_rows(rows: Tensor, hadamard_size: int) -> bool:
    """Whether the kernel supports rotating and quantizing a matrix (M, K)."""
    return _served(rows) and hadamard_size in _HADAMARD_SIZES and rows.shape[1] <= _LARGEST_ROW


def _served(tensor: Tensor) -> bool:
    return (
        (tensor.is_cuda or INTERPRETED)
        and tensor.dtype in _DTYPES
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not (tensor.requires_grad and torch.is_grad_enabled())  # the operators have no backward pass of their own
    )


def project_tokens(tokens: Tensor, layout: TokenLayout, bases: BasisSet) -> Tensor:
    """(N, L, C) -> (N, k, C), as [`lbp_peft.projection.base.Projection.project`]."""
    return torch.ops.lbp_peft.project(tokens, *_plain(layout, bases))


def lift_coefficients(coefficients: Tensor, layout: TokenLayout, bases: BasisSet) -> Tensor:
    """(N, k, C) -> (N, L, C), as [`lbp_peft.projection.base.Projection.lift`]."""
    return torch.ops.lbp_peft.lift(coefficients, *_plain(layout, bases))


def quantize_rows(rows: Tensor, hadamard_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M, K) -> values (M, K) of 8 bits, scales (M, 1), as [`lbp_peft.formats.base.EightBitFormat.quantize_rows`]."""
    return torch.ops.lbp_peft.quantize_rows(rows, hadamard_size, dtype)


def _plain(layout: TokenLayout, bases: BasisSet) -> tuple:
    """A layout and bases as plain values, the arguments of [`lbp_peft.kernels.blocks.described`]."""
    outside = layout.num_prefix_tokens, layout.num_suffix_tokens
    return layout.grid, *outside, bases.r, bases.block_size, bases.selection, bases.boundary
