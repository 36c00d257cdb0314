"""Input gradients in a basis that is fitted to each image's own gradient."""

import copy
from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from models import Attention, disturb, forward, gradients, images, largest_difference, layers_of, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import grad as func_grad
from torch.func import vmap

from lbp_peft import (
    AdaptiveBasis,
    BackwardPlan,
    BasisSet,
    Branch,
    ExactProduct,
    LBPWHTConfig,
    TokenLayout,
    layout_report,
    low_rank_linear,
)
from lbp_peft.bases.packed import PackedLayout
from lbp_peft.formats.products import Precision
from lbp_peft.heuristics import Heuristics
from lbp_peft.ops.adaptive import orthonormal_rows, sign_matrix
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv

CPU = torch.device("cpu")
ADAPTIVE = {"r": 3, "grad_input_basis": "adaptive", "grad_input_rank": 3}


def problem(length=20, channels=(8, 12), batch=3, rank=None, dtype=torch.float64):
    """x, a weight, and a gradient whose singular values are halved from one to the next, or that has a given rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    strengths = 0.5 ** torch.arange(channels[1]) if rank is None else (torch.arange(channels[1]) < rank).double()
    left = torch.linalg.qr(draw(batch, length, channels[1]))[0]
    right = torch.linalg.qr(draw(batch, channels[1], channels[1]))[0]
    x, weight = draw(batch, length, channels[0]), draw(channels[1], channels[0])
    return x.to(dtype).requires_grad_(), weight.to(dtype), ((left * strengths) @ right).to(dtype)


def plan(rank, layout=None, energy=None, **settings):
    return BackwardPlan(layout, input_gradient=AdaptiveBasis(rank, energy), **settings)


def input_gradient(x, weight, grad, plan, branches=()):
    return torch.autograd.grad(low_rank_linear(x, weight, plan=plan, branches=branches), x, grad)[0]


def signs(rank, length):
    return sign_matrix(rank, length, torch.float64, CPU)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def adapted(base=None, **settings):
    model = get_peft_model(tiny_vit() if base is None else base, LBPWHTConfig(**(ADAPTIVE | settings)))
    disturb(model)
    return model.train()


# The mathematics


@pytest.mark.parametrize("outside", [(0, 0), (1, 0), (2, 3)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_gradients_are_the_references(rank, outside):
    x, weight, grad = problem(20 + sum(outside))
    found = input_gradient(x, weight, grad, plan(rank, TokenLayout((4, 5), *outside)))
    assert relative(found, reference.adaptive_input_gradient(grad, weight, signs(rank, 20), *outside)) < 1e-6
    if outside == (0, 0):  # and no layout is needed
        assert torch.equal(found, input_gradient(x, weight, grad, plan(rank)))


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_it_is_exact_where_the_basis_is_as_large_as_the_rank(rank):
    x, weight, grad = problem(rank=2)
    assert relative(input_gradient(x, weight, grad, plan(rank)), grad @ weight) < 1e-10


@pytest.mark.parametrize("rank", [12, 20, 50])
def test_it_is_plain_backpropagation_where_the_basis_is_no_smaller_than_the_gradient(rank):
    x, weight, grad = problem()
    assert torch.equal(input_gradient(x, weight, grad, plan(rank)), grad @ weight)


def test_what_it_keeps_is_nearly_the_most_that_so_many_rows_can_keep():
    x, _, grad = problem(64, (8, 48))
    best = torch.linalg.svdvals(grad)[:, 6:].norm()
    lost = (input_gradient(x, torch.eye(48, 8, dtype=torch.float64), grad, plan(6)) - grad[..., :8]).norm()
    whole = input_gradient(x[..., :1].expand(-1, -1, 48), torch.eye(48, dtype=torch.float64), grad, plan(6))
    assert lost < (whole - grad).norm() < 1.5 * best


def test_signs_are_balanced_and_rows_differ():
    matrix = (signs(32, 196) * 196).round()
    assert matrix.abs().eq(1).all() and abs(matrix.mean()) < 0.05
    correlations = matrix @ matrix.t() / 196 - torch.eye(32)
    assert correlations.abs().max() < 0.35 and correlations.square().mean().sqrt() < 0.1


def test_branches_see_the_same_gradient():
    x, weight, grad = problem()
    down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8), (12, 2)))
    branches = [Branch(down, up, scaling=0.5)]
    for rank in (3, 12):
        y = low_rank_linear(x, weight, plan=plan(rank), branches=branches)
        found = torch.autograd.grad(y, (x, down, up), grad)
        exact = torch.autograd.grad(F.linear(x, weight) + 0.5 * F.linear(F.linear(x, down), up), (down, up), grad)
        merged = (weight + 0.5 * up @ down).detach()
        assert relative(found[0], input_gradient(x, merged, grad, plan(rank))) < 1e-12
        assert all(relative(f, e) < 1e-12 for f, e in zip(found[1:], exact, strict=True))


@pytest.mark.parametrize("shape", [(4, 5), (20,)])
def test_convolutions_have_the_gradients_of_linear_layers(shape):
    x, weight, grad = problem()
    expected = input_gradient(x, weight, grad, plan(3, TokenLayout((4, 5))))
    image = x.detach().transpose(1, 2).unflatten(2, shape).requires_grad_()
    kernel = weight.view(12, 8, *[1] * len(shape)).clone().requires_grad_()
    for rank in (3, 12):
        given = plan(rank, weight_basis=BasisSet(3)) if len(shape) == 2 else plan(rank)
        y = low_rank_pointwise_conv(image, kernel, None, plan=given)
        found = torch.autograd.grad(y, image, grad.transpose(1, 2).unflatten(2, shape))[0]
        expected = input_gradient(x, weight, grad, plan(rank))
        assert found.shape == image.shape and relative(found.flatten(2).transpose(1, 2), expected) < 1e-12


@pytest.mark.parametrize("energy", [1e-9, 0.7, 0.95, 1.0])
def test_as_few_rows_are_used_as_the_energy_needs(energy):
    x, weight, grad = problem()
    projection, coefficients = plan(6, energy=energy).input_projection(grad.dtype, CPU).fit(grad)
    share = coefficients.square().sum((1, 2)) / grad.square().sum((1, 2))
    rows = coefficients.shape[1]
    assert projection.basis.shape == (3, rows, 20)
    assert (share >= energy).all() or rows == 6
    most = coefficients.square().sum(2).sort(1, descending=True)[0][:, : rows - 1].sum(1) / grad.square().sum((1, 2))
    assert rows == 1 or (most < energy).any()
    assert rows == {1e-9: 1, 0.7: 2, 0.95: 3, 1.0: 6}[energy]
    assert relative(input_gradient(x, weight, grad, plan(6, energy=energy)), grad @ weight) < (1 - energy) ** 0.5 + 0.03


# From layer to layer


def chain(x, weights, given):
    for weight in weights:
        x = low_rank_linear(x, weight, plan=given)
    return x


@pytest.mark.parametrize("energy", [None, 0.999])
def test_the_basis_of_the_layer_before_in_the_backward_pass_is_where_the_next_one_starts(energy):
    x, weight, grad = problem(channels=(12, 12))
    found = torch.autograd.grad(chain(x, [weight, weight], plan(3, energy=energy)), x, grad)[0]
    again = torch.autograd.grad(chain(x, [weight, weight], plan(3, energy=energy)), x, grad)[0]
    assert torch.equal(found, again)  # nothing is carried over from one pass to the next
    inner = input_gradient(x, weight, grad, plan(3, energy=energy))
    from_scratch = input_gradient(x, weight, inner, plan(3, energy=energy))
    # All of `inner` lies in the span of the first basis, so that the second one, started from it, loses nothing more.
    assert relative(found, inner @ weight) < 1e-6
    assert relative(from_scratch, inner @ weight) < 1e-6
    other = torch.autograd.grad(chain(x, [weight, weight], plan(3)), x, grad.flip(1))[0]
    assert not torch.allclose(other, found)


def test_a_layer_with_other_tokens_in_between_is_no_obstacle():
    x, weight, grad = problem(channels=(12, 12))
    y = low_rank_linear(x, weight, plan=plan(3))
    y = low_rank_linear(y[:, :7], weight, plan=plan(2))
    dx = torch.autograd.grad(y, x, grad[:, :7])[0]
    assert dx.shape == x.shape and relative(dx[:, :7], (grad[:, :7] @ weight @ weight)) < 0.5
    zero = torch.autograd.grad(chain(x, [weight, weight], plan(3)), x, torch.zeros_like(grad))[0]
    assert not zero.any()


@pytest.mark.parametrize("energy", [None, 0.9])
def test_gradient_checkpointing_changes_no_bit(energy):
    x = images()
    model = adapted(grad_input_energy=energy)
    expected = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, x)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Degenerate and extreme gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_without_a_gradient_or_with_nan_do_not_disturb_others(dtype):
    x, weight, grad = problem(batch=4, dtype=dtype)
    alone = input_gradient(x[1:2].detach().requires_grad_(), weight, grad[1:2], plan(3))
    grad = torch.stack((torch.zeros_like(grad[0]), grad[1], grad[2], grad[3]))
    grad[2, 5, 3], grad[3, 0, 0] = float("nan"), float("inf")
    found = input_gradient(x, weight, grad, plan(3))
    assert found.dtype == dtype and not found[0].any()
    assert relative(found[1:2], alone) < 1e-2
    assert not found[2].isfinite().all() and not found[3].isfinite().all()
    with_energy = input_gradient(x, weight, grad, plan(3, energy=0.5))
    assert not with_energy[0].any() and not with_energy[2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e34])
def test_the_magnitude_of_the_gradient_does_not_matter(scale):
    x, weight, grad = problem(dtype=torch.float32)
    expected = input_gradient(x, weight, grad, plan(4))
    assert relative(input_gradient(x, weight, grad * scale, plan(4)) / scale, expected) < 1e-4


def test_dependent_rows_come_out_shorter_and_never_longer():
    rows = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    found = orthonormal_rows(torch.cat((rows, rows[:, :2], torch.zeros(2, 1, 10)), 1))
    assert torch.linalg.matrix_norm(found, 2).max() < 1 + 1e-9
    span = torch.linalg.svd(rows.double(), full_matrices=False)[2]
    assert relative(found.mT @ found @ span.mT, span.mT) < 1e-5
    assert found.isfinite().all() and orthonormal_rows(torch.zeros(1, 3, 5)).isfinite().all()


def test_an_empty_batch_has_an_empty_gradient():
    x, weight, grad = problem()
    assert input_gradient(x.detach()[:0].requires_grad_(), weight, grad[:0], plan(3)).shape == (0, 20, 8)


def test_padding_is_left_out_and_a_loss_that_depends_on_it_is_refused():
    x, weight, grad = problem()
    mask = torch.arange(20).expand(3, 20) >= torch.tensor([20, 15, 9])[:, None]
    given = plan(3, TokenLayout((1, 20)), padding_mask=mask)
    with pytest.raises(RuntimeError, match="padding"):
        input_gradient(x, weight, grad, given)
    grad = grad.masked_fill(mask[:, :, None], 0)
    found = input_gradient(x, weight, grad, given)
    assert not found[mask].any()
    assert relative(found, input_gradient(x, weight, grad, plan(3))) < 1e-12


def test_images_of_several_sizes_in_one_sequence_are_exact():
    x, weight, grad = problem(batch=1)
    layout = PackedLayout.of((TokenLayout((3, 4)), TokenLayout((2, 3), 2)))
    given = plan(3, layout)
    assert torch.equal(input_gradient(x, weight, grad, given), grad @ weight)
    assert given.input_gradient.num_coefficients(layout) == 20


def test_a_second_derivative_is_refused():
    x, weight, _ = problem()
    dx = torch.autograd.grad(low_rank_linear(x, weight, plan=plan(3)).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


# Low precision, compiled, in transforms


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_the_small_product_can_be_rounded(name):
    x, weight, grad = problem(dtype=torch.float32)
    gradient = AdaptiveBasis(4, precision=Precision(name))
    found = input_gradient(x, weight, grad, BackwardPlan(input_gradient=gradient))
    expected = input_gradient(x, weight, grad, plan(4))
    assert 0 < relative(found, expected) < 0.02


def test_under_autocast():
    model, x = adapted(), images()
    exact = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
    weights = [name for name in exact if "lbpwht_weight" in name]
    assert min(F.cosine_similarity(found[n].flatten(), exact[n].flatten(), 0) for n in weights) > 0.98


def test_compiled_without_graph_breaks():
    x, weight, grad = problem(dtype=torch.float32)
    given = plan(3, TokenLayout((4, 5)))
    run = torch.compile(lambda x: low_rank_linear(x, weight, plan=given), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(run(x), x, grad)[0]
    assert relative(found, input_gradient(x, weight, grad, given)) < 1e-5


def test_per_image_gradients_by_transforms():
    x, weight, grad = problem()

    def loss(x, g):
        return (low_rank_linear(x[None], weight, plan=plan(3))[0] * g).sum()

    found = vmap(func_grad(loss))(x.detach(), grad)
    assert relative(found, input_gradient(x, weight, grad, plan(3))) < 1e-9


# In models


def test_a_model_trains_in_it_and_says_so():
    model, x = adapted(), images()
    found, exact = gradients(model, x), exact_gradients(model, x)
    assert 0 < largest_difference(found, exact) < 2
    # Softmax ignores the biases of keys: their gradients are zero but for rounding.
    names = [n for n in exact if n.endswith("default") and not n.endswith("k_proj.lbpwht_bias.default")]
    cosines = {n: F.cosine_similarity(found[n].flatten(), exact[n].flatten(), 0) for n in names}
    assert min(cosines.values()) > 0.95, cosines
    assert {(ran.grad_weight_rows, ran.grad_input_rows) for ran in layout_report(model).layers.values() if ran} <= {
        (4, 4), (4, 65), (1, 1)
    }  # fmt: skip


def exact_gradients(model, x):
    """The gradients with exact input gradients and the same low-rank weight gradients."""
    exact = copy.deepcopy(model)
    for layer in layers_of(exact).values():
        layer.lbpwht_rule = {"default": exact_rule(layer.lbpwht_rule["default"])}
    return gradients(exact, x)


def exact_rule(rule):
    return replace(rule, input_gradient=ExactProduct())


def test_ranks_by_layer():
    model = adapted(
        grad_input_rank=None,
        grad_input_rank_pattern={r"layers?\.1\..*": 3, "fc2": 2},
        grad_input_energy=0.9,
        grad_input_dtype="full",
    )
    forward(model, images()).sum().backward()
    ranks = {name: layer.lbpwht_rule["default"].input_gradient for name, layer in layers_of(model).items()}
    assert {getattr(way, "rank", None) for way in ranks.values()} == {None, 2, 3}
    assert all(way.energy == 0.9 for way in ranks.values() if isinstance(way, AdaptiveBasis))


def test_layers_whose_tokens_lie_on_no_grid_have_it_too():
    """Such layers have adaptive input gradients, and exact weight gradients."""
    torch.manual_seed(0)
    base = Attention()
    x = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    settings = ADAPTIVE | {"grad_input_rank": 1, "target_modules": ["query", "key", "value"]}
    model = get_peft_model(copy.deepcopy(base), LBPWHTConfig(**settings)).train()
    with pytest.warns(UserWarning, match="computes exact weight gradients"):
        forward(model, x).square().sum().backward()
    found = x.grad.clone()
    reports = layout_report(model).layers.values()
    assert [(ran.grad_weight_rows, ran.grad_input_rows, ran.why_exact) for ran in reports] == [(40, 1, "")] * 3
    x.grad = None
    base.train()
    forward(base, x).square().sum().backward()
    assert 0 < relative(found, x.grad) < 1
    for name, layer in layers_of(model).items():
        exact = base.get_submodule(name.rsplit(".", 1)[-1]).weight.grad
        assert relative(layer.lbpwht_weight["default"].grad, exact) < 1e-5


def test_stacked_on_lora_with_and_without_dropout():
    x = images()
    for dropout in (0.0, 0.2):
        lora = LoraConfig(r=2, target_modules=["q_proj", "fc1", "fc2"], init_lora_weights=False, lora_dropout=dropout)
        torch.manual_seed(0)
        model = get_peft_model(tiny_vit(), LBPWHTConfig(**ADAPTIVE, stack_on=lora, train_base_weight=False)).train()
        torch.manual_seed(1)
        found = gradients(model, x)
        torch.manual_seed(1)
        assert all(torch.equal(found[name], g) for name, g in gradients(model, x).items())
        torch.manual_seed(1)
        assert 0 < largest_difference(found, exact_gradients(model, x)) < 3


def test_saved_loaded_and_resumed_to_the_bit(tmp_path):
    x = images()
    model = adapted(grad_input_energy=0.9)
    expected = gradients(model, x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True).train()
    config = loaded.peft_config["default"]
    assert (config.grad_input_basis, config.grad_input_rank, config.grad_input_energy) == ("adaptive", 3, 0.9)
    gradients(loaded, images(seed=7))  # what ran before does not matter
    found = gradients(loaded, x)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_narrow_layers_are_left_exact():
    use = Heuristics().use_adaptive_basis
    assert use(197, 32, 768, 768) and use(197, 32, 768, 3072)
    assert not use(197, 32, 96, 96) and not use(40, 32, 768, 768)
    model = adapted(grad_input_rank=12)
    forward(model, images()).sum().backward()
    assert {ran.grad_input_rows for ran in layout_report(model).layers.values()} == {65}


REFUSED = [
    ({"grad_input_basis": "svd"}, "grad_input_basis must be one of walsh, adaptive, got 'svd'"),
    ({"grad_input_basis": "adaptive"}, "needs grad_input_rank"),
    ({"grad_input_basis": "adaptive", "grad_input_rank": 0}, "grad_input_rank must be None or an int of at least 1"),
    ({"grad_input_basis": "adaptive", "grad_input_rank": 2.0}, "grad_input_rank must be None or an int of at least 1"),
    ({**ADAPTIVE, "grad_input_rank_pattern": {"fc1": -1}}, r"grad_input_rank_pattern\['fc1'\] must be None or an int"),
    ({**ADAPTIVE, "grad_input_energy": 0}, "grad_input_energy must be None or a number above 0 and at most 1, got 0"),
    ({**ADAPTIVE, "grad_input_energy": 1.5}, "grad_input_energy must be.*got 1.5"),
    ({**ADAPTIVE, "grad_input_energy": True}, "grad_input_energy must be.*got True"),
    ({**ADAPTIVE, "grad_input_energy": "most"}, "grad_input_energy must be.*got 'most'"),
    ({"grad_input_rank": 3, "grad_input_energy": 0.9}, 'grad_input_energy needs grad_input_basis="adaptive"'),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_values_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LBPWHTConfig(**settings)


def test_a_rank_may_exceed_the_functions_of_a_block():
    assert LBPWHTConfig(grad_input_basis="adaptive", grad_input_rank=200).grad_input_rank == 200
