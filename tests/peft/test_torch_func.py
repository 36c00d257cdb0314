"""Transforms of torch.func in training mode give low-rank gradients, also per image, or exact ones and one warning."""

import copy
import warnings

import pytest
import reference
import torch
from models import images, input_gradient, largest_difference, tiny_vit
from peft import LoraConfig, get_peft_model
from plans import plan_of
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lbp_peft import BasisSet, LBPWHTConfig, TokenLayout, exact_backward, layout_report, low_rank_linear
from lbp_peft.bases import separable
from lbp_peft.bases.grids import TokenOrder
from lbp_peft.layout import contents
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv

BASES = BasisSet(3)


def adapted(lora=None, base=tiny_vit, **settings):
    settings = {"r": 3} | input_gradient(3) | settings
    if lora is not None:
        lora = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, **lora)
        settings |= {"stack_on": lora, "train_base_weight": False}
    torch.manual_seed(0)
    return get_peft_model(base(), LBPWHTConfig(**settings)).train()


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    """A loss as a function of the trained weights and of one or more images."""

    def loss(weights, x):
        x = x if x.dim() == 4 else x[None]
        return functional_call(model, weights, (), {"pixel_values": x}).logits.square().sum()

    return loss


def by_autograd(model, x):
    model.zero_grad()
    loss_of(model)(dict(model.named_parameters()), x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


MODELS = {
    "own weights": {},
    "exact input gradient": input_gradient("full"),
    "lora": {"lora": {}},
    "lora with biases": {"lora": {"lora_bias": True}},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("way")
def test_gradients_are_those_of_autograd(name):
    model, x = adapted(**MODELS[name]), images(3)
    weights, loss, expected = trained(model), loss_of(model), by_autograd(model, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exact backpropagation")
        assert largest_difference(grad(loss)(weights, x), expected) < 1e-5
        value, back = vjp(lambda weights: loss(weights, x), weights)
        (found,) = back(torch.ones_like(value))
        assert largest_difference(found, expected) < 1e-5
        assert not any(t.requires_grad for t in found.values())
    assert not layout_report(model).exact
    with exact_backward(model):
        assert largest_difference(grad(loss)(weights, x), expected) > 1e-2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("way")
def test_gradients_of_each_image(name):
    model, x = adapted(**MODELS[name]), images(3)
    weights, loss = trained(model), loss_of(model)
    one_by_one = [by_autograd(model, image[None]) for image in x]
    each = vmap(grad(loss), (None, 0))(weights, x)
    for index, expected in enumerate(one_by_one):
        assert largest_difference({n: t[index] for n, t in each.items()}, expected) < 1e-4
    together = grad(lambda weights: vmap(lambda image: loss(weights, image))(x).sum())(weights)
    assert largest_difference(together, {n: sum(e[n] for e in one_by_one) for n in weights}) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_of_several_models(name):
    model, x = adapted(**MODELS[name]), images()
    loss, expected = loss_of(model), by_autograd(model, x)
    several = {n: torch.stack((t, 1.1 * t)) for n, t in trained(model).items()}
    found = vmap(grad(loss), (0, None))(several, x)
    assert largest_difference({n: t[0] for n, t in found.items()}, expected) < 1e-4
    found = grad(lambda weights: vmap(loss, (0, None))(weights, x).sum())(several)
    assert largest_difference({n: t[0] for n, t in found.items()}, expected) < 1e-4


def test_jacobians():
    model, x = adapted(), images()
    weights = trained(model)
    found = jacrev(lambda weights: functional_call(model, weights, (), {"pixel_values": x}).logits.sum(0))(weights)
    model.zero_grad()
    model(pixel_values=x).logits.sum(0)[1].backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert largest_difference({n: t[1] for n, t in found.items()}, expected) < 1e-4


@pytest.mark.parametrize("settings", [input_gradient("int8"), input_gradient("bf16"), {"compress_activations": "all"}])
def test_what_is_rounded_elsewhere_is_not_here(settings):
    model, x = adapted(**settings), images(3)
    settings = input_gradient("full") if "grad_input_dtype" in settings else {}
    plain = adapted(**settings)
    plain.load_state_dict(model.state_dict())
    found = vmap(grad(loss_of(model)), (None, 0))(trained(model), x)
    for index, image in enumerate(x):
        assert largest_difference({n: t[index] for n, t in found.items()}, by_autograd(plain, image[None])) < 1e-4


def test_layers_that_are_run_again_go_backward_exactly_and_say_so_once():
    model, x = adapted(lora={"use_dora": True}), images(3)
    weights, loss = trained(model), loss_of(model)
    with pytest.warns(UserWarning, match=r"q_proj uses exact backpropagation.*torch\.func.*exact_backward") as caught:
        found = grad(loss)(weights, x)
        each = vmap(grad(loss), (None, 0))(weights, x)
    assert sum("exact backpropagation" in str(w.message) for w in caught) == 1
    assert any("torch.func" in why for why in layout_report(model).exact.values())
    summed = {n: t.sum(0) for n, t in each.items()}
    assert largest_difference(summed, found) < 1e-4
    by_autograd(model, x)  # outside, it is low-rank as before
    assert not any("torch.func" in why for why in layout_report(model).exact.values())


# Second derivatives and forward mode


@pytest.mark.parametrize("lora", [None, {}])
def test_second_derivatives_are_refused(lora):
    model, x = adapted(lora, lambda: tiny_vit(attn_implementation="eager")), images(1)
    weights, loss = trained(model), loss_of(model)
    name = next(n for n in weights if "q_proj" in n)

    def squared(weight):
        return grad(lambda w: loss({name: w}, x))(weight).square().sum()

    with pytest.raises(RuntimeError, match="no second derivative.*exact_backward"):
        grad(squared)(weights[name])
    weight = weights[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        squared(weight).backward()
    with exact_backward(model):
        squared(weight).backward()
    assert weight.grad.count_nonzero()


@pytest.mark.parametrize("kind", ["tokens", "image"])
def test_they_are_refused_where_only_the_saved_input_leads_to_them(kind):
    x = torch.randn(2, 6, 8, 8)
    weight = torch.randn(4, 6, 1, 1)

    def run(weight, factor):
        if kind == "image":
            return low_rank_pointwise_conv(factor * x, weight, None, plan=plan_of(None, BASES))
        return low_rank_linear(
            factor * x.flatten(2).mT, weight[..., 0, 0], None, plan=plan_of(TokenLayout((8, 8)), BASES)
        )

    def of_factor(factor):
        return grad(lambda w: run(w, factor).sum())(weight).sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(of_factor)(torch.tensor(2.0))


def test_forward_mode_is_exact_and_says_so_once():
    model, x = adapted(base=lambda: tiny_vit(attn_implementation="eager")), images(1)
    weights, loss = trained(model), loss_of(model)
    name = next(n for n in weights if "q_proj" in n and "bias" in n)

    def by(loss):
        def of_bias(bias):
            return loss({name: bias}, x)

        bias = weights[name]
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(of_bias(forward_ad.make_dual(bias, torch.ones_like(bias)))).tangent
        return jvp(of_bias, (bias,), (torch.ones_like(bias),))[1], jacfwd(of_bias)(bias), hessian(of_bias)(bias), dual

    with pytest.warns(UserWarning, match="exact backpropagation.*forward-mode") as caught:
        found = by(loss)
    assert sum("exact backpropagation" in str(w.message) for w in caught) == 1
    exact = copy.deepcopy(model).eval()
    assert all(torch.allclose(f, e) for f, e in zip(found, by(loss_of(exact)), strict=True))
    assert by_autograd(model, x).keys() == weights.keys() and not layout_report(model).exact


def test_batched_gradients_of_autograd_are_refused_by_name():
    weight, x = torch.randn(4, 6, requires_grad=True), torch.randn(2, 64, 6)
    y = low_rank_linear(x, weight, None, plan=plan_of(TokenLayout((8, 8)), BASES))
    with pytest.raises(RuntimeError, match=r"is_grads_batched.*jacrev.*exact_backward"):
        torch.autograd.grad(y, weight, torch.randn(3, *y.shape), is_grads_batched=True, retain_graph=True)
    several = torch.randn(3, *y.shape)
    found = vmap(lambda g: torch.autograd.grad(y, weight, g, retain_graph=True)[0])(several)
    for f, g in zip(found, several, strict=True):
        torch.testing.assert_close(f, torch.autograd.grad(y, weight, g, retain_graph=True)[0])


# The layers by themselves


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("for_input", [None, BASES])
@pytest.mark.parametrize("layout", [TokenLayout((8, 8)), TokenLayout((14, 14), 1, 2), TokenLayout((24, 8))])
def test_layouts(layout, for_input):
    x = torch.randn(3, 2, layout.num_tokens, 6, dtype=torch.float64)
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def loss(weight, bias, x):
        return low_rank_linear(x, weight, bias, plan=plan_of(layout, BASES, for_input)).square().sum()

    found = vmap(grad(loss, (0, 1, 2)), (None, None, 0))(weight, bias, x)
    for index in range(3):
        leaves = [t.clone().requires_grad_() for t in (weight, bias, x[index])]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f[index], e)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 64), (6, 5, 12)])
