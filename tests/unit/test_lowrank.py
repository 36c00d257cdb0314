"""The layer's gradients equal those of the float64 reference, and at full rank those of exact backpropagation."""

import contextlib
import threading

import pytest
import reference
import torch
import torch.nn.functional as F
from comparing import problem, relative
from plans import plan_of

from lbp_peft import BackwardPlan, BasisSet, TokenLayout, instructions, low_rank_linear
from lbp_peft.formats.products import Precision
from lbp_peft.instructions import Instructions
from lbp_peft.ops.branches import Branch
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv
from lbp_peft.ops.saved_input import shared_projections

GRIDS = [(8, 8), (16, 16), (14, 14), (7, 7), (4, 12), (24, 32)]
PREFIXES = [0, 1, 2, 5]
# Rank of the weight gradient, rank of the input gradient (None: exact).
RANKS = [(3, 3), (10, None), (10, 3), (3, 21), (64, 64), (64, 10)]


def _added_to_a_slice(y):
    y[:, 0] += y[:, 1]
    return y


INPLACE = {
    "mul": lambda y: y.mul_(2),
    "sigmoid": lambda y: y.sigmoid_(),
    "relu": torch.relu_,
    "slice": _added_to_a_slice,
    "view": lambda y: y.flatten(1).mul_(3).view_as(y),
}


def bases_of(rank, **how):
    return None if rank is None else BasisSet(rank, **how)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("boundary", ["orthogonal", "reflect"])
@pytest.mark.usefixtures("way")
def test_gradients_are_the_references(boundary, grid, prefix, ranks):
    if boundary == "reflect" and min(grid) < 5 and -min(grid) % 8 // 2 >= min(grid):
        pytest.skip("the grid is too short to be reflected")
    x, weight, bias, grad = problem(grid, prefix)
    layout = TokenLayout(grid, prefix)
    y = low_rank_linear(x, weight, bias, plan=plan_of(layout, *(bases_of(r, boundary=boundary) for r in ranks)))
    assert torch.equal(y, F.linear(x, weight, bias))
    found = torch.autograd.grad(y, (weight, x, bias), grad)
    gradients = reference.reflect_gradients if boundary == "reflect" else reference.orthogonal_gradients
    expected = gradients(x.detach(), weight.detach(), grad, grid, prefix, *ranks)
    if boundary == "reflect" and 64 in ranks:
        # Padded bases at full rank outnumber the tokens: the package then takes the exact gradient instead.
        exact = torch.autograd.grad(F.linear(x, weight, bias), (weight, x), grad)
        expected = tuple(e if rank == 64 else r for e, r, rank in zip(exact, expected, ranks, strict=True))
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12
    assert relative(found[2], grad.sum((0, 1))) < 1e-12


@pytest.mark.parametrize("selection", ["lp_l1", "lp_linf"])
@pytest.mark.parametrize("block_size", [4, 8, 16])
@pytest.mark.usefixtures("way")
def test_other_blocks_and_selections(selection, block_size):
    grid, prefix = (14, 10), 1
    x, weight, bias, grad = problem(grid, prefix)
    bases = BasisSet(5, block_size, selection)
    y = low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout(grid, prefix), bases, bases))
    found = torch.autograd.grad(y, (weight, x), grad)
    expected = reference.orthogonal_gradients(
        x.detach(), weight.detach(), grad, grid, prefix, 5, 5, block=block_size, selection=selection
    )
    assert max(relative(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid", [*GRIDS, (9, 17), (5, 3), (6, 10)])
def test_full_rank_is_exact_backpropagation(grid, prefix, way):
    """Gradients go through the projections themselves, not the shortcut that skips them at full rank."""
    from lbp_peft.ops.linear import _LowRankLinear, _State

    x, weight, bias, grad = problem(grid, prefix)
    full = way(TokenLayout(grid, prefix), BasisSet(64), torch.float64, x.device)
    state = _State(BackwardPlan(), full, full, ())
    found = torch.autograd.grad(_LowRankLinear.apply(state, x, weight, bias), (x, weight, bias), grad)
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    assert max(relative(f, e) for f, e in zip(found, exact, strict=True)) < 1e-12


def test_channels_last_input_is_a_grid():
    grid = (7, 12)
    x, weight, bias, grad = problem(grid, 0)
    bases = BasisSet(3)
    expected = torch.autograd.grad(
        low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout(grid), bases, bases)), (x, weight, bias), grad
    )
    y = low_rank_linear(x.unflatten(1, grid), weight, bias, plan=plan_of(TokenLayout(grid), bases, bases))
    assert y.shape == (2, 7, 12, 4)
    found = torch.autograd.grad(y, (x, weight, bias), grad.unflatten(1, grid))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", ["full", "int8", "bf16"])
