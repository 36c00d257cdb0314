"""Tokens elsewhere than row by row behind a prefix: after the grid, unrolled, in a sequence, padding among them."""

import pytest
import reference
import torch
import torch.nn.functional as F
from test_lowrank import problem, relative

from lbp_peft import BasisSet, TokenLayout, low_rank_linear
from lbp_peft.bases import unrolled_order

pytestmark = pytest.mark.usefixtures("way")

RANKS = [(3, 3), (10, None), (10, 3)]


def found_gradients(x, weight, bias, grad, layout, ranks, **how):
    for_weight, for_input = (None if r is None else BasisSet(r) for r in ranks)
    y = low_rank_linear(x, weight, bias, layout, for_weight, for_input, **how)
    assert torch.equal(y, F.linear(x, weight, bias))
    return torch.autograd.grad(y, (weight, x, bias), grad)


def through(bases, x, weight, grad, rank_input):
    """Exact backpropagation with x and g replaced by their projections on a function of the rank."""

    def smoothed(tokens, rank):
        matrix = bases(rank)
        return torch.einsum("kl,km,nmc->nlc", matrix, matrix, tokens)

    rank, rank_in = rank_input
    grad_weight = torch.einsum("nlo,nli->oi", smoothed(grad, rank), smoothed(x, rank))
    return grad_weight, (grad if rank_in is None else smoothed(grad, rank_in)) @ weight


def among(matrix, before=0, after=0):
    """Bases of a grid, with those of single tokens before and after it."""
    return torch.block_diag(torch.eye(before), matrix, torch.eye(after)).to(torch.float64)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("before, after", [(0, 3), (1, 5)])
@pytest.mark.parametrize("grid", [(8, 8), (7, 12), (24, 8)])
def test_tokens_after_the_grid(grid, before, after, ranks):
    x, weight, bias, grad = problem(grid, before + after)
    found = found_gradients(x, weight, bias, grad, TokenLayout(grid, before, after), ranks)
    expected = through(
        lambda r: among(reference.orthogonal_bases(grid, r), before, after), x.detach(), weight.detach(), grad, ranks
    )
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12
    assert relative(found[2], grad.sum((0, 1))) < 1e-12


def unroll(image, strides):
    """(H, W, C) -> (H W, C), written with loops: the patches at one place of all blocks, then the next place."""
    if not strides:
        return image.flatten(0, 1)
    (down, across), *rest = strides
    return torch.cat([unroll(image[i::down, j::across], rest) for i in range(down) for j in range(across)])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    "grid, strides", [((8, 8), ((2, 2),)), ((16, 24), ((2, 2), (2, 2))), ((8, 12), ((4, 2), (2, 2)))]
)
def test_unrolled_patches(grid, strides, ranks):
    x, weight, bias, grad = problem(grid, 0)
    places = torch.arange(grid[0] * grid[1]).view(*grid, 1)
    order = unroll(places, strides)[:, 0]
    assert order.tolist() == unrolled_order(TokenLayout(grid, unrolled=strides)).tolist()
    found = found_gradients(x, weight, bias, grad, TokenLayout(grid, unrolled=strides), ranks)
    expected = through(
        lambda r: reference.orthogonal_bases(grid, r)[:, order], x.detach(), weight.detach(), grad, ranks
    )
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12
    assert relative(found[2], grad.sum((0, 1))) < 1e-12


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("length", [9, 64, 77, 200])
def test_a_sequence_has_blocks_as_long_as_square_ones_have_tokens(length, ranks):
    x, weight, bias, grad = problem((1, length), 0)
    found = found_gradients(x, weight, bias, grad, TokenLayout((1, length)), ranks)
    expected = through(lambda r: reference.orthogonal_bases((1, length), r), x.detach(), weight.detach(), grad, ranks)
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12


@pytest.mark.parametrize("ranks", RANKS)
def test_padding_is_taken_as_zero(ranks):
    length = 40
    x, weight, bias, grad = problem((1, length), 0)
    padding = torch.arange(length) >= torch.tensor([[25], [40]])
    grad = grad.masked_fill(padding[..., None], 0)
    found = found_gradients(x, weight, bias, grad, TokenLayout((1, length)), ranks, padding=padding)
    expected = through(
        lambda r: reference.orthogonal_bases((1, length), r),
        x.detach().masked_fill(padding[..., None], 0),
        weight.detach(),
        grad,
        ranks,
    )
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1].masked_fill(padding[..., None], 0)) < 1e-12
    assert relative(found[2], grad.sum((0, 1))) < 1e-12


def test_a_loss_that_depends_on_padding_is_refused():
    x, weight, bias, grad = problem((1, 40), 0)
    padding = torch.arange(40).expand(2, 40) >= 30
    y = low_rank_linear(x, weight, bias, TokenLayout((1, 40)), BasisSet(3), padding=padding)
    with pytest.raises(RuntimeError, match="padding have a gradient.*exclude_modules"):
        torch.autograd.grad(y, weight, grad)


@pytest.mark.parametrize(
    "layout",
    [TokenLayout((8, 8), 1, 4), TokenLayout((8, 16), unrolled=((2, 2), (2, 2))), TokenLayout((1, 77))],
    ids=["after", "unrolled", "sequence"],
)
def test_projecting_what_was_lifted_changes_nothing_and_all_bases_keep_everything(layout, way):
    generator = torch.Generator().manual_seed(0)
    some = way(layout, BasisSet(5), torch.float64, torch.device("cpu"))
    k = some.project(torch.zeros(1, layout.num_tokens, 1, dtype=torch.float64)).shape[1]
    z = torch.randn(2, k, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(some.project(some.lift(z)), z, rtol=0, atol=1e-12)
    all_bases = way(layout, BasisSet(64), torch.float64, torch.device("cpu"))
    x = torch.randn(2, layout.num_tokens, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(all_bases.lift(all_bases.project(x)), x, rtol=0, atol=1e-12)
