"""Projecting axis by axis and by one matrix agree, and neither takes more memory than the tokens."""

import pytest
import reference
import torch
from plans import plan_of
from torch.utils._python_dispatch import TorchDispatchMode

from lbp_peft import BasisSet, TokenLayout, instructions, low_rank_linear
from lbp_peft.bases.grids import TokenOrder
from lbp_peft.formats.products import Precision
from lbp_peft.instructions import Instructions, product_dtype
from lbp_peft.projection import (
    DenseProjection,
    Float32Projection,
    SeparableProjection,
    num_coefficients,
    projection,
)

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout((8, 8)),
    TokenLayout((14, 14), 1),
    TokenLayout((7, 12), 2, 3),
    TokenLayout((24, 32)),  # whole blocks, which are transformed one by one
    TokenLayout((8, 16), order=TokenOrder(reference.unrolled((8, 16), ((2, 2), (2, 2))))),
    TokenLayout((1, 77), 1),
]
BASES = [BasisSet(3), BasisSet(10, selection="lp_linf"), BasisSet(10, boundary="reflect"), BasisSet(36)]


def name(value):
    return f"{value.grid}-{value.num_outside}" if isinstance(value, TokenLayout) else f"{value.r}-{value.boundary}"


def cases():
    for layout in LAYOUTS:
        for bases in BASES:
            if bases.boundary == "orthogonal" or 1 not in layout.grid:  # a single row cannot be reflected
                yield pytest.param(layout, bases, id=f"{name(layout)}-{name(bases)}")


def both(layout, bases, dtype=torch.float64, padding=None):
    return (way(layout, bases, dtype, CPU, padding) for way in (SeparableProjection, DenseProjection))


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("layout, bases", cases())
def test_both_ways_agree(layout, bases):
    by_axis, at_once = both(layout, bases)
    tokens, small = draw(2, layout.num_tokens, 5), draw(2, num_coefficients(layout, bases), 5)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(at_once.project(tokens), by_axis.project(tokens), **close)
    torch.testing.assert_close(at_once.project_gradient(tokens), by_axis.project(tokens), **close)
    torch.testing.assert_close(at_once.lift(small), by_axis.lift(small), **close)
    torch.testing.assert_close(at_once.sum(small), by_axis.sum(small), **close)
    assert at_once.preserves_sums == by_axis.preserves_sums == (bases.boundary == "orthogonal")
    if at_once.preserves_sums:
        torch.testing.assert_close(at_once.sum(at_once.project(tokens)), tokens.sum((0, 1)), **close)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_both_ways_agree_in_other_dtypes(dtype, bound):
    layout, bases = LAYOUTS[1], BASES[0]
    tokens = draw(2, layout.num_tokens, 5, dtype=dtype)
    expected = SeparableProjection(layout, bases, torch.float64, CPU).project(tokens.double())
    for maps in both(layout, bases):
        narrow = maps.of_dtype(dtype)
        same_way = type(maps) if product_dtype(dtype, CPU) == dtype else Float32Projection
        assert type(narrow) is same_way and narrow.of_dtype(dtype) is narrow
        found = narrow.project(tokens)
        assert found.dtype == narrow.lift(found).dtype == dtype
        assert (found.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bases", BASES, ids=name)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not (layout.num_outside or layout.order)], ids=name)
def test_both_ways_agree_on_images(layout, bases, memory_format):
    by_axis, at_once = both(layout, bases)
    image = draw(2, 5, *layout.grid).contiguous(memory_format=memory_format)
    small = draw(2, num_coefficients(layout, bases), 5)
    torch.testing.assert_close(at_once.project_image(image), by_axis.project_image(image))
    torch.testing.assert_close(at_once.lift_image(small), by_axis.lift_image(small))


def test_both_ways_agree_beside_padding():
    layout = TokenLayout((1, 77))
    padding = torch.arange(77) >= torch.tensor([[50], [77]])
    tokens, small = draw(2, 77, 5), draw(2, num_coefficients(layout, BASES[0]), 5)
    by_axis, at_once = both(layout, BASES[0], padding=padding)
    assert not at_once.preserves_sums
    torch.testing.assert_close(at_once.project(tokens), by_axis.project(tokens))
    torch.testing.assert_close(at_once.lift(small), by_axis.lift(small))
    assert at_once.lift(small)[0, 50:].count_nonzero() == 0
    with pytest.raises(RuntimeError, match="padding have a gradient"):
        at_once.project_gradient(tokens)


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 6])
def test_two_images_at_once_give_what_each_gives(batch, decide):
    asked = []
    decide(project_images_in_pairs=lambda *given: asked.append(given) or True)
    layout = TokenLayout((14, 14), 1)
    _, at_once = both(layout, BASES[0])
    tokens = draw(batch, layout.num_tokens, 5)
    expected = torch.einsum("kl,nlc->nkc", at_once.analysis, tokens)
    torch.testing.assert_close(at_once.project(tokens), expected)
    assert bool(asked) == (batch in (2, 6))
    apart = draw(batch, 5, layout.num_tokens).transpose(1, 2)  # these would have to be copied
    torch.testing.assert_close(at_once.project(apart), torch.einsum("kl,nlc->nkc", at_once.analysis, apart))
    assert len(asked) == (batch in (2, 6))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_an_empty_batch_has_no_coefficients(layout, way):
    maps = way(layout, BASES[0], torch.float32, CPU)
    small = maps.project(torch.zeros(0, layout.num_tokens, 5))
    assert small.shape == (0, num_coefficients(layout, BASES[0]), 5)
    assert maps.lift(small).shape == (0, layout.num_tokens, 5)
    assert torch.equal(maps.sum(small), torch.zeros(5))
    if not (layout.num_outside or layout.order):
        assert maps.project_image(torch.zeros(0, 5, *layout.grid)).shape == small.shape
        assert maps.lift_image(small).shape == (0, 5, *layout.grid)


