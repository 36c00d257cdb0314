"""The mathematics of bases chosen by a layer's inputs and gradients and of ranks by a budget, without PEFT."""

import itertools
import math

import pytest
import reference
import torch
from comparing import problem, relative

from lbp_peft import BackwardPlan, CalibratedBasis, ExactProduct, LayoutError, ListedBasis, TokenLayout, low_rank_linear
from lbp_peft.bases.grids import TokenOrder
from lbp_peft.calibration import Option, TokenStatistics, allocate
from lbp_peft.calibration.selections import KarhunenLoeve, LowHeuristicError, geometric_mean


def walsh_function(i, j, order=8):
    return torch.outer(reference.walsh(order)[i], reference.walsh(order)[j]).flatten() / order


def seen(selection, grid, x, g):
    statistics = TokenStatistics()
    statistics.add(grid, x, g, selection.statistic)
    return statistics


def made_of(functions, sizes, channels=5, batch=3, seed=0):
    """Tokens that are combinations of some functions, shape (N, L, C), with a given size for each."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(batch, len(functions), channels, generator=generator, dtype=torch.float64)
    return torch.einsum("k,kl,nkc->nlc", torch.tensor(sizes, dtype=torch.float64), torch.stack(functions), coefficients)


def test_lhe_weighs_both_factors():
    """(5, 5) carries most of g and (6, 6) most of x, but only (1, 2) and (3, 0) carry a part of both."""
    functions = [walsh_function(*pair) for pair in ((0, 0), (1, 2), (3, 0), (5, 5), (6, 6))]
    x = made_of(functions, [1, 1, 0.5, 1e-3, 10])
    g = made_of(functions, [1, 1, 0.5, 10, 1e-3], seed=1)
    chosen = LowHeuristicError(3).choose(seen(LowHeuristicError(3), (8, 8), x, g))
    assert chosen.pairs == ((0, 0), (1, 2), (3, 0))


def test_lhe_keeps_the_constant_function_where_there_is_nothing_of_it():
    functions = [walsh_function(1, 2), walsh_function(3, 0)]
    statistics = seen(LowHeuristicError(2), (8, 8), made_of(functions, [1, 2]), made_of(functions, [1, 2], seed=1))
    assert LowHeuristicError(2).choose(statistics).pairs == ((0, 0), (3, 0))


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (1, 100)])
def test_the_energies_of_lhe_are_those_of_the_tokens(grid):
    """The functions are orthonormal and complete on any grid, so the energies add up to that of the tokens."""
    x = torch.randn(2, math.prod(grid), 3, dtype=torch.float64)
    energies = LowHeuristicError(4).statistic(x, grid)
    assert energies.shape == (64,)
    assert energies.sum() == pytest.approx(float(x.square().sum()))


def test_lhe_of_a_sequence_chooses_functions_along_it():
    functions = reference.walsh(64)[[0, 37, 11]] / 8
    x = made_of(list(functions), [1, 3, 2])
    assert LowHeuristicError(3).choose(seen(LowHeuristicError(3), (1, 64), x, x)).pairs == ((0, 0), (0, 37), (0, 11))


def test_lhe_refuses_images_and_sequences_together():
    x = torch.randn(2, 64, 3)
    statistics = seen(LowHeuristicError(3), (8, 8), x, x)
    statistics.add((1, 64), x, x, LowHeuristicError(3).statistic)
    with pytest.raises(ValueError, match="both images and sequences"):
        LowHeuristicError(3).choose(statistics)


def test_the_geometric_mean_is_that_of_matrices():
    """It is the only positive definite X with X A^-1 X = B, and has the means of the entries of diagonal matrices."""
    root = torch.randn(6, 6, dtype=torch.float64)
    a, b = root @ root.t() + torch.eye(6), torch.diag(torch.arange(1.0, 7).double())
    a, b = (6 * one / one.trace() for one in (a, b))
    mean = geometric_mean(a, b)
    assert relative(mean @ torch.linalg.inv(a) @ mean, b) < 1e-4
    assert torch.linalg.eigvalsh(mean).min() > 0
    assert relative(geometric_mean(b, 7 * b), b) < 1e-5  # whatever their scales


def test_klt_finds_the_functions_that_both_factors_are_made_of():
    functions = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q.t()
    x = made_of([*functions[:3], functions[10]], [3, 2, 1, 20])
    g = made_of([*functions[:3], functions[11]], [1, 2, 3, 20], seed=1)
    basis = KarhunenLoeve(3).choose(seen(KarhunenLoeve(3), (8, 8), x, g))
    matrix = basis.state()["grid_8x8"].double()
    assert matrix.shape == (3, 64)
    assert relative(matrix.t() @ matrix, functions[:3].t() @ functions[:3]) < 1e-2


@pytest.mark.parametrize("r, grid, kept", [(3, (8, 8), 3), (3, (14, 14), 12), (64, (9, 5), 45), (10, (1, 70), 20)])
def test_klt_keeps_as_many_functions_as_the_walsh_basis(r, grid, kept):
    x = torch.randn(2, math.prod(grid), 3)
    basis = KarhunenLoeve(r).choose(seen(KarhunenLoeve(r), grid, x, x))
    assert basis.num_coefficients(TokenLayout(grid, num_prefix_tokens=1)) == kept + 1


def test_tokens_without_a_gradient_do_not_count():
    """They may be padding, which may have any values."""
    x, g = torch.randn(2, 64, 3), torch.randn(2, 64, 4)
    g[1, 40:] = 0
    spoilt = x.clone()
    spoilt[1, 40:] = float("nan")
    x[1, 40:] = 0
    for selection in (LowHeuristicError(3), KarhunenLoeve(3)):
        found, expected = (seen(selection, (8, 8), one, g) for one in (spoilt, x))
        assert found.is_finite()
        assert torch.equal(found.inputs[8, 8], expected.inputs[8, 8])


def test_tokens_in_another_order_have_the_columns_of_the_basis_in_that_order():
    order = TokenOrder(torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist())
    matrix = torch.linalg.qr(torch.randn(64, 5)).Q.t().contiguous()
    basis, tokens = CalibratedBasis({(8, 8): matrix}), torch.randn(64, 3)
    plain, reordered = TokenLayout((8, 8), 1), TokenLayout((8, 8), 1, order=order)
    given = torch.cat([torch.randn(1, 3), tokens])
    shuffled = torch.cat([given[:1], tokens[list(order)]])
    arguments = torch.float32, torch.device("cpu")
    assert torch.allclose(basis.analysis(reordered, *arguments) @ shuffled, basis.analysis(plain, *arguments) @ given)


def test_a_calibrated_basis_refuses_another_grid_and_names_the_remedy():
    basis = CalibratedBasis({(8, 8): torch.eye(64)[:3], (4, 4): torch.eye(16)[:3]})
    with pytest.raises(LayoutError, match=r"calibrated for grids of 4 x 4, 8 x 8.* 7 x 7.*lbp_peft\.calibrate"):
        basis.num_coefficients(TokenLayout((7, 7)))
    assert basis == CalibratedBasis({(4, 4): torch.eye(16)[:3], (8, 8): torch.eye(64)[:3]})
    assert basis != CalibratedBasis({(8, 8): torch.eye(64)[:3]})


@pytest.mark.parametrize("kind", ["list", "lhe", "klt"])
def test_gradients_are_those_of_projected_tokens(kind):
    """They are compared with dense matrices in float64. The input gradient is exact."""
    grid, prefix = (8, 8), 1
    x, weight, bias, grad = problem(grid, prefix)
    layout = TokenLayout(grid, prefix)
    if kind == "list":
        pairs = [(0, 0), (2, 5), (1, 0)]
        basis, rows = ListedBasis(pairs), torch.stack([walsh_function(*pair) for pair in pairs])
    else:
        selection = (LowHeuristicError if kind == "lhe" else KarhunenLoeve)(5)
        basis = selection.choose(seen(selection, grid, x.detach()[:, 1:], grad[:, 1:]))
        rows = next(iter(basis.state().values())).double()
        rows = torch.stack([walsh_function(*map(int, pair)) for pair in rows]) if kind == "lhe" else rows
    low_rank_linear(x, weight, bias, plan=BackwardPlan(layout, basis, ExactProduct())).backward(grad)

    def smoothed(tokens):
        return torch.cat([tokens[:, :1], torch.einsum("kl,km,nmc->nlc", rows, rows, tokens[:, 1:])], dim=1)

    assert relative(weight.grad, torch.einsum("nlo,nli->oi", smoothed(grad), smoothed(x.detach()))) < 1e-6
    assert relative(x.grad, grad @ weight.detach()) < 1e-12
    assert relative(bias.grad, grad.sum((0, 1))) < 1e-6  # whether or not the basis has the constant function


# Ranks by a budget


def random_options(generator):
    """Some gradients with four options each, ever better and more expensive."""
    rises = torch.rand(3, 4, 3, generator=generator).cumsum(1)
    return {
        key: [Option(rank, c / 4, 10 * m, 10 * a) for rank, (c, m, a) in enumerate(rows.tolist())]
        for key, rows in zip("abc", rises, strict=True)
    }


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bounds", [(1, 0), (0, 1), (1, 1)], ids=["memory", "multiply-adds", "both"])
def test_the_worst_gradient_is_as_good_as_any_choice_within_the_budget_makes_it(seed, bounds):
    options = random_options(torch.Generator().manual_seed(seed))
    most = [40 if bound else math.inf for bound in bounds]

    def fits(choice):
        return sum(o.memory for o in choice) <= most[0] and sum(o.multiply_adds for o in choice) <= most[1]

    choices = [choice for choice in itertools.product(*options.values()) if fits(choice)]
    chosen = allocate(options, *most)
    assert fits(chosen.values())
    assert min(one.cosine for one in chosen.values()) == max(min(one.cosine for one in choice) for choice in choices)
    for key, own in options.items():  # nothing is left over that would pay for more
        better = own[own.index(chosen[key]) + 1 :]
        assert not better or not fits([*(one for other, one in chosen.items() if other != key), better[0]])


def test_a_budget_that_is_too_small_is_refused_with_the_least_that_is_needed():
    options = {key: [Option(1, 0.5, 10, 20), Option(2, 0.6, 20, 40)] for key in "ab"}
    with pytest.raises(ValueError, match="budget of 19 bytes is below 20, which the lowest ranks take"):
        allocate(options, memory=19)
    with pytest.raises(ValueError, match="budget of 39 multiply-adds is below 40"):
        allocate(options, multiply_adds=39)


def test_options_that_are_dearer_and_no_better_are_left_out():
    options = {"a": [Option(1, 0.5, 1), Option(2, 0.4, 2), Option(3, 0.9, 3)]}
    assert allocate(options, memory=2)["a"].rank == 1
    assert allocate(options, memory=3)["a"].rank == 3
