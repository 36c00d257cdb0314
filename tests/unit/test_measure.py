"""Measured costs equal numbers that were worked out by hand."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from models import images, input_gradient, same_state, state_of, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbp_peft import LBPWHTConfig, exact_backward, gradient_quality, layout_report
from lbp_peft.measure import memory, multiply_adds, peak_memory, saved_activations, step_cost, warming_up
from lbp_peft.measure.warming_up import count_preparations, run_until_warm
from lbp_peft.projection import DenseProjection

N, L, C_IN, C_OUT = 2, 64, 12, 20


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(C_IN, C_OUT)

    def forward(self, x):
        return self.lin(x)


def one_layer(**settings):
    config = LBPWHTConfig(**({"target_modules": ["lin"], "grid_size": (8, 8), "num_prefix_tokens": 0} | settings))
    return get_peft_model(OneLayer(), config).train()


def tokens():
    return torch.randn(N, L, C_IN, requires_grad=True)


def test_a_plain_layer_saves_its_input():
    model = OneLayer()
    with saved_activations(model) as saved:
        model(tokens())
    assert saved.bytes == 4 * N * L * C_IN
    assert saved.mib == saved.bytes / 2**20


@pytest.mark.parametrize("r", [1, 10, 36])
def test_an_adapted_layer_saves_its_projected_input(r):
    model = one_layer(r=r)
    with saved_activations(model) as saved:
        model(tokens())
    assert saved.bytes == 4 * N * r * C_IN


@pytest.mark.parametrize("prepare", [
    lambda model: model.eval(),
    lambda model: model,
])  # fmt: skip
def test_an_exact_layer_saves_what_the_plain_layer_saves(prepare):
    model = prepare(one_layer(r=64, grad_input_rank=64))
    with saved_activations(model) as saved:
        model(tokens())
    assert saved.bytes == 4 * N * L * C_IN


def test_storages_are_counted_once_and_nothing_without_gradients():
    x = tokens()
    with saved_activations(OneLayer()) as saved:
        (x * x).sum(), (x.view(-1) * x.view(-1)).sum()
    assert saved.bytes == 4 * N * L * C_IN
    with saved_activations(OneLayer()) as saved, torch.no_grad():
        (x * x).sum()
    assert saved.bytes == 0


def test_a_plain_layer_multiplies_three_times():
    model, x = OneLayer(), tokens()
    with multiply_adds() as there:
        y = model(x)
    with multiply_adds() as back:
        y.sum().backward()
    assert (there.total, back.total) == (N * L * C_IN * C_OUT, 2 * N * L * C_IN * C_OUT)


@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_multiplies_by_its_groups(groups, transposed):
    """The forward pass and each gradient multiply every pixel of the smaller side by every weight."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(C_IN, 24, 2, stride=2, groups=groups), torch.randn(N, C_IN, 6, 10, requires_grad=True)
    pixels = 6 * 10 if transposed else 3 * 5
    once = N * pixels * 4 * C_IN * 24 // groups
    with multiply_adds() as there:
        y = layer(x)
    with multiply_adds() as back:
        y.sum().backward()
    assert (there.total, back.total) == (once, 2 * once)
    with multiply_adds() as of_weight:
        layer(x.detach()).sum().backward()
    assert of_weight.total == 2 * once  # forward, and one gradient


@pytest.fixture
def project(way):
    """The multiply-adds that project a channel of 8 x 8 tokens on 10 bases, or lift it."""
    if way is DenseProjection:
        return 10 * L
    return (4 * 8 * 8) + (4 * 4 * 8)  # along the rows of the grid, then along its columns, on 4 functions each


@pytest.mark.parametrize("input_rank", ["full", 10])
def test_an_adapted_layer_multiplies_in_the_small_space(input_rank, project):
    model, x = one_layer(r=10, **input_gradient(input_rank)), tokens()
    with multiply_adds() as there:
        y = model(x)
    assert there.total == N * L * C_IN * C_OUT + N * project * C_IN
    with multiply_adds() as back:
        y.backward(torch.randn_like(y))
    weight = N * project * C_OUT + N * 10 * C_IN * C_OUT
    exact_input, low_rank_input = N * L * C_IN * C_OUT, N * 10 * C_IN * C_OUT + N * project * C_IN
    bias = 10 * C_OUT  # read off the projected gradient
    assert back.total == weight + bias + (exact_input if input_rank == "full" else low_rank_input)


WAYS_TO_GO_ON = ["full", 10, "int8", (10, "int8"), "bf16"]