def test_convolutions(shape):
    x = torch.randn(3, 2, *shape, dtype=torch.float64)
    weight = torch.randn(4, 6, *[1] * (len(shape) - 1), dtype=torch.float64)
    layout = TokenLayout((8, 8)) if len(shape) == 2 else None

    def loss(weight, x):
        return low_rank_pointwise_conv(x, weight, None, plan=plan_of(layout, BASES, BASES)).square().sum()

    found = vmap(grad(loss, (0, 1)), (None, 0))(weight, x)
    for index in range(3):
        leaves = [t.clone().requires_grad_() for t in (weight, x[index])]
        for f, e in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(f[index], e)


def test_padding():
    x, weight = torch.randn(3, 1, 24, 6), torch.randn(4, 6)
    padding = torch.arange(24) >= torch.tensor([10, 24, 17])[:, None]

    def loss(weight, x, padding, counts=0.0):
        y = low_rank_linear(x, weight, None, plan=plan_of(TokenLayout((1, 24)), BASES, BASES, padding_mask=padding))
        return torch.where(padding[..., None], counts * y, y).square().sum()

    found = vmap(grad(loss), (None, 0, 0))(weight, x, padding[:, None])
    for index in range(3):
        torch.testing.assert_close(found[index], grad(loss)(weight, x[index], padding[index][None]))
    for function in (
        lambda: grad(loss)(weight, x[0], padding[:1], 1.0),
        lambda: vmap(grad(loss), (None, 0, 0, None))(weight, x, padding[:, None], 1.0),
        lambda: vmap(grad(loss), (None, 0, None, None))(weight, x, padding[:1], 1.0),
        lambda: grad(lambda w: vmap(loss, (None, 0, 0, None))(w, x, padding[:, None], 1.0).sum())(weight),
    ):
        with pytest.raises(RuntimeError, match="calls padding have a gradient"):
            function()


