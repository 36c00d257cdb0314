"""Derivatives of activation functions in 4 bits."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from test_compress import draw
from torch import nn
from transformers.activations import ACT2FN

from lbp_peft.formats import derivatives
from lbp_peft.formats.derivatives import derivative_table
from lbp_peft.ops.elementwise import elementwise_function

SMOOTH = {
    "gelu": nn.GELU(), "tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "mish": nn.Mish(), "elu": nn.ELU(),
    "celu": nn.CELU(), "selu": nn.SELU(), "hardswish": nn.Hardswish(), "quick": ACT2FN["quick_gelu"],
    "new": ACT2FN["gelu_new"],
}  # fmt: skip
PIECES = {"relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.3), "relu6": nn.ReLU6(), "linear": ACT2FN["linear"]}


def exact_gradient(function, x, grad):
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(function(x), x, grad.double())[0]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smooth_functions(name, dtype):
    function, table = SMOOTH[name], derivative_table(SMOOTH[name])
    x, grad = (2 * draw(3, 40, 50)).to(dtype).requires_grad_(), draw(3, 40, 50, seed=1).to(dtype)
    y = elementwise_function(function, x, table)
    assert torch.equal(y, function(x))
    (found,) = torch.autograd.grad(y, x, grad)
    expected = exact_gradient(function, x, grad)
    assert found.dtype == dtype and found.shape == x.shape
    assert 1e-3 < (found.double() - expected).norm() / expected.norm() < 0.08
    ratio = (found.double() * expected).sum() / expected.square().sum()
    assert abs(ratio - 1) < 0.01  # on average, it is neither too large nor too small


@pytest.mark.parametrize("name", PIECES)
def test_of_functions_of_straight_pieces_nothing_is_lost(name):
    function, table = PIECES[name], derivative_table(PIECES[name])
    x = torch.cat((3 * draw(1000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]))).requires_grad_()
    grad = draw(*x.shape, seed=1)
    (found,) = torch.autograd.grad(elementwise_function(function, x, table), x, grad)
    torch.testing.assert_close(found, torch.autograd.grad(function(x), x, grad)[0])


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000, 2**17 + 3])
@pytest.mark.parametrize("values_at_once", [2, 2**17])
def test_codes_are_those_of_the_cells(size, values_at_once, monkeypatch):
    if size > 1000 * values_at_once:
        pytest.skip("too many parts")
    monkeypatch.setattr(derivatives, "_VALUES_AT_ONCE", values_at_once)
    table, x = derivative_table(nn.GELU()), 2 * draw(size)
    packed = table.pack(x)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-size // 2),)
    cells = np.ceil((x * table.cells_per_unit).numpy()).clip(-128, 127).astype(int) + 128
    expected = table.levels.astype(np.float32)[table.codes[cells]]
    found = table.times_derivative(torch.ones(size), packed)
    assert np.array_equal(found.numpy(), expected)
    grad = draw(size, seed=2).double()
    torch.testing.assert_close(table.times_derivative(grad, packed), grad * torch.from_numpy(expected))


def test_the_compiler_packs_and_unpacks_the_same(monkeypatch):
    table, x, grad = derivative_table(nn.SiLU()), 3 * draw(5, 33), draw(5, 33, seed=1)
    packed, found = table.pack(x), table.times_derivative(grad, table.pack(x))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(table.pack(x), packed) and torch.equal(table.times_derivative(grad, packed), found)


def test_what_is_no_number_does_no_harm():
    table = derivative_table(nn.GELU())
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    found = table.times_derivative(torch.ones(4), table.pack(x))
    assert found[1:3].tolist() == pytest.approx([1, 0], abs=0.02)


@pytest.mark.parametrize("function", [ACT2FN["relu2"], nn.Softmax(0), torch.square, nn.Softsign(), torch.sin])
def test_functions_without_a_table(function):
    table = derivative_table(function)
    assert table is None or function is not torch.square


def test_levels_are_the_best_sixteen():
    """No random cut of the values into as many runs is better."""
    random = np.random.default_rng(0)
    values, weights = np.sort(random.normal(size=60)), random.uniform(0.1, 1, 60)

    def error(groups):
        means = [np.average(values[g], weights=weights[g]) for g in groups]
        return sum((weights[g] * (values[g] - m) ** 2).sum() for g, m in zip(groups, means, strict=True))

    best = derivatives._best_groups(values, weights)
    assert len(best) == 16 and best[0].start == 0 and best[-1].stop == 60
    assert all(a.stop == b.start for a, b in itertools.pairwise(best))
    for _ in range(200):
        cuts = [0, *sorted(random.choice(np.arange(1, 60), 15, replace=False)), 60]
        assert error(best) <= error([slice(a, b) for a, b in itertools.pairwise(cuts)]) + 1e-12


def test_second_derivatives_are_refused_and_tables_can_be_copied():
    table = derivative_table(nn.GELU())
    x = draw(2, 64).requires_grad_()
    (first,) = torch.autograd.grad(elementwise_function(nn.GELU(), x, table).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    for again in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(again.pack(x.detach()), table.pack(x.detach()))