@pytest.mark.parametrize("grad_input", WAYS_TO_GO_ON)
def test_a_first_layer_does_nothing_for_an_input_gradient(grad_input, project):
    """It computes neither g W nor a lifting: the products for the weight and the bias are all that are counted."""
    y = one_layer(r=10, **input_gradient(grad_input))(tokens().detach())
    with multiply_adds() as back:
        y.backward(torch.randn_like(y))
    assert back.total == N * project * C_OUT + N * 10 * C_IN * C_OUT + 10 * C_OUT


@pytest.mark.parametrize("grad_input", WAYS_TO_GO_ON)
def test_nor_does_a_first_pointwise_convolution(grad_input, project):
    base = nn.ModuleDict({"lin": nn.Conv2d(C_IN, C_OUT, 1)})
    layer = get_peft_model(base, LBPWHTConfig(r=10, **input_gradient(grad_input), target_modules=["lin"])).train()
    y = layer.base_model.model["lin"](torch.randn(N, C_IN, 8, 8))
    with multiply_adds() as back:
        y.backward(torch.randn_like(y))
    assert back.total == N * project * C_OUT + N * 10 * C_IN * C_OUT


@pytest.mark.parametrize("grad_input", WAYS_TO_GO_ON)
def test_nor_does_lora_on_a_first_layer(grad_input, project):
    lora = LoraConfig(r=3, target_modules=["lin"])
    y = one_layer(r=10, **input_gradient(grad_input), train_base_weight=False, stack_on=lora)(tokens().detach())
    with multiply_adds() as back:
        y.backward(torch.randn_like(y))
    factors = N * 10 * 3 * (2 * C_IN + 2 * C_OUT)  # g B, and its product with x; x A, and its product with g
    assert back.total == N * project * C_OUT + factors


@pytest.mark.parametrize("grad_input, rows", [("int8", L), ((10, "int8"), 10), ("bf16", L)])
def test_products_in_low_precision_count_like_any(grad_input, rows, project):
    model, x = one_layer(r=10, **input_gradient(grad_input)), tokens()
    y = model(x)
    with multiply_adds() as back:
        y.backward(torch.randn_like(y))
    of_weight = N * project * C_OUT + N * 10 * C_IN * C_OUT + 10 * C_OUT
    lifting = N * project * C_IN if rows == 10 else 0
    assert back.total == of_weight + N * rows * C_IN * C_OUT + lifting


def test_branches_beside_the_weight_count_in_the_input_gradient_too(project):
    settings = {"grad_input_rank": 10, "train_base_weight": False}
    lora = get_peft_model(OneLayer(), LoraConfig(r=3, target_modules=["lin"]))
    config = LBPWHTConfig(r=10, target_modules=["lin"], grid_size=(8, 8), num_prefix_tokens=0, **settings)
    model, x = get_peft_model(lora, config).train(), tokens()
    y = model(x)
    with multiply_adds() as back:
        y.backward(torch.randn_like(y))
    factors = N * 10 * 3 * (2 * C_IN + 2 * C_OUT)  # g B, and its product with x; x A, and its product with g
    into_x = N * 10 * C_IN * C_OUT + 3 * C_IN * C_OUT  # g (W + B A), and that sum
    assert back.total == N * project * (C_OUT + C_IN) + factors + into_x


@pytest.mark.parametrize("shapes", [
    ((N, 3, 10, 4), (N, 3, 10, 4), (N, 3, 10, 4)),
    ((N, 3, 10, 4), (N, 3, 7, 4), (N, 3, 7, 4)),  # across two sequences
])  # fmt: skip
def test_fused_attention_counts(shapes):
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    product = N * 3 * 10 * shapes[1][2] * 4

    def run(backend):
        with sdpa_kernel(backend), multiply_adds() as there:
            y = F.scaled_dot_product_attention(query, key, value)
        with multiply_adds() as back:
            y.sum().backward()
        return there.total, back.total

    assert run(SDPBackend.MATH) == (2 * product, 4 * product)
    assert run(SDPBackend.FLASH_ATTENTION) == (2 * product, 5 * product)  # one product is computed again


def test_a_low_rank_step_of_a_model_is_cheaper():
    def cost(model):
        model.train()
        with saved_activations(model) as saved:
            loss = model(pixel_values=images(), labels=torch.tensor([0, 1])).loss
        with multiply_adds() as back:
            loss.backward()
        return saved.bytes, back.total

    full = cost(tiny_vit())
    low = cost(get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_rank=3)))
    assert low[0] < full[0] and low[1] < 0.7 * full[1]


# Whole steps


class Normed(nn.Module):
    """A model with batch norm's buffers and dropout around a ViT."""

    def __init__(self, **settings):
        super().__init__()
        config = LBPWHTConfig(**({"r": 3, "grad_input_rank": 3, "modules_to_save": ["classifier"]} | settings))
        self.norm, self.vit = nn.BatchNorm2d(3), get_peft_model(tiny_vit(hidden_dropout_prob=0.1), config)

    def forward(self, pixel_values, labels):
        return self.vit(pixel_values=self.norm(pixel_values), labels=labels)