def test_matrices_that_are_kept_belong_to_no_transform(monkeypatch):
    kept = {name: {} for name in ("_matrices", "_wholes", "_orders")}
    for name, empty in kept.items():
        monkeypatch.setattr(separable, name, empty)
    x, weight = torch.randn(2, 1, 64, 6), torch.randn(4, 6)
    layout = TokenLayout((8, 8), order=TokenOrder(reference.unrolled((8, 8), ((2, 2),))))

    def loss(weight, x):
        return low_rank_linear(x, weight, None, plan=plan_of(layout, BASES, BASES)).square().sum()

    each = vmap(grad(loss), (None, 0))(weight, x)
    tensors = [
        t
        for tables in kept.values()
        for value in tables.values()
        for t in (value if isinstance(value, tuple) else (value,))
    ]
    assert tensors and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
    torch.testing.assert_close(each.sum(0), grad(loss)(weight, x[:, 0]))


def test_attention_by_products_steps_aside(monkeypatch, decide):
    decide(use_attention_by_products=True)
    monkeypatch.setattr("lbp_peft.tuner.patches.attention_patch.multiplies_bf16", lambda _: True)
    model, x = adapted(base=lambda: tiny_vit().bfloat16()), images(3).bfloat16()
    found = grad(loss_of(model))(trained(model), x)
    expected = by_autograd(model, x)
    total = sum(e.float().square().sum() for e in expected.values())
    missed = sum((found[n].float() - e.float()).square().sum() for n, e in expected.items())
    assert missed < 1e-2 * total


def test_weights_that_are_too_large_to_be_compared_are_followed_too(monkeypatch):
    monkeypatch.setattr(contents, "MOST_VALUES", 4)
    model, x = adapted(), images(3)
    found = vmap(grad(loss_of(model)), (None, 0))(trained(model), x)
    for index, image in enumerate(x):
        assert largest_difference({n: t[index] for n, t in found.items()}, by_autograd(model, image[None])) < 1e-4
    assert not layout_report(model).exact
