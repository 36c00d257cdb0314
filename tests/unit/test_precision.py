"""Input gradients whose product g W is rounded: the arithmetic, the copies of W that are kept, and the layers."""

import copy
import gc

import numpy as np
import pytest
import torch
from comparing import cosine
from mixers import ConvMLP, Mixer
from models import forward, gradients, images, input_gradient, largest_difference, layers_of, tiny_vit
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lbp_peft import LBPWHTConfig, exact_backward, instructions, layout_report
from lbp_peft.formats import bf16, full, hadamard, int8, products, weight_cache
from lbp_peft.formats.base import NumberFormat, Quantized
from lbp_peft.formats.hadamard import rotate
from lbp_peft.formats.products import FULL, Precision, product, weight_grad
from lbp_peft.formats.registry import FORMATS
from lbp_peft.instructions import Instructions


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(matrix, dtype, dim):
    """Quantize in the 8-bit format whose values have a given dtype."""
    return FORMATS["int8" if dtype == torch.int8 else "fp8"].quantize(matrix, dim)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def by_hand(g, weight):
    """Compute g (M, K) times the weight (K, N), both float64, in integers with NumPy."""

    def integers(matrix, axis):
        step = np.abs(matrix).max(axis, keepdims=True) / 127
        return np.rint(matrix / step).astype(np.int64), step

    (left, rows), (right, columns) = integers(g, 1), integers(weight, 0)
    return (left @ right) * rows * columns


@pytest.mark.parametrize("rows", [1, 40, 399, 401, 1000])
def test_the_int8_product_is_that_of_integers(rows):
    g, weight = draw(rows, 48), draw(48, 24, seed=1)
    expected = torch.from_numpy(by_hand(g.double().numpy(), weight.double().numpy()))
    found = product(g, weight, Precision("int8"))
    # A value that lies on the border between two integers may be rounded to either.
    assert relative(found, expected) < 1e-3
    assert (found - expected).abs().max() < 0.05
    assert relative(found, g.double() @ weight.double()) < 0.015
    assert product(g.unflatten(0, (1, rows)), weight, Precision("int8")).shape == (1, rows, 24)


@pytest.mark.parametrize("name, bound", [("bf16", 0.005), ("int8", 0.015)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [0, 16, 64])
def test_products_keep_their_direction(name, bound, dtype, rotation):
    g, weight = draw(2, 50, 96, dtype=dtype), draw(96, 32, seed=1, dtype=dtype)
    found = product(g, weight, Precision(name, rotation))
    assert found.dtype == dtype
    assert relative(found, g.double() @ weight.double()) < bound


@pytest.mark.parametrize("name", ["full", "bf16", "int8"])
@pytest.mark.parametrize("rotation", [0, 16])
def test_a_product_of_no_rows(name, rotation):
    found = product(draw(0, 5, 32), draw(32, 8), Precision(name, rotation))
    assert found.shape == (0, 5, 8) and found.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 0, 8), (2, 3, 5, 8)])
def test_the_matrix_of_a_product_is_not_copied_for_each_image(shape):
    """As PyTorch does where the rows of an image do not lie beside those of the next one."""
    rows = draw(*shape[:-2], 9, shape[-1])[..., : shape[-2], :]
    matrix = draw(8, 6)
    operations = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function)
            return function(*args, **kwargs or {})

    with Noting():
        found = product(rows, matrix, FULL)
    assert torch.ops.aten.mm.default in operations and torch.ops.aten.bmm.default not in operations
    torch.testing.assert_close(found, rows @ matrix)


def test_zeros_stay_zero():
    g = draw(4, 16)
    g[1] = 0
    found = product(g, torch.zeros(16, 8), Precision("int8"))
    assert torch.equal(found, torch.zeros(4, 8))
    assert torch.equal(product(g, draw(16, 8), Precision("int8"))[1], torch.zeros(8))