@pytest.mark.parametrize("for_input", [None, BasisSet(3)])
@pytest.mark.usefixtures("way")
def test_an_empty_batch_has_gradients_of_zero(for_input, precision):
    x, weight, bias, _ = problem((8, 8), 1, torch.float32)
    x = x.detach()[:0].requires_grad_()
    y = low_rank_linear(
        x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3), for_input, precision=Precision(precision))
    )
    found = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert found[0].shape == x.shape and not any(g.count_nonzero() for g in found)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_input_and_gradient_need_not_be_contiguous(layout):
    x, weight, bias, grad = problem((8, 8), 1)
    bases = BasisSet(10)
    expected = torch.autograd.grad(
        low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), bases, bases)), (x, weight), grad
    )

    def rearranged(t):
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.cat([t, t], dim=2)[..., : t.shape[2]]
        return t

    grad = grad if layout != "expanded" else torch.ones(1, 1, 4, dtype=grad.dtype).expand_as(grad)
    if layout == "expanded":
        y = low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), bases, bases))
        expected = torch.autograd.grad(y, (x, weight), grad.contiguous())
    y = low_rank_linear(rearranged(x), weight, bias, plan=plan_of(TokenLayout((8, 8), 1), bases, bases))
    found = torch.autograd.grad(y, (x, weight), rearranged(grad))
    assert max(relative(f, e) for f, e in zip(found, expected, strict=True)) < 1e-14


def saved_by(function):
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return y, shapes


@pytest.mark.parametrize("for_input", [None, BasisSet(3)])
def test_only_the_projected_input_is_saved(for_input):
    x, weight, bias, _ = problem((8, 8), 1)
    _, shapes = saved_by(
        lambda: low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3), for_input))
    )
    assert sorted(shapes) == [(2, 4, 6), (4, 6)]


def test_nothing_is_done_for_gradients_that_are_not_needed():
    x, weight, bias, grad = problem((8, 8), 1)
    layout, bases = TokenLayout((8, 8), 1), BasisSet(3)
    _, shapes = saved_by(lambda: low_rank_linear(x.detach(), weight, bias, plan=plan_of(layout, bases, bases)))
    assert shapes == [(2, 4, 6)]
    y, shapes = saved_by(lambda: low_rank_linear(x, weight.detach(), bias.detach(), plan=plan_of(layout, bases, bases)))
    assert shapes == [(4, 6)]
    (found,) = torch.autograd.grad(y, x, grad)
    expected = reference.orthogonal_gradients(x.detach(), weight.detach(), grad, (8, 8), 1, 3, 3)[1]
    assert relative(found, expected) < 1e-12


@pytest.fixture
def projected(way, monkeypatch):
    """The tensors that are projected, in order."""
    seen, project = [], way.project
    monkeypatch.setattr(way, "project", lambda maps, t: seen.append(t) or project(maps, t))
    return seen


