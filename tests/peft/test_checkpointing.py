"""Gradient checkpointing does no work whose results are discarded, and changes no gradient."""

import contextlib
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import forward, gradients, images, largest_difference, tiny_vit
from peft import LoraConfig, get_peft_model
from plans import plan_of
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from lbp_peft import BasisSet, LBPWHTConfig, TokenLayout, low_rank_linear
from lbp_peft.formats.derivatives import DerivativeTable
from lbp_peft.ops import kept, linear
from lbp_peft.ops.saved_input import shared_projections
from lbp_peft.projection import DenseProjection, SeparableProjection

LAYERS = 6
PLAN = plan_of(TokenLayout((8, 8), 1), BasisSet(3), BasisSet(6))


def lbp_wht():
    return get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_dtype="full"))


def on_lora():
    torch.manual_seed(0)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], init_lora_weights=False
    )
    return get_peft_model(
        get_peft_model(tiny_vit(), lora), LBPWHTConfig(r=3, grad_input_rank=3, train_base_weight=False)
    )


@pytest.fixture
def counts(monkeypatch):
    """Count the projections of inputs and the products of layers."""
    found = SimpleNamespace(projections=0, products=0)
    multiply = linear._LowRankLinear.forward

    def counted(project):
        def run(self, tokens):
            found.projections += 1
            return project(self, tokens)

        return run

    @functools.wraps(multiply)
    def counted_multiply(*args):
        found.products += 1
        return multiply(*args)

    for kind in (SeparableProjection, DenseProjection):
        monkeypatch.setattr(kind, "project", counted(kind.project))
    monkeypatch.setattr(linear._LowRankLinear, "forward", staticmethod(counted_multiply))
    return found


