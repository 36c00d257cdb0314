"""Listed and dense bases give the gradients of float64, also for the bias where no constant function is kept."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from models import gradients, images, layers_of, tiny_vit
from peft import get_peft_model
from torch import nn

from lbp_peft import (
    BackwardPlan,
    BasisSet,
    DenseBasis,
    FixedBasis,
    LayoutError,
    LBPWHTConfig,
    ListedBasis,
    TokenLayout,
    low_rank_linear,
)
from lbp_peft.bases import walsh
from lbp_peft.bases.grids import TokenOrder
from lbp_peft.bases.separable import grid_bases
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv
from lbp_peft.ops.recompute import low_rank_layer
from lbp_peft.projection import DenseProjection, SeparableProjection, projection

CPU = torch.device("cpu")


def listed_rows(pairs, grid, block=8):
    """The listed functions on a grid of whole blocks, as orthonormal rows; independent of the package."""
    functions = reference.walsh(block) / block**0.5
    rows = []
    for top in range(0, grid[0], block):
        for left in range(0, grid[1], block):
            for i, j in pairs:
                whole = torch.zeros(grid, dtype=torch.float64)
                whole[top : top + block, left : left + block] = torch.outer(functions[i], functions[j])
                rows.append(whole.flatten())
    return torch.stack(rows)


def orthonormal(k, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(tokens, k, dtype=torch.float64, generator=generator)).Q.T


def with_constant(k, tokens):
    first = torch.ones(tokens, 1, dtype=torch.float64)
    others = torch.randn(tokens, k - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(torch.cat((first, others), 1)).Q.T


ON_GRID = TokenLayout((8, 16), 1, 2)
PAIRS, WITHOUT_CONSTANT = ((0, 0), (0, 1), (3, 2), (7, 0)), ((0, 1), (2, 3))
# A basis, a layout, and the orthonormal rows over the grid that it stands for.
KINDS = {
    "listed": (ListedBasis(PAIRS), ON_GRID, listed_rows(PAIRS, (8, 16))),
    "listed, no constant": (ListedBasis(WITHOUT_CONSTANT), ON_GRID, listed_rows(WITHOUT_CONSTANT, (8, 16))),
    "listed, blocks of 4": (ListedBasis(PAIRS[:3], 4), TokenLayout((16, 12)), listed_rows(PAIRS[:3], (16, 12), 4)),
    "dense": (DenseBasis(orthonormal(5, 128)), ON_GRID, orthonormal(5, 128)),
    "dense, constant": (DenseBasis(with_constant(5, 128)), ON_GRID, with_constant(5, 128)),
    "dense, all tokens": (DenseBasis(orthonormal(5, 131)), ON_GRID, orthonormal(5, 131)),
}


def whole(rows, layout):
    """Rows over the grid, extended by the tokens outside it, shape (k, L)."""
    if rows.shape[1] == layout.num_tokens:
        return rows
    eyes = (torch.eye(n, dtype=torch.float64) for n in (layout.num_prefix_tokens, layout.num_suffix_tokens))
    before, after = eyes
    return torch.block_diag(before, rows, after)


def problem(layout):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, layout.num_tokens, 6), (4, 6), (4,), (2, layout.num_tokens, 4)
    tensors = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


@pytest.mark.parametrize("operation", ["linear", "conv", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_projected_tokens(kind, operation):
    basis, layout, rows = KINDS[kind]
    rows = whole(rows, layout)
    x, weight, bias, grad = problem(layout)
    plan = BackwardPlan(layout, basis, FixedBasis(basis))
    if operation == "linear":
        y = low_rank_linear(x, weight, bias, plan=plan)
    elif operation == "conv":
        y = low_rank_pointwise_conv(x.mT, weight[..., None], bias, plan=plan).mT
    else:
        layer = nn.Linear(6, 4, dtype=torch.float64)
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        weight, bias = layer.weight, layer.bias
        y = low_rank_layer(layer, x, plan=plan)
    assert torch.equal(y, F.linear(x, weight, bias)) or operation != "linear"
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    x_hat, g_hat = (torch.einsum("kl,nlc->nkc", rows, t) for t in (x.detach(), grad))
    expected = (
        torch.einsum("kl,nko,oi->nli", rows, g_hat, weight.detach()),
        torch.einsum("nko,nki->oi", g_hat, x_hat),
        grad.sum((0, 1)),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_preserved_only_if_the_constant_is_kept(kind):
    basis, layout, rows = KINDS[kind]
    ones = torch.ones(rows.shape[1], dtype=torch.float64)
    has_constant = bool(torch.allclose(rows.T @ (rows @ ones), ones))
    assert basis.preserves_sums(layout) == has_constant == (kind in WITH_CONSTANT)


WITH_CONSTANT = ("listed", "listed, blocks of 4", "dense, constant")


def test_a_list_in_the_order_of_a_selection_is_that_selection():
    """This also holds on grids with cropped blocks."""
    pairs = [(i, j) for i, j in walsh.basis_order("lp_l1", range(8), range(8))[:6]]
    for grid in ((14, 14), (8, 8), (9, 17)):
        listed, selected = grid_bases(grid, ListedBasis(pairs)), grid_bases(grid, BasisSet(6))
        if grid != (9, 17):  # blocks of 4 keep other functions there: of those listed, fewer exist
            assert (listed.dense_analysis() == selected.dense_analysis()).all()
        rows = torch.from_numpy(listed.dense_analysis())
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)


def test_both_projections_of_a_listed_basis_agree():
    layout = TokenLayout((24, 8), order=TokenOrder(reversed(range(192))))
    tokens = torch.randn(3, 192, 5, dtype=torch.float64)
    ways = [kind(layout, ListedBasis(PAIRS), torch.float64, CPU) for kind in (SeparableProjection, DenseProjection)]
    one, other = (way.project(tokens) for way in ways)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(*(way.lift(one) for way in ways))


@pytest.mark.parametrize("basis", [ListedBasis(PAIRS), DenseBasis(orthonormal(5, 64))], ids=["listed", "dense"])
def test_in_a_compiled_graph(basis):
    torch._dynamo.reset()
    plan = BackwardPlan(TokenLayout((8, 8), 1), basis, FixedBasis(basis))
    x, weight = torch.randn(2, 65, 6), torch.randn(4, 6)

    def run(x, weight):
        return low_rank_linear(x, weight, plan=plan)

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for compiled, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_a_model_trains_with_a_dense_basis_in_each_layer():
    """At one below full rank it is near exact backpropagation, and only the rules decide which basis is used."""
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=10, grad_input_dtype="full")).train()
    exact = get_peft_model(tiny_vit(), LBPWHTConfig(r=64, grad_input_dtype="full")).train()
    for number, layer in enumerate(layers_of(model).values()):
        rule = layer.lbpwht_rule["default"]
        layer.lbpwht_rule["default"] = type(rule)(DenseBasis(orthonormal(63, 64, number)), rule.input_gradient)
    found, expected = gradients(model, images()), gradients(exact, images())
    dot = sum((found[name] * expected[name]).sum() for name in expected)
    norms = [sum(g.square().sum() for g in some.values()).sqrt() for some in (found, expected)]
    assert 0.97 < dot / (norms[0] * norms[1]) < 0.99999
    assert {layer.last_backward.grad_weight_rows for layer in layers_of(model).values()} == {64}


# What is refused


@pytest.mark.parametrize("pairs, message", [
    ([], "at least one pair"),
    ([(8, 0)], r"no pair \(8, 0\)"),
    ([(0, 64)], r"no pair \(0, 64\)"),
    ([(1, 64)], r"no pair \(1, 64\)"),
    ([(0, -1)], "no pair"),
    ([(0, 0), (1, 1), (0, 0)], r"\(0, 0\).*twice"),
])  # fmt: skip
def test_lists_without_sense_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        ListedBasis(pairs)


def test_a_list_none_of_which_exists_on_a_block_is_refused():
    with pytest.raises(LayoutError, match=r"none of the listed.*3 x 8.*\(0, 0\)"):
        ListedBasis(((5, 5),)).num_coefficients(TokenLayout((3, 8)))


def test_sequences_take_pairs_without_rows():
    basis = ListedBasis(((0, 0), (0, 40), (1, 1)))
    assert basis.num_coefficients(TokenLayout((1, 64))) == 2


@pytest.mark.parametrize("matrix, message", [
    (torch.eye(4).flatten(), "is a matrix"),
    (torch.randn(5, 4), "is a matrix"),
    (torch.ones(2, 4), "must be orthonormal.*qr"),
    (torch.full((1, 4), float("nan")), "must be orthonormal"),
])  # fmt: skip
def test_matrices_that_are_no_bases_are_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        DenseBasis(matrix)


def test_a_dense_basis_for_other_images_is_refused():
    with pytest.raises(LayoutError, match="has 64 tokens, but it has 197, of which 196"):
        projection(TokenLayout((14, 14), 1), DenseBasis(orthonormal(3, 64)), torch.float32, CPU)


def test_a_dense_basis_saves_its_matrix():
    matrix = orthonormal(3, 64)
    basis = DenseBasis(matrix)
    assert torch.equal(basis.state()["matrix"], matrix) and BasisSet(3).state() == {}
    matrix.zero_()  # it keeps a copy
    assert basis.analysis(TokenLayout((8, 8)), torch.float64, CPU).any()


def test_a_selection_whose_order_is_not_monotone_is_refused(monkeypatch):
    """Cropped functions would span another space, and the constant would not come first."""
    monkeypatch.setitem(walsh._KEYS, "high_first", lambda i, j: (-i - j,))
    with pytest.raises(ValueError, match=r"high_first.*before \(.*lower sequency"):
        grid_bases((8, 8), BasisSet(3, selection="high_first"))