def test_query_key_and_value_share_one_projection(projected):
    """They receive the same tensor. Nothing is shared with other tensors, other bases, or after a change in place."""
    x, weight, bias, grad = problem((8, 8), 1)
    layout, hidden = TokenLayout((8, 8), 1), x * 1
    with shared_projections():
        ys, shapes = saved_by(
            lambda: [low_rank_linear(hidden, weight, bias, plan=plan_of(layout, BasisSet(3))) for _ in "qkv"]
        )
    assert len(projected) == 1 and shapes.count((2, 4, 6)) == 3
    found = torch.autograd.grad(sum(ys), weight, grad)[0]
    once = torch.autograd.grad(
        low_rank_linear(hidden.clone(), weight, bias, plan=plan_of(layout, BasisSet(3))), weight, grad
    )[0]
    assert relative(found, 3 * once) < 1e-14

    projected.clear()
    with shared_projections():
        low_rank_linear(hidden, weight, bias, plan=plan_of(layout, BasisSet(6)))
        before = low_rank_linear(hidden.detach(), weight, bias, plan=plan_of(layout, BasisSet(3)))
        changed = hidden.detach()
        low_rank_linear(changed, weight, bias, plan=plan_of(layout, BasisSet(3)))
        changed.mul_(2)
        after = low_rank_linear(changed, weight, bias, plan=plan_of(layout, BasisSet(3)))
    assert len(projected) == 4
    gradients = [torch.autograd.grad(y, weight, grad)[0] for y in (before, after)]
    assert relative(gradients[1], 2 * gradients[0]) < 1e-14


def test_under_autocast_too_they_share_one_projection(projected, monkeypatch):
    # Without instructions for bfloat16 each projection is one of float32 inside another.
    monkeypatch.setattr(instructions, "of_cpu", lambda: Instructions(bf16=True))
    x, weight, bias, _ = problem((8, 8), 1, torch.float32)
    hidden = x * 1
    with shared_projections():
        with torch.autocast("cpu", torch.bfloat16):
            ys = [
                low_rank_linear(hidden, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3))) for _ in "qkv"
            ]
        assert len(ys) == 3 and len(projected) == 1 and projected[0].dtype == torch.bfloat16
        low_rank_linear(hidden, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3)))
    assert len(projected) == 2 and projected[1].dtype == torch.float32


def test_a_projection_is_shared_within_one_block_of_one_thread_only(projected):
    x, weight, bias, _ = problem((8, 8), 1)
    hidden = x * 1

    def run():
        return low_rank_linear(hidden, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3)))

    kept = [run(), run()]
    assert len(projected) == 2
    with pytest.raises(KeyError), shared_projections():
        kept.append(run())
        with shared_projections():  # of a module inside
            kept += [run(), run()]
        assert len(projected) == 4
        kept.append(run())  # the outer one goes on
        thread = threading.Thread(target=lambda: kept.append(run()))
        thread.start()
        thread.join()
        assert len(projected) == 5
        raise KeyError
    kept += [run(), run()]
    assert len(projected) == 7


CHANGES = {
    "in place": lambda x, new: x.copy_(new),
    "data in place": lambda x, new: x.data.copy_(new),
    "data": lambda x, new: setattr(x, "data", new.clone()),
    "numpy": lambda x, new: x.numpy().__setitem__(..., new.numpy()),
    "storage": lambda x, new: x.untyped_storage().copy_(new.untyped_storage()),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_input_that_has_changed_is_projected_again(change, shared):
    """It is so too if no version counter shows the change, from one forward pass of the owning module to the next."""
    x, weight, bias, grad = problem((8, 8), 1)
    x, new = x.detach(), torch.randn(2, 65, 6, generator=torch.Generator().manual_seed(7), dtype=x.dtype)

    def run(x):
        with shared_projections() if shared else contextlib.nullcontext():
            return low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3)))

    first = run(x)
    expected = torch.autograd.grad(run(new.clone()), weight, grad)[0]
    change(x, new)
    assert torch.equal(torch.autograd.grad(run(x), weight, grad)[0], expected)
    assert not torch.equal(torch.autograd.grad(first, weight, grad)[0], expected)


