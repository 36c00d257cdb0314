"""A slow implementation of the method, independent of the package: float64, dense matrices, one basis at a time.

It shares no code with lbp_peft. Walsh functions come from the closed formula over the Gray code, cropped bases are
orthonormalised in two dimensions with LAPACK's QR, and reflection is PyTorch's own padding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def walsh(order: int) -> Tensor:
    """Walsh functions. Row i has i sign changes; signs count common bits of t and the bit-reversed Gray code of i."""
    bits = order.bit_length() - 1
    rows = []
    for i in range(order):
        gray = i ^ (i >> 1)
        reverse = int(format(gray, f"0{bits}b")[::-1], 2) if bits else 0
        rows.append([(-1.0) ** bin(reverse & t).count("1") for t in range(order)])
    return torch.tensor(rows, dtype=torch.float64)


def pair_order(selection: str, rows: int, columns: int) -> list[tuple[int, int]]:
    pairs = [(i, j) for i in range(rows) for j in range(columns)]
    if selection == "lp_l1":
        return sorted(pairs, key=lambda p: (p[0] + p[1], p[0]))
    return sorted(pairs, key=lambda p: (max(p), p[0] + p[1], p[0]))


def cuts(side: int, block: int) -> list[tuple[int, int, int]]:
    """The blocks along one side, each as (start, stop, first function value used)."""
    total = math.ceil(side / block) * block
    before = math.ceil((total - side) / 2)
    pieces = []
    for start in range(-before, total - before, block):
        low, high = max(start, 0), min(start + block, side)
        pieces.append((low, high, low - start))
    return pieces


def piece_functions(length: int, offset: int, block: int) -> Tensor:
    if 2 * length > block:
        return walsh(block)[:, offset : offset + length]
    order = 1
    while order < length:
        order *= 2
    offset = math.ceil((order - length) / 2)
    return walsh(order)[:, offset : offset + length]


def orthogonal_bases(grid: tuple[int, int], r: int, block: int = 8, selection: str = "lp_l1") -> Tensor:
    """Orthonormal rows, shape (k, H * W): cropped two-dimensional bases, orthonormalised in their order by QR."""
    height, width = grid
    if 1 in grid:  # a sequence: as many tokens a block
        block = block * block
    rows = []
    for top, bottom, row_offset in cuts(height, block):
        for left, right, column_offset in cuts(width, block):
            vertical = piece_functions(bottom - top, row_offset, block)
            horizontal = piece_functions(right - left, column_offset, block)
            kept: list[Tensor] = []
            for i, j in pair_order(selection, len(vertical), len(horizontal)):
                candidate = torch.outer(vertical[i], horizontal[j]).flatten()
                q, triangle = torch.linalg.qr(torch.stack([*kept, candidate], dim=1))
                if triangle[-1, -1].abs() > 1e-7 and len(kept) < min(r, len(candidate)):
                    kept.append(q[:, -1])
            for basis in kept:
                whole = torch.zeros(height, width, dtype=torch.float64)
                whole[top:bottom, left:right] = basis.view(bottom - top, right - left)
                rows.append(whole.flatten())
    return torch.stack(rows)


def unrolled(grid: tuple[int, int], strides: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """The places of the patches in Hiera's order: those at one place of all blocks, then those at the next place."""

    def gathered(rows: list[list[int]], strides: tuple[tuple[int, int], ...]) -> list[int]:
        if not strides:
            return [place for row in rows for place in row]
        (down, across), *rest = strides
        parts = [[row[j::across] for row in rows[i::down]] for i in range(down) for j in range(across)]
        return [place for part in parts for place in gathered(part, tuple(rest))]

    height, width = grid
    return tuple(gathered([list(range(i * width, (i + 1) * width)) for i in range(height)], strides))


def orthogonal_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, grid, prefix: int, r: int, r_input: int | None, **how
):
    """dW and dx by exact backpropagation, with x and g replaced by their orthogonal projections."""

    def smoothed(tokens: Tensor, rank: int) -> Tensor:
        bases = orthogonal_bases(grid, rank, **how)
        on_grid = torch.einsum("kl,km,nmc->nlc", bases, bases, tokens[:, prefix:])
        return torch.cat([tokens[:, :prefix], on_grid], dim=1)

    grad_weight = torch.einsum("nlo,nli->oi", smoothed(grad, r), smoothed(x, r))
    grad_x = (grad if r_input is None else smoothed(grad, r_input)) @ weight
    return grad_weight, grad_x


def reflect_gradients(x: Tensor, weight: Tensor, grad: Tensor, grid, prefix: int, r: int, r_input: int | None):
    """dW and dx as in the paper's code: padding by reflection, sums of x, means of g, and the lifted result cropped."""
    height, width = grid
    pad_h, pad_w = -height % 8, -width % 8
    pads = (math.ceil(pad_w / 2), pad_w // 2, math.ceil(pad_h / 2), pad_h // 2)
    functions = walsh(8)

    def blocks(tokens: Tensor) -> Tensor:
        """(N, L, C) -> (N, C, block rows, block columns, 8, 8)"""
        image = tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
        image = F.pad(image, pads, mode="reflect")
        return image.unfold(2, 8, 8).unfold(3, 8, 8)

    def coefficients(tokens: Tensor, rank: int, mean: bool) -> Tensor:
        """(N, C, block rows, block columns, rank)"""
        found = []
        for i, j in pair_order("lp_l1", 8, 8)[:rank]:
            products = blocks(tokens) * torch.outer(functions[i], functions[j])
            found.append(products.mean((-1, -2)) if mean else products.sum((-1, -2)))
        return torch.stack(found, dim=-1)

    x_hat, g_hat = coefficients(x, r, mean=False), coefficients(grad, r, mean=True)
    grad_weight = torch.einsum("nohwr,nihwr->oi", g_hat, x_hat)
    grad_weight += torch.einsum("nlo,nli->oi", grad[:, :prefix], x[:, :prefix])
    if r_input is None:
        return grad_weight, grad @ weight
    small = torch.einsum("nohwr,oi->nihwr", coefficients(grad, r_input, mean=True), weight)
    lifted = 0.0
    for index, (i, j) in enumerate(pair_order("lp_l1", 8, 8)[:r_input]):
        lifted = lifted + torch.einsum("nihw,ab->nihawb", small[..., index], torch.outer(functions[i], functions[j]))
    lifted = lifted.flatten(2, 3).flatten(3, 4)
    lifted = lifted[:, :, pads[2] : pads[2] + height, pads[0] : pads[0] + width]
    return grad_weight, torch.cat([grad[:, :prefix] @ weight, lifted.flatten(2).transpose(1, 2)], dim=1)


def adaptive_input_gradient(grad: Tensor, weight: Tensor, start: Tensor, prefix: int = 0, suffix: int = 0) -> Tensor:
    """dx in the span of g g^T S^T, image by image; the orthonormal basis comes from LAPACK's SVD.

    Args:
        grad: Shape (N, L, C_out).
        weight: Shape (C_out, C_in).
        start: S, shape (k, L - prefix - suffix).
        prefix, suffix: Tokens whose gradient is exact.
    """
    images = []
    for g in grad.double():
        inner = g[prefix : len(g) - suffix]
        vectors, values, _ = torch.linalg.svd(inner @ (inner.t() @ start.double().t()), full_matrices=False)
        vectors = vectors[:, values > 1e-10 * values[0]]
        kept = vectors @ (vectors.t() @ inner)
        images.append(torch.cat([g[:prefix], kept, g[len(g) - suffix :]]))
    return torch.stack(images) @ weight.double()
