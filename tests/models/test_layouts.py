"""Tokens that are not row by row after a prefix: before others, unrolled, in a sequence, with padding among them."""

import pytest
import reference
import torch
import torch.nn.functional as F
from comparing import problem, relative
from plans import plan_of

from lbp_peft import BasisSet, TokenLayout, low_rank_linear
from lbp_peft.bases.grids import TokenOrder
from lbp_peft.bases.packed import PackedLayout

pytestmark = pytest.mark.usefixtures("way")

RANKS = [(3, 3), (10, None), (10, 3)]


def found_gradients(x, weight, bias, grad, layout, ranks, wanted=None, **how):
    for_weight, for_input = (None if r is None else BasisSet(r) for r in ranks)
    y = low_rank_linear(x, weight, bias, plan=plan_of(layout, for_weight, for_input, **how))
    assert torch.equal(y, F.linear(x, weight, bias))
    return torch.autograd.grad(y, (weight, x if wanted is None else wanted, bias), grad)


def through(bases, x, weight, grad, rank_input):
    """Run exact backpropagation with x and g replaced by their projections, which depend on the rank."""

    def smoothed(tokens, rank):
        matrix = bases(rank)
        return torch.einsum("kl,km,nmc->nlc", matrix, matrix, tokens)

    rank, rank_in = rank_input
    grad_weight = torch.einsum("nlo,nli->oi", smoothed(grad, rank), smoothed(x, rank))
    return grad_weight, (grad if rank_in is None else smoothed(grad, rank_in)) @ weight


def among(matrix, before=0, after=0):
    """The bases of a grid, and those of the single tokens before and after it."""
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


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    "grid, strides", [((8, 8), ((2, 2),)), ((16, 24), ((2, 2), (2, 2))), ((8, 12), ((4, 2), (2, 2)))]
)
def test_unrolled_patches(grid, strides, ranks):
    x, weight, bias, grad = problem(grid, 0)
    order = reference.unrolled(grid, strides)
    found = found_gradients(x, weight, bias, grad, TokenLayout(grid, order=TokenOrder(order)), ranks)
    expected = through(
        lambda r: reference.orthogonal_bases(grid, r)[:, order], x.detach(), weight.detach(), grad, ranks
    )
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12
    assert relative(found[2], grad.sum((0, 1))) < 1e-12


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("axes, packed", [((0,), 1), ((1, 2), 1), ((0, 2), 1), ((3, 1), 1), ((0,), 3), ((2, 0), 2)])
def test_tokens_along_other_axes(axes, packed, ranks):
    """Sequence-first inputs, windows of five and six axes and packed images have the gradients of the usual layout."""
    grid, tokens_of_axes = (6, 8), {1: [48 * packed], 2: [6 * packed, 8]}[len(axes)]
    num_axes = max(max(axes) + 1, 3) if axes != (0,) else 2
    order = [*(axis for axis in range(num_axes) if axis not in axes), *axes]
    images = [2 if axis not in axes else 0 for axis in order[: num_axes - len(axes)]]
    x, weight, bias, grad = problem(grid, 0)
    count = 2 ** len(images) * packed
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(count, 48, t.shape[-1], generator=generator, dtype=torch.float64) for t in (x, grad))
    x.requires_grad_()
    expected = found_gradients(x, weight, bias, grad, TokenLayout(grid), ranks)

    def spread(tokens):
        whole = tokens.reshape(*images, *tokens_of_axes, tokens.shape[-1])
        return whole.permute(*(order.index(axis) for axis in range(num_axes)), -1)

    layout = TokenLayout(grid, axes=axes, packed=packed)
    found = found_gradients(spread(x), weight, bias, spread(grad), layout, ranks, wanted=x)
    for ours, usual in zip(found, expected, strict=True):
        assert relative(ours, usual) < 1e-12


PARTS = {
    "images of three sizes": (TokenLayout((8, 12)), TokenLayout((4, 8)), TokenLayout((16, 9))),
    "tokens beside each": (TokenLayout((8, 8), 1), TokenLayout((6, 4), 2, 3)),
    "in units of two": (
        TokenLayout((8, 8), order=TokenOrder(reference.unrolled((8, 8), ((2, 2),)))),
        TokenLayout((4, 8), order=TokenOrder(reference.unrolled((4, 8), ((2, 2),)))),
    ),
    "one of few tokens": (TokenLayout((1, 2)), TokenLayout((9, 9))),
}


def of_parts(parts, rank):
    """Block-diagonal bases of several grids, one after another."""

    def of(part):
        rows = reference.orthogonal_bases(part.grid, rank)
        rows = rows if part.order is None else rows[:, list(part.order)]
        return among(rows, part.num_prefix_tokens, part.num_suffix_tokens)

    return torch.block_diag(*map(of, parts))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("name", PARTS)
def test_several_grids_one_after_another(name, axes, ranks):
    parts = PARTS[name]
    layout = PackedLayout.of(parts, axes)
    x, weight, bias, grad = problem((1, layout.num_tokens), 0)
    expected = through(lambda r: of_parts(parts, r), x.detach(), weight.detach(), grad, ranks)
    if axes is not None:  # (L, N, C)
        x, grad = x.detach().transpose(0, 1).requires_grad_(), grad.transpose(0, 1)
    found = found_gradients(x, weight, bias, grad, layout, ranks)
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1] if axes is None else found[1].transpose(0, 1), expected[1]) < 1e-12
    assert relative(found[2], grad.sum((0, 1))) < 1e-12


def test_padding_among_several_grids():
    layout = PackedLayout.of((TokenLayout((1, 20)), TokenLayout((1, 30))))
    x, weight, bias, grad = problem((1, 50), 0)
    padding = (torch.arange(50) % 20 > 14).expand(2, -1)
    grad = grad.masked_fill(padding[..., None], 0)
    x_kept = x.detach().masked_fill(padding[..., None], 0)
    found = found_gradients(x, weight, bias, grad, layout, (3, None), padding_mask=padding)
    expected = through(lambda r: of_parts(layout.parts, r), x_kept, weight.detach(), grad, (3, None))
    assert relative(found[0], expected[0]) < 1e-12 and relative(found[1], expected[1]) < 1e-12


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
    found = found_gradients(x, weight, bias, grad, TokenLayout((1, length)), ranks, padding_mask=padding)
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
    y = low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((1, 40)), BasisSet(3), padding_mask=padding))
    with pytest.raises(RuntimeError, match="padding have a gradient.*exclude_modules"):
        torch.autograd.grad(y, weight, grad)


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout((8, 8), 1, 4),
        TokenLayout((8, 16), order=TokenOrder(reference.unrolled((8, 16), ((2, 2), (2, 2))))),
        TokenLayout((1, 77)),
    ],
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