@pytest.mark.parametrize("layout", [TokenLayout((14, 14), 1, 2), LAYOUTS[4]], ids=name)
def test_one_matrix_in_a_compiled_graph(layout, decide):
    decide(use_dense_projection=True)
    torch._dynamo.reset()
    x, weight = draw(2, layout.num_tokens, 6, dtype=torch.float32), draw(4, 6, dtype=torch.float32)
    found = []
    for run in (low_rank_linear, torch.compile(low_rank_linear, backend="aot_eager", fullgraph=True)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        run(*leaves, None, plan=plan_of(layout, BASES[0], BASES[0])).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for compiled, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


# Memory


class Made(TorchDispatchMode):
    """Records the sizes of all new tensors, by operator."""

    def __init__(self):
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        there = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in there:
                self.sizes.append((function.name(), tensor.numel()))
        return result

    def largest(self):
        return max(size for _, size in self.sizes)

    def copies(self):
        names = ("clone", "copy", "contiguous", "_to_copy")
        return [(name, size) for name, size in self.sizes if any(f"::{one}" in name for one in names)]


def there_and_back(maps, on_images):
    """Run all methods of a projection on 40 channels."""
    tokens = torch.randn(2, maps.layout.num_tokens, 40)
    maps.lift(maps.project(tokens))
    if on_images:
        image = torch.randn(2, 40, *maps.layout.grid)
        maps.lift_image(maps.project_image(image))
        maps.project_image(image.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (7, 7), (9, 17), (5, 6), (24, 32), (1, 100)])
@pytest.mark.parametrize("outside", [(0, 0), (1, 2)])
@pytest.mark.parametrize("bases", [*BASES, BasisSet(36, boundary="reflect"), BasisSet(5, 4)], ids=str)
def test_nothing_larger_than_the_tokens_is_made(grid, outside, bases, way):
    if bases.boundary == "reflect" and 1 in grid:
        pytest.skip("a single row cannot be reflected")
    maps = projection(TokenLayout(grid, *outside), bases, torch.float32, CPU)
    if maps is not None:  # as it is where so many bases are kept as there are tokens
        with Made() as made:
            there_and_back(maps, on_images=outside == (0, 0))
        assert made.largest() == 2 * 40 * maps.layout.num_tokens, made.sizes


def test_functions_that_outnumber_the_tokens_are_not_applied_axis_by_axis():
    """14 x 14 patches are padded to 16 x 16 to be reflected; 36 bases a block use all 16 functions along an axis."""
    layout, bases = TokenLayout((14, 14)), BasisSet(36, boundary="reflect")
    assert type(projection(layout, bases, torch.float32, CPU)) is DenseProjection
    with Made() as made:
        SeparableProjection(layout, bases, torch.float32, CPU).project(torch.randn(2, 196, 40))
    assert made.largest() > 2 * 196 * 40
    assert type(projection(layout, BasisSet(36), torch.float32, CPU)) is SeparableProjection


@pytest.mark.parametrize("precision", ["full", "int8", "bf16"])
@pytest.mark.parametrize("for_input", [None, BASES[0]])
def test_contiguous_tokens_are_not_copied(precision, for_input, way, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", lambda: Instructions(bf16=True, int8=True))
    layout = TokenLayout((14, 14), 1)
    x, weight = torch.randn(2, 197, 40, requires_grad=True), torch.randn(48, 40, requires_grad=True)
    with Made() as made:
        y = low_rank_linear(
            x, weight, torch.zeros(48), plan=plan_of(layout, BASES[0], for_input, precision=Precision(precision))
        )
    assert not [copy for copy in made.copies() if copy[1] >= x.numel()]
    grad = torch.randn_like(y)
    with Made() as made:
        torch.autograd.grad(y, (x, weight), grad)
    # This excludes bf16, whose product takes another dtype and makes one.
    allowed = 2 if precision == "bf16" and for_input is None else 0
    assert len([copy for copy in made.copies() if copy[1] >= x.numel()]) == allowed, made.sizes