def a_batch():
    return {"pixel_values": images(4), "labels": torch.arange(4)}


@pytest.mark.parametrize("measured", [gradient_quality, step_cost])
def test_a_measurement_leaves_no_trace(measured):
    model = Normed()
    model.eval()
    model.vit.train()
    model(**a_batch()).loss.backward()
    before, modes = state_of(model), [module.training for module in model.modules()]
    gradients = [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()]
    report, random = str(layout_report(model)), torch.get_rng_state()
    measured(model, a_batch())
    assert same_state(state_of(model), before) and torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes and str(layout_report(model)) == report
    for parameter, pair in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is (pair and pair[0]) and (pair is None or torch.equal(*pair))


def test_gradient_quality_is_one_at_full_rank_and_the_cosine_below():
    exact = gradient_quality(Normed(r=64, grad_input_rank=64), a_batch())
    assert exact.cosine == pytest.approx(1, abs=1e-6) and exact.norm_ratio == pytest.approx(1, abs=1e-5)
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_rank=3, modules_to_save=["classifier"])).train()
    found = gradient_quality(model, a_batch())

    def gradients():
        model.zero_grad()
        model(**a_batch()).loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    low = gradients()
    with exact_backward(model):
        expected = gradients()
    assert found.tensors.keys() == low.keys()
    for name, quality in found.tensors.items():
        one, other = low[name].flatten(), expected[name].flatten()
        assert quality.cosine == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-4), name
        assert quality.norm_ratio == pytest.approx(float(one.norm() / other.norm()), rel=1e-3), name
    matrices = [name for name in low if "lbpwht_weight" in name]
    one, other = (torch.cat([g[name].flatten() for name in matrices]) for g in (low, expected))
    assert found.cosine == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-5) and found.cosine < 1
    assert found.worst in str(found)


def test_gradient_quality_needs_lbp_wht_and_a_loss():
    with pytest.raises(ValueError, match="no LBP-WHT layers"):
        gradient_quality(tiny_vit(), a_batch())
    with pytest.raises(ValueError, match="returned no loss"):
        gradient_quality(Normed().vit, {"pixel_values": images()})
    quality = gradient_quality(
        Normed().vit, images(), loss_fn=lambda model, x: model(pixel_values=x).logits.square().sum()
    )
    assert 0 < quality.cosine <= 1


def test_step_cost_has_time_memory_and_multiply_adds():
    model = tiny_vit()
    cost = step_cost(model, a_batch(), steps=1)
    with saved_activations(model) as saved, multiply_adds() as there:
        loss = model.train()(**a_batch()).loss
    with multiply_adds() as back:
        loss.backward()
    assert (cost.saved_bytes, cost.forward_multiply_adds, cost.backward_multiply_adds) == (
        saved.bytes, there.total, back.total,
    )  # fmt: skip
    assert cost.trained_parameters == sum(p.numel() for p in model.parameters())
    assert min(cost.forward, cost.backward, cost.optimiser) > 0 and cost.peak_bytes > 50 * 2**20
    assert "backward" in str(cost)


def test_models_are_warm_after_steps_that_neither_traced_nor_compiled():
    for model in (one_layer(), OneLayer()):
        model.compile(backend="eager")
        steps = []

        def step(model=model, steps=steps):
            before = count_preparations(model)
            model(tokens()).sum().backward()
            steps.append(count_preparations(model) != before)
            return len(steps)

        assert run_until_warm(model, step) == len(steps)
        assert steps[0] and not steps[-1]


def test_a_model_that_is_traced_in_each_pass_is_warm_in_the_end(monkeypatch):
    counts = itertools.count()
    monkeypatch.setattr(warming_up, "count_preparations", lambda model: next(counts))
    steps = itertools.count(1)
    assert run_until_warm(OneLayer(), lambda: next(steps)) == next(steps) - 1 == 4


def test_step_cost_refuses_gradients_that_would_do_harm():
    model = tiny_vit()
    before = state_of(model)
    with pytest.raises(ValueError, match="not finite"):
        step_cost(model, a_batch() | {"pixel_values": images(4) * float("nan")})
    assert same_state(state_of(model), before)
    with pytest.raises(ValueError, match="no trained parameters"):
        step_cost(tiny_vit().requires_grad_(False), a_batch())


@pytest.mark.parametrize("reset", [True, False])
def test_the_peak_of_the_process_includes_what_is_freed_again(monkeypatch, reset):
    if not reset:  # as on other systems than Linux
        monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        block = torch.ones(40 << 20)
        time.sleep(0.02 * (not reset))  # until it is looked at
        del block
    assert 120 < large.mib - small.mib < 250  # 160 MiB