def step(model):
    model.train().zero_grad()
    x = images().requires_grad_()
    loss = forward(model, x).square().sum()
    yield loss
    loss.backward()
    yield {"images": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("build", [lbp_wht, on_lora])
def test_nothing_is_projected_or_multiplied_for_nothing(build, counts):
    model = build()
    _, expected = step(model)
    assert counts.products == 2 * LAYERS
    in_one_pass = counts.projections
    assert in_one_pass >= 2 * 4  # the query, the key and the value share theirs
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    counts.projections = counts.products = 0
    running = step(model)
    next(running)
    assert (counts.projections, counts.products) == (0, 2 * LAYERS)
    found = next(running)
    # In the second pass the last layer of each block is the last to save anything: its output is used by nobody.
    assert (counts.projections, counts.products) == (in_one_pass, 2 * (LAYERS + LAYERS - 1))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_nothing_is_rounded_for_nothing(monkeypatch):
    rounded = []

    def counted(function):
        def run(*args):
            rounded.append(function.__name__)
            return function(*args)

        return run

    monkeypatch.setattr(kept, "quantize_groups", counted(kept.quantize_groups))
    monkeypatch.setattr(DerivativeTable, "pack", counted(DerivativeTable.pack))
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, grad_input_dtype="full", compress_activations="all"))
    _, expected = step(model)
    in_one_pass = sorted(rounded)
    assert {"pack", "quantize_groups"} == set(rounded)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    rounded.clear()
    running = step(model)
    next(running)
    assert not rounded
    found = next(running)
    assert sorted(rounded) == in_one_pass
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 65, 12, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(12, 12, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    return x, weights


def layers(x, weights, plan=PLAN):
    with shared_projections():
        for weight in weights:
            x = F.gelu(low_rank_linear(x, weight, plan=plan))
    return x.square()


def gradients_of(function):
    x, weights = problem()
    function(x, weights).sum().backward()
    return [x.grad, *(weight.grad for weight in weights)]


def selective(*_):
    def policy(context, operation, *args, **kwargs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def nested(x, weights):
    inner = functools.partial(checkpoint, layers, use_reentrant=False)
    return checkpoint(lambda z: inner(inner(z, weights[:1]), weights[1:]).sin(), x, use_reentrant=False)


def nested_expected(x, weights):
    return layers(layers(x, weights[:1]), weights[1:]).sin()


def with_gradients_inside(x, weights, wrap=True):
    """Run a function that takes gradients of its own outputs in a checkpoint."""

    def run(z):
        y = layers(z, weights)
        (slope,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
        return y + slope.detach()

    return checkpoint(run, x, use_reentrant=False) if wrap else run(x)


def without_early_stop(x, weights):
    with set_checkpoint_early_stop(False):
        return checkpoint(layers, x, weights, use_reentrant=False)


def hooks_inside(x, weights):
    def run(z):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return layers(z, weights)

    return checkpoint(run, x, use_reentrant=False)


def hooks_outside(x, weights):
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(layers, x, weights, use_reentrant=False)


WAYS = {
    "plain": lambda x, weights: checkpoint(layers, x, weights, use_reentrant=False),
    "reentrant": lambda x, weights: checkpoint(layers, x, weights, use_reentrant=True),
    "selective": lambda x, weights: checkpoint(layers, x, weights, use_reentrant=False, context_fn=selective),
    "without early stop": without_early_stop,
    "other hooks inside": hooks_inside,
    "other hooks outside": hooks_outside,
    "unchecked": lambda x, weights: checkpoint(layers, x, weights, use_reentrant=False, determinism_check="none"),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_to_the_bit(way):
    found, expected = gradients_of(WAYS[way]), gradients_of(layers)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "run, plain",
    [(nested, nested_expected), (with_gradients_inside, functools.partial(with_gradients_inside, wrap=False))],
    ids=["nested", "gradients inside"],
)
def test_checkpoints_within_and_gradients_within(run, plain):
    found, expected = gradients_of(run), gradients_of(plain)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_shapes_and_dtypes_of_what_is_thrown_away_are_those_of_what_is_kept(autocast, padded):
    """Checkpointing compares them, and raises an error where they differ or where the second pass saves fewer."""
    padding = torch.zeros(2, 65, dtype=torch.bool)
    padding[1, 30:] = padded
    plan = plan_of(PLAN.layout, BasisSet(3), BasisSet(6), padding_mask=padding if padded else None)
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16) if autocast else contextlib.nullcontext

    def run(x, weights, again=True):
        with context():
            y = checkpoint(layers, x, weights, plan, use_reentrant=False) if again else layers(x, weights, plan)
        return y if not padded else y * ~padding[..., None]

    found, expected = gradients_of(run), gradients_of(functools.partial(run, again=False))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_outputs_of_the_second_pass_may_be_changed_in_place():
    def run(x, weights):
        y = low_rank_linear(x, weights[0], plan=PLAN)
        y += 1
        return low_rank_linear(F.relu(y, inplace=True), weights[1], plan=PLAN)

    found = gradients_of(lambda x, weights: checkpoint(run, x, weights, use_reentrant=False))[:3]
    expected = gradients_of(run)[:3]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("words", [None, "projection", "all"])
def test_tensors_thrown_away_have_the_form_of_those_that_are_saved(words):
    """PyTorch compares the tensors that both forward passes save, and raises CheckpointError if they differ."""
    model, x = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, compress_activations=words)).train(), images()
    expected = gradients(model, x)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_difference(gradients(model, x), expected) == 0


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("build", [lbp_wht, on_lora])
def test_what_a_pass_keeps_is_released_with_it(build, use_reentrant):
    """The first passes, which are traced, must not keep anything either: it would add up over the steps."""
    model, kept_alive = build().train(), []
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    for name, module in model.named_modules():
        if name.endswith(("fc1", "layernorm_before")):
            module.register_forward_hook(lambda _, args, output: kept_alive.extend(map(weakref.ref, (*args, output))))
    for _ in range(3):
        forward(model, images()).sum().backward()
    gc.collect()
    assert kept_alive and not [reference for reference in kept_alive if reference() is not None]
