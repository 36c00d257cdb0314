"""Walsh functions, their selection, and the bases on any grid."""

import numpy as np
import pytest
import reference
import torch

from lbp_peft import BasisSet, LayoutError, TokenLayout
from lbp_peft.bases.separable import axis_blocks, grid_bases, num_bases
from lbp_peft.bases.walsh import basis_order, walsh_functions
from lbp_peft.projection import DenseProjection, SeparableProjection, num_coefficients, projection

GRIDS = [(8, 8), (16, 16), (14, 14), (7, 7), (4, 12), (9, 17), (3, 5), (2, 2), (1, 24), (6, 10)]
RANKS = [1, 3, 7, 10, 36, 64]


@pytest.mark.parametrize("order", [1, 2, 4, 8, 16])
def test_walsh_functions_are_in_sequency_order(order):
    functions = walsh_functions(order)
    assert (np.diff(functions, axis=1) != 0).sum(axis=1).tolist() == list(range(order))
    assert np.array_equal(functions @ functions.T, order * np.eye(order))
    # Orthogonal and with i sign changes each: so they agree with the reference up to sign.
    assert np.array_equal(np.abs(functions @ reference.walsh(order).numpy().T), order * np.eye(order))


def test_walsh_functions_refuse_other_orders():
    with pytest.raises(ValueError, match="powers of two"):
        walsh_functions(6)


@pytest.mark.parametrize("n", range(1, 9))
def test_selections_of_the_paper(n):
    assert set(basis_order("lp_l1", range(8), range(8))[: n * (n + 1) // 2]) == {
        (i, j) for i in range(n) for j in range(n - i)
    }
    assert set(basis_order("lp_linf", range(8), range(8))[: n * n]) == {(i, j) for i in range(n) for j in range(n)}


def test_ties_are_broken_as_documented():
    assert basis_order("lp_l1", range(8), range(8))[:6] == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0)]
    assert basis_order("lp_linf", range(8), range(8))[:9] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip
    assert basis_order("lp_l1", (0, 3), (0, 1)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match="lp_l1, lp_linf"):
        basis_order("lhe", range(8), range(8))


@pytest.mark.parametrize("selection", ["lp_l1", "lp_linf"])
def test_selections_keep_simpler_functions_first(selection):
    """This is why orthonormalising along each axis is enough (see lbp_peft.bases.separable)."""
    order = basis_order(selection, range(8), range(8))
    place = {pair: index for index, pair in enumerate(order)}
    assert all(place[a, b] <= place[i, j] for i, j in order for a in range(i + 1) for b in range(j + 1))


@pytest.mark.parametrize("selection", ["lp_l1", "lp_linf"])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_bases_are_orthonormal_and_span_what_the_cropped_bases_span(grid, r, selection):
    rows = torch.from_numpy(grid_bases(grid, BasisSet(r, selection=selection)).dense_analysis())
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-12
    projector = rows.T @ rows
    assert (projector @ projector - projector).abs().max() < 1e-12
    expected = reference.orthogonal_bases(grid, r, selection=selection)
    assert (projector - expected.T @ expected).abs().max() < 1e-10
    assert len(rows) == len(expected) == num_bases(grid, BasisSet(r, selection=selection))


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("grid", GRIDS)
def test_full_rank_is_the_identity(grid, block_size):
    rows = grid_bases(grid, BasisSet(block_size**2, block_size)).dense_analysis()
    assert len(rows) == grid[0] * grid[1]
    assert np.abs(rows.T @ rows - np.eye(len(rows))).max() < 1e-12


def test_sides_are_cut_as_the_reference_code_cuts_them():
    def lengths(side):
        return [int((block.synthesis != 0).any(axis=0).sum()) for block in axis_blocks(side, 8, "orthogonal")]

    assert [lengths(side) for side in (14, 12, 7, 4, 9, 17)] == [[7, 7], [6, 6], [7], [4], [4, 5], [4, 8, 5]]


def test_whole_blocks_have_entries_exact_in_every_precision():
    rows = grid_bases((16, 8), BasisSet(64)).dense_analysis()
    assert set(np.unique(np.abs(rows))) == {0.0, 0.125}


def test_reflection_needs_enough_patches_to_reflect():
    with pytest.raises(LayoutError, match='too short.*boundary="orthogonal"'):
        num_bases((3, 8), BasisSet(10, boundary="reflect"))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.usefixtures("way")
def test_projection_and_lift_are_the_dense_matrices(grid, prefix):
    layout, bases = TokenLayout(grid, prefix), BasisSet(3)
    tokens = torch.randn(2, layout.num_tokens, 5, dtype=torch.float64)
    maps = projection(layout, bases, torch.float64, tokens.device)
    if maps is None:  # a grid too small to gain anything on
        assert num_coefficients(layout, bases) == layout.num_tokens
        return
    rows = torch.from_numpy(grid_bases(grid, bases).dense_analysis())
    dense = torch.block_diag(torch.eye(prefix, dtype=torch.float64), rows)
    small = maps.project(tokens)
    assert small.shape == (2, num_coefficients(layout, bases), 5)
    torch.testing.assert_close(small, dense @ tokens, rtol=0, atol=1e-12)
    torch.testing.assert_close(maps.lift(small), dense.T @ small, rtol=0, atol=1e-12)
    torch.testing.assert_close(maps.project(maps.lift(small)), small, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["row_analysis", "analysis"])
def test_bases_are_built_once_per_layout_dtype_and_device(name):
    def matrix(r=3, dtype=torch.float32):
        way = DenseProjection if name == "analysis" else SeparableProjection
        return getattr(way(TokenLayout((8, 8), 1), BasisSet(r), dtype, torch.device("cpu")), name)

    assert matrix().data_ptr() == matrix().data_ptr()
    assert matrix(dtype=torch.float64).data_ptr() != matrix().data_ptr()
    assert matrix(r=6).data_ptr() != matrix().data_ptr()


def test_projections_made_under_fake_tensors_do_not_outlive_them(way):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = TokenLayout((8, 24), 3)
    with FakeTensorMode():
        projection(layout, BasisSet(5), torch.float32, torch.device("cpu"))
    real = projection(layout, BasisSet(5), torch.float32, torch.device("cpu"))
    assert type(real.analysis if way is DenseProjection else real.kept) is torch.Tensor