def test_a_rotation_cancels_and_spreads_outliers():
    g, weight = draw(64, 128), draw(128, 32, seed=1)
    turned = rotate(g, 64) @ rotate(weight.t(), 64).t()
    torch.testing.assert_close(turned, g @ weight, rtol=1e-4, atol=1e-4)
    g[:, 5] *= 300
    weight[5] /= 300
    expected = g.double() @ weight.double()
    errors = [relative(product(g, weight, Precision("int8", rotation)), expected) for rotation in (0, 16, 128)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


@pytest.mark.parametrize("block", [2, 16, 128])
def test_the_rotation_is_the_same_where_it_is_compiled(block, monkeypatch):
    expected = hadamard._hadamard(block, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(hadamard._hadamard(block, torch.float32, torch.device("cpu")), expected)


@pytest.mark.parametrize("features, block", [(96, 32), (100, 4), (7, 1), (256, 128)])
def test_the_rotation_fits_the_outputs(features, block):
    assert hadamard.fitting_size(128, features) == block
    g, weight = draw(20, features), draw(features, 6, seed=1)
    assert relative(product(g, weight, Precision("int8", 128)), g.double() @ weight.double()) < 0.03


def test_fp8_needs_a_device_that_has_it():
    with pytest.raises(ValueError, match='fp8.*compute capability 8.9.*"auto"'):
        product(draw(4, 16), draw(16, 16), Precision("fp8"))


@pytest.mark.parametrize("rows, inner, columns", [(32, 64, 16), (5, 40, 24), (33, 7, 50), (1, 16, 1)])
def test_fp8_products_of_any_size(rows, inner, columns, monkeypatch):
    """GPUs accept only multiples of 16, and the right factor column by column."""
    plain = torch._scaled_mm

    def checked(a, b, **settings):
        assert not any(side % 16 for side in (a.shape[1], *b.shape)) and b.stride(0) == 1
        return plain(a, b, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    g, weight = draw(rows, inner), draw(inner, columns, seed=1)
    left, right = quantized(g, torch.float8_e4m3fn, 1), quantized(weight, torch.float8_e4m3fn, 0)
    assert isinstance(left, Quantized) and left.values.dtype == torch.float8_e4m3fn
    try:
        found = FORMATS["fp8"].multiply_quantized(left, right)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no fp8 product on this CPU: {error}".splitlines()[0])
    assert found.shape == (rows, columns)
    assert relative(found, g.double() @ weight.double()) < 0.05


# Rounding at any scale


def of_few_bits(*shape, dtype):
    """Multiples of 1/128 up to 1 in each row and column: no dtype loses their bits near its smallest normal number."""
    matrix = (draw(*shape) * 40).round().clamp(-127, 127) / 128
    matrix[:, 0] = matrix[0] = 1
    return matrix.to(dtype)


SMALLEST = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}


@pytest.mark.parametrize("dtype", SMALLEST)
@pytest.mark.parametrize("into", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("compiling", [True, False])
def test_rounding_is_the_same_at_every_scale(dtype, into, dim, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    matrix = of_few_bits(20, 48, dtype=dtype)
    expected = quantized(matrix, into, dim)
    largest = 15 if dtype == torch.float16 else 127
    for exponent in (*range(SMALLEST[dtype], SMALLEST[dtype] + 8), -10, 0, 10, largest):
        found = quantized(matrix * 2.0**exponent, into, dim)
        assert torch.equal(found.values.view(torch.int8), expected.values.view(torch.int8)), exponent
        torch.testing.assert_close(found.scales.double(), expected.scales.double() * 2.0**exponent, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", SMALLEST)
@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("found", [Instructions(), Instructions(int8=True)])
@pytest.mark.parametrize("compiling", [True, False])
def test_int8_products_are_the_same_at_every_scale_of_the_gradient(dtype, rotation, found, compiling, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", lambda: found)
    monkeypatch.setattr(torch, "_int_mm", exactly)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    g, weight = of_few_bits(20, 48, dtype=dtype), draw(48, 32, seed=1)
    for exponent in (SMALLEST[dtype], SMALLEST[dtype] + 3, -10, 10):
        larger = 2.0 ** (20 if exponent < -100 else 0)  # results are within the range of the dtype
        result = product(g * 2.0**exponent, weight * larger, Precision("int8", rotation)).double() / larger
        expected = (g.double() @ weight.double()) * 2.0**exponent
        assert relative(result, expected) < 0.02, exponent


@pytest.mark.parametrize("found", [Instructions(), Instructions(int8=True)])
@pytest.mark.parametrize("compiling", [True, False])
def test_int8_products_overflow_only_where_their_results_do(found, compiling, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", lambda: found)
    monkeypatch.setattr(torch, "_int_mm", exactly)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    g, weight = draw(20, 48), draw(48, 32, seed=1) * 0.02
    result = product(g * 2.0**124, weight, Precision("int8")).double()
    assert relative(result, (g.double() @ weight.double()) * 2.0**124) < 0.02


def test_int8_products_are_the_same_at_every_scale_of_the_weight():
    g, weight = draw(20, 48), of_few_bits(48, 32, dtype=torch.float32)
    expected = product(g, weight, Precision("int8"))
    for exponent in (-126, -120, -100, 100):
        found = product(g * 16, weight * 2.0**exponent, Precision("int8"))
        torch.testing.assert_close(found.double(), expected.double() * 2.0 ** (exponent + 4), rtol=1e-4, atol=0)


def test_rows_of_all_scales_are_rounded_each_by_itself():
    g = of_few_bits(20, 48, dtype=torch.float32)
    scales = torch.tensor([2.0**-126, 1e-30, 1.0, 1e30, 0.0]).repeat(4)[:, None]
    found = quantized(g * scales, torch.int8, 1)
    assert torch.equal(found.values[scales[:, 0] > 0], quantized(g, torch.int8, 1).values[scales[:, 0] > 0])
    assert (found.values[scales[:, 0] == 0] == 0).all() and found.scales.isfinite().all()


# On a device without instructions for a format


def exactly(left, right, out=None):
    """The result of an exact `torch._int_mm`, which it need not be on this machine."""
    found = (left.double() @ right.double()).to(torch.int32)
    return found if out is None else out.copy_(found)


@pytest.mark.parametrize("inner", [1, 48, 1040, 1041, 3200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("compiling", [True, False])
def test_without_instructions_int8_gives_the_same_bits(inner, dtype, rotation, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    g, weight = draw(450, inner, dtype=dtype), draw(inner, 24, seed=1)
    g[0] = weight[:, 0] = 1  # all 127: sums beyond 2^24, with bits that float32 has to round
    g[1, :-1] = weight[:-1, 1] = 0.999

    def found(has):
        monkeypatch.setattr(instructions, "of_cpu", lambda: Instructions(int8=has))
        monkeypatch.setattr(torch, "_int_mm", exactly if has else None)  # not called
        return product(g, weight, Precision("int8", rotation))

    assert torch.equal(found(False), found(True))


def test_sums_of_integers_do_not_depend_on_the_order():
    """These are the largest sums for which float32 is used."""
    terms = int8._EXACT_TERMS
    assert terms == 1040 and 127**2 * terms < 2**24
    left, right = torch.full((3, terms), 127.0), torch.full((terms, 5), -127.0)
    right[-1] = -126  # an odd number: of this size only exact sums hit it
    assert (left @ right == -(127**2 * (terms - 1) + 127 * 126)).all()


class Products(TorchDispatchMode):
    """Records the dtypes in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("mm", "bmm", "addmm", "_int_mm", "mv")):
            self.dtypes.add(args[-1].dtype)
        return function(*args, **kwargs or {})


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ["full", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("autocast", [True, False])
def test_without_instructions_everything_is_multiplied_in_float32(name, dtype, autocast, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", Instructions)
    g, weight = draw(2, 40, 96, dtype=dtype), draw(96, 32, seed=1, dtype=dtype)
    expected = product(g, weight, Precision(name, 16))
    if autocast and dtype == torch.float32 and name == "full":
        return  # that is plain PyTorch's product, autocast included
    with Products() as products, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = product(g, weight, Precision(name, 16))
    assert products.dtypes == {torch.float32}
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_without_instructions_bf16_and_full_give_the_numbers_of_their_format(dtype, monkeypatch):
    g, weight = draw(40, 96, dtype=dtype), draw(96, 32, seed=1, dtype=dtype)
    in_format = (g.to(torch.bfloat16).double() @ weight.to(torch.bfloat16).double()).float()
    monkeypatch.setattr(instructions, "of_cpu", Instructions)
    found = product(g, weight, Precision("bf16"))
    assert torch.equal(found, found.to(torch.bfloat16).to(dtype))  # rounded to bfloat16, as by bfloat16 instructions
    torch.testing.assert_close(found.float(), in_format, rtol=2**-8, atol=1e-5)
    exact = (g.double() @ weight.double()).float()
    torch.testing.assert_close(product(g, weight, FULL).float(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", NARROW)
def test_without_instructions_weight_gradients_are_multiplied_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", Instructions)
    grad, x = draw(2, 11, 24, dtype=dtype), draw(2, 11, 32, seed=1, dtype=dtype)
    with Products() as products:
        found = weight_grad(grad, x)
    assert products.dtypes == {torch.float32} and found.dtype == dtype
    expected = torch.einsum("nko,nki->oi", grad.double(), x.double()).float()
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)


# What is kept of W


@pytest.fixture
def roundings(monkeypatch):
    """The shapes of the weights that were rounded."""
    seen, plain = [], NumberFormat.quantize_weight

    def counting(number_format, weight, hadamard_size):
        seen.append(tuple(weight.shape))
        return plain(number_format, weight, hadamard_size)

    monkeypatch.setattr(NumberFormat, "quantize_weight", counting)
    return seen


def test_a_weight_is_rounded_again_only_when_it_has_changed(roundings):
    g, weight = draw(10, 16), torch.nn.Parameter(draw(16, 8, seed=1))
    with torch.no_grad():
        first, again = (product(g, weight, Precision("int8"), weight) for _ in range(2))
        assert torch.equal(first, again) and len(roundings) == 1
        weight.mul_(2)
        torch.testing.assert_close(product(g, weight, Precision("int8"), weight), 2 * first)
        weight.data = -weight.data
        torch.testing.assert_close(product(g, weight, Precision("int8"), weight), -2 * first)
        assert len(roundings) == 3
        product(g, weight, Precision("int8", 16), weight)
        product(g, weight, Precision("bf16"), weight)
        assert len(roundings) == 5


@pytest.mark.parametrize("features", [1, 2, 3, 15, 16, 17])
def test_a_change_of_any_row_is_noticed(features):
    g, data = draw(10, features), draw(features, 8, seed=1)
    weight = torch.nn.Parameter(data)
    with torch.no_grad():
        for row in range(features):
            before = product(g, weight, Precision("int8"), weight)
            weight.data[row] *= -1
            assert not torch.equal(product(g, weight, Precision("int8"), weight), before), row


@pytest.mark.parametrize("pattern", [[1, -1], [1, -2, 1], [1, -3, 3, -1], [1, -1, -1, 1], 16 * [1], 8 * [1, -1]])
def test_rows_that_change_against_one_another_are_noticed(pattern):
    weight, change = torch.nn.Parameter(draw(16, 8, seed=1)), torch.tensor(pattern, dtype=torch.float32)
    before = weight_cache._fingerprint(weight.detach())
    for start in range(16 - len(pattern) + 1):
        changed = weight.detach().clone()
        changed[start : start + len(pattern)] += change[:, None]
        assert ((weight_cache._fingerprint(changed) - before).abs() > 1e-3).all()


@pytest.mark.parametrize("change", [
    lambda data: data.add_(draw(16, 8, seed=2)),
    lambda data: data.add_(1e-3 * torch.outer(draw(16, seed=2), draw(8, seed=3))),  # as LoRA is merged
    lambda data: data.add_(draw(16, 8, seed=2) - draw(16, 8, seed=2).mean(0)),  # as before a norm or a softmax
    lambda data: data.copy_(data.flip(0)),
    lambda data: data.neg_(),
])  # fmt: skip
def test_a_change_past_the_version_counter_is_noticed(change):
    """PEFT's merging and some optimisers make such changes."""
    g, weight = draw(10, 16), torch.nn.Parameter(draw(16, 8, seed=1))
    with torch.no_grad():
        product(g, weight, Precision("int8"), weight)
        version, address = weight._version, weight.data_ptr()
        change(weight.data)
        assert (weight._version, weight.data_ptr()) == (version, address)
        expected = product(g, weight, Precision("int8"))
        assert torch.equal(product(g, weight, Precision("int8"), weight), expected)


def test_only_parameters_have_copies_kept(roundings):
    cast = draw(16, 8)
    with torch.no_grad():
        for _ in range(2):
            product(draw(10, 16), cast, Precision("int8"), cast)
    assert len(roundings) == 2


def test_what_is_merged_into_a_weight_enters_its_gradients():
    """The weights beneath LoRA stay the same parameters at the same address."""
    settings = {"target_modules": ["q_proj", "fc1"], "lora_alpha": 64, "init_lora_weights": False}
    config = LBPWHTConfig(r=64, grad_input_dtype="int8", train_base_weight=False, stack_on=LoraConfig(r=4, **settings))
    first = get_peft_model(tiny_vit(), config).train()
    gradients(first, images())  # copies are made
    model = get_peft_model(first.merge_and_unload(), config).train()
    found = gradients(model, images())
    with exact_backward(model):
        assert cosine(found, gradients(model, images())) > 0.999


def test_copies_go_with_their_weight():
    gc.collect()
    before = len(weight_cache._copies)
    weight = torch.nn.Parameter(draw(16, 8))
    with torch.no_grad():
        product(draw(10, 16), weight, Precision("int8"), weight)
    assert len(weight_cache._copies) == before + 1
    del weight
    gc.collect()
    assert len(weight_cache._copies) == before


def test_no_copies_of_trained_weights_are_kept():
    gc.collect()
    before = len(weight_cache._copies)
    model = adapted(grad_input_dtype="int8")
    gradients(model, images())
    assert len(weight_cache._copies) == before


def test_copies_go_when_the_adapter_goes():
    """The weights beneath LoRA outlive it."""
    gc.collect()
    before = len(weight_cache._copies)
    model = adapted(
        grad_input_dtype="int8", train_base_weight=False, stack_on=LoraConfig(r=2, target_modules=["q_proj"])
    )
    gradients(model, images())
    assert len(weight_cache._copies) > before
    base = model.unload()
    assert len(weight_cache._copies) == before and base is not None


# In a model


def adapted(base=tiny_vit, **settings):
    return get_peft_model(base(), LBPWHTConfig(**({"r": 10} | settings))).train()


BASES = {
    "ViT": (tiny_vit, images()),
    "convolutions": (ConvMLP, images(2, 32, 48)),
    "Conv1D": (lambda: Mixer("Conv1D"), images(2, 32, 48)),
    "Conv1d": (lambda: Mixer("Conv1d"), images(2, 32, 48)),
}


@pytest.mark.parametrize("grad_input", ["full", "bf16", "int8", (10, "int8")])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("kind", BASES)
def test_without_instructions_low_rank_layers_multiply_in_float32(kind, grad_input, dtype, monkeypatch):
    """This holds for all products of the backward pass, except for those of PyTorch's own layers."""
    base, x = BASES[kind]
    torch.manual_seed(0)
    model = adapted(base, **input_gradient(grad_input))
    expected = gradients(model, x)
    monkeypatch.setattr(instructions, "of_cpu", Instructions)
    monkeypatch.setattr(torch, "_int_mm", None)
    in_layers, plain = [], full.product_of_one_dtype

    def watched(left, right):
        with Products() as products:
            found = plain(left, right)
        in_layers.append(products.dtypes)
        return found

    for module in (full, bf16, products):
        monkeypatch.setattr(module, "product_of_one_dtype", watched)
    found = gradients(model.to(dtype), x.to(dtype))
    assert {frozenset(dtypes) for dtypes in in_layers} == {frozenset({torch.float32})}
    assert cosine({n: g.float() for n, g in found.items()}, expected) > (0.999 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("name", ["int8", "bf16"])
@pytest.mark.parametrize("rank", [None, 10])
@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_near_those_of_full_precision(kind, rank, name):
    base, x = BASES[kind]
    torch.manual_seed(0)
    exact = adapted(base, **input_gradient(rank or "full"))
    torch.manual_seed(0)
    model = adapted(base, grad_input_rank=rank, grad_input_dtype=name)
    expected, found = gradients(exact, x), gradients(model, x)
    assert cosine(found, expected) > 0.999 and largest_difference(found, expected) > 1e-4
    ran = [r for r in layout_report(model).layers.values() if not r.why_exact]
    # No input gradient is needed where nothing before is trained.
    assert {r.precision for r in ran[1:]} >= {name} and len(ran) >= 4


@pytest.mark.parametrize("has", [True, False])
def test_a_tiny_loss_has_the_gradients_of_a_usual_one(has, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", lambda: Instructions(int8=has))
    monkeypatch.setattr(torch, "_int_mm", exactly)
    model, found = adapted(grad_input_dtype="int8"), []
    for scale in (1.0, 2.0**-110):  # the gradients of hidden states are some 1e-34 then
        model.zero_grad()
        (model(images()).logits.square().sum() * scale).backward()
        named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        found.append({n: grad.double() / scale for n, grad in named})
    assert cosine(*found) > 0.9999
    assert all(g.norm() > 0.99 * found[0][n].norm() for n, g in found[1].items())


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}])
def test_lora_and_frozen_layers_between(settings):
    torch.manual_seed(0)
    lora = get_peft_model(
        tiny_vit(), LoraConfig(r=2, init_lora_weights=False, exclude_modules=["classifier"], **settings)
    )
    found = {}
    for grad_input in ("full", "int8"):
        config = LBPWHTConfig(r=64, **input_gradient(grad_input), train_base_weight=False)
        model = get_peft_model(copy.deepcopy(lora), config).train()
        found[grad_input] = gradients(model, images())
    assert cosine(found["int8"], found["full"]) > 0.999
    assert largest_difference(found["int8"], found["full"]) > 1e-4
    assert all(r.precision == "int8" for name, r in layout_report(model).layers.items() if "layers.1" in name)


# The layers of the tiny ViT whose product g W is not rounded: those of the first block need no input gradient, and
# those of the last block have one of [CLS] alone, which is read.
NOT_ROUNDED = ("0.q_proj", "0.k_proj", "0.v_proj", "1.q_proj", "1.o_proj", "1.fc1", "1.fc2")


def test_trained_weights_are_rounded_in_each_pass_and_training_goes_on(roundings):
    """No rounded copy of them is kept, since the next step changes them, and the copy would take memory until then."""
    model = adapted(grad_input_dtype="int8")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, labels = images(8), torch.arange(8) % 5
    losses = []
    for step in range(1, 6):
        for half in range(2):
            loss = torch.nn.functional.cross_entropy(model(x[half::2]).logits, labels[half::2])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert len(roundings) == 2 * step * (len(layers_of(model)) - len(NOT_ROUNDED))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("base, x, exact", [
    (lambda: Mixer("Conv1D"), images(2, 32, 48), 1),  # its weight is the transpose of a parameter
    (lambda: Mixer("Conv1d"), images(2, 32, 48), 1),
    # Its weights are casts of float32 ones.
    (lambda: tiny_vit().to(torch.bfloat16), images().to(torch.bfloat16), len(NOT_ROUNDED)),
])  # fmt: skip
def test_trained_weights_that_are_no_parameters_are_rounded_in_each_pass_too(base, x, exact, roundings):
    torch.manual_seed(0)
    model = adapted(base, grad_input_dtype="int8")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 4):
        for _ in range(2):
            gradients(model, x)
        optimizer.step()
        assert len(roundings) == 2 * step * (len(layers_of(model)) - exact)


def test_a_frozen_weight_is_rounded_once(roundings):
    lora = LoraConfig(r=2, target_modules=["q_proj", "fc2"], init_lora_weights=False)
    model = adapted(grad_input_dtype="int8", train_base_weight=False, stack_on=lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        gradients(model, images())
        optimizer.step()
    assert len(roundings) == len(layers_of(model)) - len(NOT_ROUNDED)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    expected = gradients(adapted(grad_input_dtype="int8"), images())
    model = adapted(grad_input_dtype="int8")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, images())
    # The first layers' input gradients are computed too, but nothing comes of them.
    assert largest_difference(found, expected) < 1e-5


def test_under_autocast():
    model = adapted(grad_input_dtype="int8")
    expected = gradients(model, images())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).logits
    goal = torch.randn(loss.shape, generator=torch.Generator().manual_seed(9))
    model.zero_grad()
    (loss.float() - goal).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert cosine(found, expected) > 0.98


@pytest.mark.parametrize("integers", [True, False])
def test_under_torch_compile(integers, monkeypatch):
    torch._dynamo.reset()
    model = adapted(lambda: tiny_vit(num_hidden_layers=1), grad_input_dtype="int8")
    expected = gradients(model, images())
    if not integers:
        monkeypatch.setattr(instructions, "of_cpu", Instructions)
        monkeypatch.setattr(torch, "_int_mm", None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    logits = compiled(images()).logits
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits - goal).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert cosine(found, expected) > 0.9999


@pytest.mark.parametrize("grad_input", ["full", "int8", (10, "bf16")])
def test_without_instructions_a_model_under_autocast_is_one_graph(grad_input, monkeypatch):
    monkeypatch.setattr(instructions, "of_cpu", Instructions)
    torch._dynamo.reset()
    model = adapted(lambda: tiny_vit(num_hidden_layers=1), **input_gradient(grad_input))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    goal, found = None, []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(images()).logits.float()
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)) if goal is None else goal
        (logits - goal).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert cosine(*found) > 0.999


def test_the_report_says_which_products_are_rounded():
    """No products of other methods' adapters are rounded, since such a layer is run again as it is."""
    beneath = LoHaConfig(r=2, target_modules=["fc1"], init_weights=False)
    config = LBPWHTConfig(r=10, grad_input_dtype="int8", train_base_weight=False, stack_on=beneath)
    model = get_peft_model(tiny_vit(), config).train()
    gradients(model, images())
    ran = {name: r for name, r in layout_report(model).layers.items() if "layers.1" in name}
    assert {r.precision for name, r in ran.items() if "fc1" in name} == {"full"}
    assert not any(r.why_exact for r in ran.values())
    assert {r.precision for name, r in ran.items() if "fc1" not in name} == {"int8"}
    with torch.no_grad():  # nothing is left to do
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    model(images().requires_grad_()).logits.sum().backward()
    ran = layout_report(model).layers["vit.layers.1.mlp.fc1"]
    assert "can be rounded" in ran.why_exact and ran.precision == "full"


# Weight gradients beside such a product


def kept_tokens(model):
    """The dtypes of all saved inputs of layers that have fewer rows than there are tokens."""
    kept = []

    def keep(tensor):
        if tensor.dim() == 3 and tensor.shape[1] == 1 + 10:  # [CLS], and r in the one block
            kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images())
    return set(kept)


@pytest.mark.parametrize(("settings", "dtype"), [("full", torch.float32), ("int8", torch.bfloat16)])
def test_projected_inputs_are_kept_in_bfloat16_beside_a_product_in_low_precision(settings, dtype):
    assert kept_tokens(adapted(**input_gradient(settings))) == {dtype}


@pytest.mark.parametrize("fast", [True, False])
def test_a_weight_gradient_is_of_its_factors_in_bfloat16_whatever_multiplies_them(fast, monkeypatch):
    monkeypatch.setattr("lbp_peft.formats.products.multiplies_bf16", lambda device: fast)
    torch.manual_seed(0)
    grad, x = torch.randn(2, 11, 24), torch.randn(2, 11, 16)
    found = weight_grad(grad, x.to(torch.bfloat16))
    expected = torch.einsum("nko,nki->oi", grad.double(), x.double())
    assert found.dtype == torch.float32
    # Half a step of bfloat16, 2 ** -9, for each factor and for the result, the errors of the terms being random.
    assert 0 < (found - expected).norm() / expected.norm() < 4e-3
    assert torch.equal(weight_grad(grad, x), grad.flatten(0, 1).t() @ x.flatten(0, 1))


def test_with_checkpointing_the_first_layers_weight_gradients_are_the_same_too():
    """Without checkpointing their input gradient is not needed, and so neither is a product in low precision."""
    model = adapted(grad_input_dtype="int8")
    without = gradients(model, images())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found = gradients(model, images())
    assert all(torch.equal(without[name], found[name]) for name in without if "layers.0.attention.q" in name)


def test_there_is_one_way_to_say_that_nothing_is_rounded():
    config = LBPWHTConfig(grad_input_dtype="full", hadamard_size=16)
    assert Precision("full", hadamard_size=16) == FULL == config.input_precision(None)


class Patches(nn.Module):
    """A model that accepts batches without images, which transformers' ViTs do not."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


@pytest.mark.own_choice
@pytest.mark.parametrize("grid", [None, (8, 8)])
@pytest.mark.parametrize("name", ["auto", "full", "bf16", "int8"])
def test_an_empty_batch(name, grid):
    config = LBPWHTConfig(target_modules="all-linear", grad_input_dtype=name, grid_size=grid, modules_to_save=["head"])
    model = get_peft_model(Patches(), config).train()
    model(torch.zeros(0, 3, 32, 32)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.count_nonzero() == 0 for p in trained)


@torch.no_grad()
@pytest.mark.parametrize("rotation", [0, 16])
def test_what_a_tracer_saw_does_not_stay(rotation):
    how = Precision("int8", rotation)
    weight = nn.Parameter(draw(48, 32))
    expected = product(draw(4, 48), weight.clone(), how)
    weight_cache._weights_of_rows.cache_clear()
    hadamard._hadamards.clear()
    with FakeTensorMode():
        seen = nn.Parameter(torch.empty(48, 32))
        product(torch.empty(4, 48), seen, how, seen)
    assert torch.equal(product(draw(4, 48), weight, how, weight), expected)


# Parameters that are swapped


LORA = {"r": 2, "target_modules": ["q_proj", "fc1"]}


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("settings", [
    {},
    {"compress_activations": ("activation", "norm")},
    {"train_base_weight": False, "stack_on": LoraConfig(**LORA)},
    {"train_base_weight": False, "stack_on": LoraConfig(**LORA, use_dora=True)},
], ids=["alone", "compressed", "LoRA", "DoRA"])  # fmt: skip
@pytest.mark.parametrize("grad_input", ["int8", "full"])
def test_parameters_can_be_swapped_between_steps(settings, grad_input, swapping):
    """They can be swapped even while a loss exists whose graph refers to the parameters."""
    model = adapted(**input_gradient(grad_input), **settings)
    expected = gradients(model, images())
    loss = forward(model, images()).sum()
    loss.backward()
    model.to(torch.float64)
    wide = gradients(model, images().double())
    assert cosine({name: grad.float() for name, grad in wide.items()}, expected) > 0.999
    model.to(torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients(model, images())
    model.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    assert cosine(gradients(model, images()), expected) > 0.999


@torch.no_grad()
def test_a_swapped_weight_is_rounded_again(roundings, swapping):
    layer = nn.Linear(8, 16)
    g, how = draw(10, 16), Precision("int8")
    before = product(g, layer.weight, how, layer.weight)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(3 * layer.weight))
    torch.testing.assert_close(product(g, layer.weight, how, layer.weight), 3 * before)
    assert len(roundings) == 2


@torch.no_grad()
def test_parameters_in_one_storage_have_a_copy_each(roundings):
    """Sharded training lays them out like this."""
    whole = draw(32, 8)
    first, second = (nn.Parameter(part) for part in whole.split(16))
    for _ in range(2):
        found = [product(draw(10, 16), weight, Precision("int8"), weight) for weight in (first, second)]
    expected = [product(draw(10, 16), weight, Precision("int8")) for weight in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(roundings) == 4