@pytest.mark.parametrize("grid", [None, (8, 8)])
@pytest.mark.parametrize("kind", ["linear", "branches", "autocast", "conv", "no bias"])
@pytest.mark.parametrize("change", INPLACE.values(), ids=INPLACE)
def test_an_output_may_be_changed_in_place(change, kind, grid):
    x, weight, bias, grad = problem((8, 8), 0, torch.float32)
    x, grad = (t if grid is None else t.unflatten(1, grid) for t in (x, grad))
    layout, bases = TokenLayout((8, 8)), BasisSet(10)
    down, up = torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)

    def run(changed):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            if kind == "conv":
                y = low_rank_pointwise_conv(
                    x.movedim(-1, 1), weight.view(4, 6, *[1] * (x.dim() - 2)), bias, plan=plan_of(layout, bases, bases)
                ).movedim(1, -1)
            else:
                branches = [Branch(down, up)] if kind == "branches" else []
                y = low_rank_linear(
                    x,
                    weight,
                    None if kind == "no bias" else bias,
                    plan=plan_of(layout, bases, bases),
                    branches=branches,
                )
            y = changed(y)
        return torch.autograd.grad(y, (x, weight, *([down, up] if kind == "branches" else [])), grad.to(y.dtype))

    found, expected = run(change), run(lambda y: change(y.clone()))
    bound = 1e-2 if kind == "autocast" else 1e-5  # because of strides that the copy does not have
    assert all(relative(f, e) < bound for f, e in zip(found, expected, strict=True))
    assert relative(found[1], run(lambda y: y)[1]) > 0.02


def test_second_derivative_is_refused_with_the_remedy():
    x, weight, bias, _ = problem((8, 8), 1)
    y = low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3)))
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*exact_backward"):
        grad_x.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(dtype):
    x, weight, bias, grad = problem((8, 8), 1, torch.float32, channels=(64, 32))
    layout, bases = TokenLayout((8, 8), 1), BasisSet(10)
    reference_grads = torch.autograd.grad(
        low_rank_linear(x, weight, bias, plan=plan_of(layout, bases, bases)), (x, weight, bias), grad
    )
    with torch.autocast("cpu", dtype):
        y = low_rank_linear(x, weight, bias, plan=plan_of(layout, bases, bases))
        plain = F.linear(x, weight, bias)
    assert y.dtype == dtype and torch.equal(y, plain)
    found = torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))
    assert all(f.dtype == torch.float32 for f in found)
    # No further off than plain autocast is from its own float32 gradients, give or take the projections' rounding.
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    rounded = torch.autograd.grad(plain, (x, weight, bias), grad.to(dtype))
    for f, r, plain_f, plain_r in zip(found, reference_grads, rounded, exact, strict=True):
        assert relative(f, r) < 3 * relative(plain_f, plain_r)


@pytest.mark.parametrize("for_weight", [None, BasisSet(3)])
def test_autocast_keeps_no_copy_of_a_weight(for_weight):
    """A copy would be as large as many inputs; it only exists during the pass that needs it."""
    x, _, bias, grad = problem((8, 8), 1, torch.float32, channels=(64, 32))
    weight = torch.nn.Parameter(torch.randn(32, 64))
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), for_weight, BasisSet(3)))
        plain = F.linear(x, weight, bias)
    assert next(t.data_ptr() for t in kept if t.shape == weight.shape) == weight.data_ptr()
    found = torch.autograd.grad(y, weight, grad.to(torch.bfloat16))[0]
    exact = torch.autograd.grad(plain, weight, grad.to(torch.bfloat16))[0]
    assert found.dtype == torch.float32
    if for_weight is None:
        assert torch.equal(found, exact)


def test_float64_is_left_alone_by_autocast():
    x, weight, bias, _ = problem((8, 8), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(3))).dtype == torch.float64
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_cuda_agrees_with_the_reference(dtype, bound):
    x, weight, bias, grad = problem((14, 14), 1, channels=(64, 48))
    expected = reference.orthogonal_gradients(x.detach(), weight.detach(), grad, (14, 14), 1, 10, 3)
    x, weight, bias = (t.detach().to("cuda", dtype).requires_grad_() for t in (x, weight, bias))
    y = low_rank_linear(x, weight, bias, plan=plan_of(TokenLayout((14, 14), 1), BasisSet(10), BasisSet(3)))
    found = torch.autograd.grad(y, (weight, x), grad.to("cuda", dtype))
    assert max(relative(f.cpu(), e) for f, e in zip(found, expected, strict=True)) < bound
