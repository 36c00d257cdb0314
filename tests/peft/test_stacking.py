"""Layers that another PEFT method adapts, with LBP-WHT on top, have the gradients of float64 references."""

import copy
import math
import warnings

import peft
import pytest
import reference
import torch
import torch.nn.functional as F
from models import forward, gradients, images, input_gradient, largest_difference, tiny_vit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import BitsAndBytesConfig, ViTForImageClassification

from lbp_peft import LBPWHTConfig, exact_backward, layout_report
from lbp_peft.ops.token_wise import why_not_token_wise
from lbp_peft.tuner.stacking import layer as stacked

C_IN, C_OUT = 8, 12
GRID, PREFIX = (8, 8), 1


class Tokens(nn.Module):
    """A model of one linear layer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(C_IN, C_OUT)

    def forward(self, x):
        return self.lin(x)


def adapted(*configs, grid=GRID, prefix=PREFIX, dtype=torch.float64, seed=0, **settings):
    """The model with adapters of all configurations, active together, without and with LBP-WHT on top."""

    def build():
        torch.manual_seed(seed)
        model = get_peft_model(Tokens().to(dtype), copy.deepcopy(configs[0]), autocast_adapter_dtype=False)
        for index, config in enumerate(configs[1:]):
            model.add_adapter(f"more{index}", copy.deepcopy(config), autocast_adapter_dtype=False)
        model.base_model.set_adapter(list(model.peft_config))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name or p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))
        return model

    config = LBPWHTConfig(train_base_weight=False, grid_size=grid, num_prefix_tokens=prefix, **settings)
    return build().train(), get_peft_model(build(), config, autocast_adapter_dtype=False).train()


def problem(grid=GRID, prefix=PREFIX, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = prefix + math.prod(grid)
    x = torch.randn(batch, num_tokens, C_IN, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.randn(batch, num_tokens, C_OUT, generator=generator, dtype=torch.float64).to(dtype)


def smoothed(tokens, rank, grid=GRID, prefix=PREFIX):
    """B^T B tokens, computed with dense matrices."""
    if rank is None:
        return tokens
    bases = reference.orthogonal_bases(grid, rank).to(tokens.dtype)
    on_grid = torch.einsum("kl,km,nmc->nlc", bases, bases, tokens[:, prefix:])
    return torch.cat([tokens[:, :prefix], on_grid], dim=1)


def backward(model, x, grad, seed=7):
    """Output and gradients, of the input and of all trained parameters by name."""
    x = x.detach().requires_grad_()
    parameters = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    y = model(x)
    found = torch.autograd.grad(y, [x, *parameters.values()], grad, allow_unused=True)
    return y, dict(zip(["x", *parameters], found, strict=True))


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    scale = max(e.norm() for e in expected.values() if e is not None)
    for name, e in expected.items():
        if e is None:
            assert found[name] is None, name
        else:
            assert (found[name] - e).norm() <= tolerance * (e.norm() + 1e-3 * scale), name


def by_formula(plain, x, grad, r, r_input, grid=GRID, prefix=PREFIX, seed=7):
    """Compute LoRA's and DoRA's gradients by exact backpropagation on the projected x and g.

    The input and the result of each dropout are separate inputs.
    """
    layer = plain.base_model.model.lin
    base = layer.base_layer
    torch.manual_seed(seed)
    names = layer.active_adapters
    scales = {}  # 0 or 1 / (1 - p)
    for name in names:
        p = getattr(layer.lora_dropout[name], "p", 0.0)
        scales[name] = F.dropout(torch.ones_like(x), p) if p else torch.ones_like(x)

    def formula(x, dropped, constants):
        """The output; with `constants`, including the terms that do not depend on the input."""
        y = x @ base.weight.T + constants * base.bias
        for name in names:
            up, down, s = layer.lora_B[name], layer.lora_A[name].weight, layer.scaling[name]
            z = dropped[name]
            branch = s * ((z @ down.T) @ up.weight.T)
            if up.bias is not None:
                branch = branch + s * constants * up.bias
            if name in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[name].weight
                norm = (base.weight + s * up.weight @ down).norm(dim=1).detach()
                y = y + (magnitude / norm - 1) * (z @ base.weight.T) + magnitude / norm * branch
            else:
                y = y + branch
        return y

    parameters = {n.removeprefix("base_model.model."): p for n, p in plain.named_parameters() if p.requires_grad}
    dropped = {name: x.detach() * scales[name] for name in names}
    y = formula(smoothed(x.detach(), r, grid, prefix), {n: smoothed(z, r, grid, prefix) for n, z in dropped.items()}, 0)
    total = (y * smoothed(grad, r, grid, prefix)).sum()
    total = total + (formula(torch.zeros_like(x), {n: torch.zeros_like(x) for n in names}, 1) * grad).sum()
    found = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True), strict=True))
    leaf = x.detach().requires_grad_()
    leaves = {name: z.clone().requires_grad_() for name, z in dropped.items()}
    of_inputs = torch.autograd.grad(
        formula(leaf, leaves, 1), [leaf, *leaves.values()], smoothed(grad, r_input, grid, prefix), allow_unused=True
    )
    found["x"] = of_inputs[0] + sum(g * scales[n] for n, g in zip(leaves, of_inputs[1:], strict=True))
    return found


def lora(r=4, **settings):
    return LoraConfig(r=r, target_modules=["lin"], **settings)


RANKS = [(3, None), (3, 3), (10, 3), (3, 21), (None, 10)]
LORAS = {
    "plain": [lora()],
    "scaled": [lora(lora_alpha=32)],
    "rslora": [lora(r=8, use_rslora=True)],
    "bias": [lora(lora_bias=True)],
    "base bias": [lora(bias="lora_only")],
    "several": [lora(r=2), lora(r=5, lora_alpha=1), lora(lora_bias=True)],
    "dropout": [lora(lora_dropout=0.4)],
    "several, dropout": [lora(lora_dropout=0.4), lora(r=2), lora(r=3, lora_dropout=0.1, lora_bias=True)],
    "dora": [lora(use_dora=True)],
    "dora, dropout": [lora(use_dora=True, lora_dropout=0.3)],
    "dora and lora": [lora(use_dora=True, lora_dropout=0.3), lora(r=2), lora(r=2, lora_dropout=0.3)],
}


@pytest.mark.parametrize("ranks", RANKS[:-1])
@pytest.mark.parametrize("kind", LORAS)
def test_lora_gradients_are_the_references(kind, ranks):
    r, r_input = ranks
    plain, model = adapted(*LORAS[kind], r=r, **input_gradient(r_input or "full"))
    x, grad = problem()
    y, found = backward(model, x, grad)
    expected_y, _ = backward(plain, x, grad)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-12)
    assert_same(found, by_formula(plain, x, grad, r, r_input))
    assert not layout_report(model).exact


@pytest.mark.parametrize("grid, prefix", [((14, 14), 5), ((7, 7), 0), ((5, 12), 2), ((1, 9), 1)])
@pytest.mark.parametrize("kind", ["several, dropout", "dora, dropout"])
def test_on_any_grid(kind, grid, prefix):
    plain, model = adapted(*LORAS[kind], grid=grid, prefix=prefix, r=3, grad_input_rank=6)
    x, grad = problem(grid, prefix)
    _, found = backward(model, x, grad)
    assert_same(found, by_formula(plain, x, grad, 3, 6, grid, prefix))


@pytest.mark.parametrize("kind", LORAS)
def test_the_layer_run_again_gives_what_the_formulas_for_lora_give(kind, monkeypatch):
    """Without its own path, LoRA takes that of all other methods."""
    x, grad = problem()
    for settings in ({"r": 3}, {"r": 3, "grad_input_rank": 3}, {"r": 3, "grad_input_rank": 10}):
        _, model = adapted(*LORAS[kind], **settings)
        y, direct = backward(model, x, grad)
        with monkeypatch.context() as patched:
            patched.setattr(stacked, "_lora_parts", lambda host, x: None)
            again_y, again = backward(model, x, grad)
        torch.testing.assert_close(y, again_y, rtol=0, atol=1e-12)
        assert_same(again, direct)


def test_full_rank_is_exact_backpropagation():
    plain, model = adapted(*LORAS["several, dropout"], r=63, grad_input_rank=63)
    x, grad = problem()
    _, exact = backward(plain, x, grad)
    _, found = backward(model, x, grad)
    assert all(1e-3 < (found[name] - e).norm() / e.norm() < 0.5 for name, e in exact.items() if "bias" not in name)
    _, model = adapted(*LORAS["several, dropout"], r=64, grad_input_rank=64)
    assert_same(backward(model, x, grad)[1], exact)


def test_each_dropped_position_blocks_the_gradient():
    """Where the branch is the only path, dropped values get no gradient, low-rank or not."""
    config = lora(lora_dropout=0.5)
    plain, model = adapted(config, r=3, grad_input_rank=3)
    for m in (plain, model):
        layer = m.base_model.model.lin
        nn.init.zeros_(layer.base_layer.weight)
    x, grad = problem()
    _, exact = backward(plain, x, grad)
    _, found = backward(model, x, grad)
    assert torch.equal(found["x"] == 0, exact["x"] == 0)
    assert 0.4 < (exact["x"] == 0).double().mean() < 0.6


# Every method of PEFT that adapts linear layers

TARGET = {"target_modules": ["lin"]}
METHODS = {
    "AdaLora": {"total_step": 10},
    "Adamss": {},
    "BOFT": {"boft_block_size": 4},
    "Beft": {},
    "C3A": {"block_size": 4},
    "Deft": {},
    "Delora": {},
    "FourierFT": {"n_frequency": 20},
    "Glora": {},
    "Gralora": {"r": 4, "gralora_k": 2},
    "HRA": {},
    "Hira": {},
    "IA3": {"feedforward_modules": []},
    "LoHa": {},
    "LoKr": {},
    "Miss": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "Peanut": {},
    "Psoft": {"r": 4},
    "RandLora": {},
    "Road": {"group_size": 4},
    "Shira": {"r": 2},
    "Supertuning": {"sparsity": 0.5},
    "TinyLora": {},
    "UniLora": {},
    "VBLoRA": {"num_vectors": 4, "vector_length": 4, "topk": 2},
    "Vera": {"r": 8},
    "WaveFT": {"n_frequency": 20},
}
EXACT = {"Lily": "depends on other tokens", "Pvera": "is stochastic"}
# PEFT computes these partly in float32, whatever the model's dtype.
FLOAT32 = {"BOFT", "C3A", "Deft", "FourierFT", "OFT", "OSF", "Psoft", "Road", "Shira", "WaveFT"}


def of_method(name, **settings):
    config_cls = getattr(peft, f"{name}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warnings about shapes this small
        return adapted(config_cls(**TARGET, **METHODS.get(name, {})), **settings)


def by_autograd(plain, x, grad, r, r_input):
    """Differentiate the plain layer at the projected x, without the terms that do not depend on x."""
    parameters = {n.removeprefix("base_model.model."): p for n, p in plain.named_parameters() if p.requires_grad}
    zeros = torch.zeros_like(x)
    linear_part = (plain(smoothed(x.detach(), r)) - plain(zeros)) * smoothed(grad, r)
    total = linear_part.sum() + (plain(zeros) * grad).sum()
    found = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True), strict=True))
    leaf = x.detach().requires_grad_()
    (found["x"],) = torch.autograd.grad(plain(leaf), leaf, smoothed(grad, r_input))
    return found


@pytest.mark.parametrize("r_input", [None, 3, 10])
@pytest.mark.parametrize("name", METHODS)
def test_any_token_wise_method_gets_the_references_gradients(name, r_input):
    dtype = torch.float32 if name == "Psoft" else torch.float64  # this is enough
    plain, model = of_method(name, r=3, **input_gradient(r_input or "full"), dtype=dtype)
    x, grad = problem(dtype=dtype)
    y, found = backward(model, x, grad)
    expected_y, exact = backward(plain, x, grad)
    assert torch.equal(y, expected_y)
    if name == "TinyLora" and layout_report(model).exact:  # peft 0.21.0 keeps what it trains out of the layer
        assert "not among its parameters" in layout_report(model).exact["lin"]
        assert_same(found, exact, 1e-12)
        return
    assert not layout_report(model).exact
    assert_same(found, by_autograd(plain, x, grad, 3, r_input), 2e-5 if name in FLOAT32 else 1e-9)
    assert any((found[n] - e).norm() > 1e-3 * e.norm() for n, e in exact.items() if e is not None and n != "x") or (
        name == "Beft"  # it trains only a bias
    )


@pytest.mark.parametrize("name", EXACT)
def test_other_methods_fall_back_to_exact_backpropagation(name):
    plain, model = of_method(name, r=3, grad_input_rank=3)
    x, grad = problem()
    with pytest.warns(UserWarning, match=f"lin uses exact backpropagation.*{EXACT[name]}.*exclude_modules") as caught:
        y, found = backward(model, x, grad)
        backward(model, x, grad)
    assert sum("exact backpropagation" in str(w.message) for w in caught) == 1
    expected_y, expected = backward(plain, x, grad)
    assert torch.equal(y, expected_y)
    assert_same(found, expected, 1e-12)
    assert EXACT[name] in layout_report(model).exact["lin"]


@pytest.mark.parametrize(
    "config, why",
    [
        (peft.LoHaConfig(**TARGET, rank_dropout=0.5), "rank_dropout is stochastic"),
        (peft.LoKrConfig(**TARGET, module_dropout=0.5), "module_dropout is stochastic"),
        (peft.OFTConfig(**TARGET, oft_block_size=4, module_dropout=0.5), "is stochastic"),
        (peft.BOFTConfig(**TARGET, boft_block_size=4, boft_dropout=0.5), "is stochastic"),
    ],
)
@pytest.mark.filterwarnings("ignore:CUDA")
def test_dropout_of_more_than_the_input_falls_back(config, why):
    plain, model = adapted(config, r=3, grad_input_rank=3)
    x, grad = problem()
    with pytest.warns(UserWarning, match=f"exact backpropagation.*{why}"):
        backward(model, x, grad)
    assert_same(backward(model, x, grad)[1], backward(plain, x, grad)[1], 1e-12)


@pytest.mark.parametrize("name", ["Vera", "LoHa", "LoKr"])
def test_training_draws_no_more_random_numbers_than_without(name):
    plain, model = of_method(name, r=3, grad_input_rank=3)
    x, grad = problem()
    states = []
    for m in (plain, model):
        backward(m, x, grad)  # the first pass tries the layer out
        backward(m, x, grad)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_trained_tensors_that_are_no_parameters_of_the_layer_are_not_forgotten():
    class Hidden(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.hidden[0]

    layer = Hidden(C_IN, C_OUT)
    layer.hidden = [torch.ones(1, requires_grad=True)]
    assert "not among its parameters" in why_not_token_wise(layer, C_IN, torch.float32, torch.device("cpu"))
    layer.hidden[0].requires_grad_(False)
    assert why_not_token_wise(layer, C_IN, torch.float32, torch.device("cpu")) == ""


@pytest.mark.parametrize(
    "function, why",
    [
        (torch.relu, "not linear"),
        (lambda x: x.cumsum(1), "depends on other tokens"),
        (lambda x: x[:, :1], "number of tokens"),
        (lambda x: x * torch.rand(1), "is stochastic"),
        (lambda x: F.dropout(F.dropout(x, 0.5), 0.5), "is stochastic"),
        (lambda x: 3 * x + 1, ""),
    ],
)
def test_layers_are_tried_out(function, why):
    class Layer(nn.Module):
        def forward(self, x):
            return function(x)

    state = torch.get_rng_state()
    found = why_not_token_wise(Layer(), C_IN, torch.float32, torch.device("cpu"))
    assert why in found and bool(why) == bool(found)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_inside_the_layer_is_found():
    inner = nn.Sequential(nn.Linear(C_IN, C_IN), nn.Dropout(0.5), nn.Linear(C_IN, C_OUT)).train()
    assert "more than its input" in why_not_token_wise(inner, C_IN, torch.float32, torch.device("cpu"))
    outer = nn.Sequential(nn.Dropout(0.5), nn.Linear(C_IN, C_OUT)).train()
    assert why_not_token_wise(outer, C_IN, torch.float32, torch.device("cpu")) == ""


def test_a_layer_that_changed_between_its_passes_is_refused():
    _, model = adapted(lora(use_dora=True), lora(r=2), r=3, grad_input_rank=3)
    x, grad = problem()
    y = model(x)
    model.stacked_on.set_adapter("default")
    with pytest.raises(RuntimeError, match="changed between its forward and its backward pass.*Call backward before"):
        y.backward(grad)


def test_vera_with_dropout_of_its_input():
    config = peft.VeraConfig(**TARGET, r=8, vera_dropout=0.5)
    plain, model = adapted(config, r=3, grad_input_rank=3)
    x, grad = problem()
    y, found = backward(model, x, grad)
    expected_y, exact = backward(plain, x, grad)
    assert torch.equal(y, expected_y) and not layout_report(model).exact
    assert all(((found[n] - e).norm() / e.norm()) < 2 for n, e in exact.items())


# In a model


def pair(lora_settings=None, **settings):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["classifier"],
                           "init_lora_weights": False} | (lora_settings or {}))  # fmt: skip
    inner = get_peft_model(tiny_vit(), config)
    plain = copy.deepcopy(inner).train()
    config = LBPWHTConfig(**{"r": 3, "train_base_weight": False} | settings)
    return plain, get_peft_model(inner, config).train()


@pytest.mark.parametrize("settings", [{"r": 64, "grad_input_rank": 64}, {"r": 64}])
@pytest.mark.parametrize("lora_settings", [{}, {"use_dora": True}, {"bias": "all"}, {"lora_dropout": 0.2}])
def test_a_whole_model_at_full_rank_has_exact_gradients(lora_settings, settings):
    plain, model = pair(lora_settings, **settings)
    x = images()
    torch.manual_seed(1)
    expected = gradients(plain, x)
    torch.manual_seed(1)
    assert largest_difference(gradients(model, x), expected) < 1e-5


def test_a_whole_model_covers_every_linear_layer_of_the_encoder():
    _, model = pair(grad_input_rank=3)
    gradients(model, images())
    report = layout_report(model)
    assert len(report.layers) == 12
    # The very first input needs no gradient, and there is no weight to train behind it in k_proj.
    assert list(report.exact) == ["vit.layers.0.attention.k_proj"]
    for name, ran in report.layers.items():
        adapts = name.rsplit(".")[-1] in ("q_proj", "v_proj", "fc1")
        first = name in [f"vit.layers.0.attention.{p}_proj" for p in "qkv"]
        assert (ran.grad_weight_rows, ran.grad_input_rows) == (4 if adapts else 65, 65 if first else 4), name


@pytest.mark.parametrize("lora_settings", [{}, {"use_dora": True}, {"lora_dropout": 0.2}])
def test_what_is_saved_shrinks(lora_settings):
    given = {"grid_size": (8, 8), "num_prefix_tokens": 1}  # a layer that is called by itself cannot find its grid
    targets = {"target_modules": "all-linear", "exclude_modules": ["classifier"]}
    plain, model = pair(targets | lora_settings, r=3, **given)
    x = torch.randn(2, 65, 64, requires_grad=True)
    sizes = []
    for m in (plain, model):
        layer = m.base_model.model.vit.layers[1].mlp.fc2
        elements = []
        weights = {p.data_ptr() for p in m.parameters()}

        def note(t, elements=elements, weights=weights):
            if t.data_ptr() not in weights:
                elements.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(x)
        sizes.append(sum(elements))
    # Dropout keeps its mask, in the dtype of the input on a CPU.
    assert sizes[1] < (0.6 if "lora_dropout" in lora_settings else 0.45) * sizes[0]


@pytest.mark.parametrize("lora_settings", [{}, {"use_dora": True}])
def test_autocast(lora_settings):
    plain, model = pair(lora_settings, r=10, grad_input_rank=10, exact_forward=True)
    x = images(seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = forward(plain, x), forward(model, x)
    assert torch.equal(expected, found)
    _, model = pair(lora_settings, r=10, grad_input_rank=10)
    exact = gradients(model, x)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = forward(model, x)
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits.float() - goal).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32
            cosine = F.cosine_similarity(p.grad.flatten(), exact[name].flatten(), dim=0)
            assert cosine > 0.98, name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora_settings", [{}, {"use_dora": True}, {"lora_dropout": 0.2}])
def test_gradient_checkpointing(lora_settings, reentrant):
    _, model = pair(lora_settings, r=3, grad_input_rank=3)
    x = images()
    torch.manual_seed(1)
    expected = gradients(model, x)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    assert largest_difference(gradients(model, x), expected) < 1e-5


def test_double_backward_is_refused():
    for settings in ({}, {"use_dora": True}):
        _, model = pair(settings, r=3, grad_input_rank=3)
        loss = forward(model, images()).square().sum()
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n]
        first = torch.autograd.grad(loss, trained, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            sum(g.square().sum() for g in first).backward()


def test_lbp_alone_is_switched_off():
    plain, model = pair(r=3, grad_input_rank=3)
    x = images()
    exact = gradients(plain, x)
    assert largest_difference(gradients(model, x), exact) > 1e-2
    with exact_backward(model):
        assert largest_difference(gradients(model, x), exact) == 0
    assert largest_difference(gradients(model, x), exact) > 1e-2


def test_a_layer_that_multiplies_in_a_way_of_its_own_beneath_lora():
    """The layer stands for quantized base layers."""

    class Int8Linear(nn.Linear):
        def __init__(self, layer):
            super().__init__(layer.in_features, layer.out_features)
            self.bias = layer.bias
            self.weight = nn.Parameter((layer.weight.detach() * 200).round().to(torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype) / 200, self.bias)

    def quantized():
        model = tiny_vit()
        for layer in model.vit.layers:
            layer.mlp.fc1 = Int8Linear(layer.mlp.fc1)
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=False)).train()

    x = images()
    expected = gradients(quantized(), x)
    for settings, tolerance in (({"r": 64, "grad_input_rank": 64}, 1e-5), ({"r": 36, "grad_input_rank": 36}, 0.5)):
        model = get_peft_model(quantized(), LBPWHTConfig(train_base_weight=False, **settings)).train()
        assert largest_difference(gradients(model, x), expected) < tolerance
    assert not {name for name in layout_report(model).exact if name.endswith("fc1")}


@pytest.mark.parametrize("quantized", ["8bit", "4bit"])
def test_bitsandbytes(quantized, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_vit(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(**{f"load_in_{quantized}": True}, llm_int8_skip_modules=["classifier"])

    def build():
        model = ViTForImageClassification.from_pretrained(tmp_path, quantization_config=how)
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False))

    plain = build().train()
    x = images()
    expected = gradients(plain, x)
    for rank, tolerance in ((64, 2e-2), (36, 0.5)):
        model = get_peft_model(build(), LBPWHTConfig(r=rank, grad_input_rank=rank, train_base_weight=False)).train()
        assert torch.equal(forward(plain, x), forward(model, x))
        assert largest_difference(gradients(model, x), expected) < tolerance
    assert not {name for name in layout_report(model).exact if name.endswith("fc1")}


def test_lora_of_another_dtype_than_its_input():
    """A bfloat16 checkpoint gets float32 adapters, which cast back and forth."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    inner = get_peft_model(tiny_vit().bfloat16(), config)
    plain = copy.deepcopy(inner).train()
    model = get_peft_model(inner, LBPWHTConfig(r=36, grad_input_rank=36, train_base_weight=False)).train()
    x = images().bfloat16()
    assert torch.equal(forward(plain, x), forward(model, x))
    expected = gradients(plain, x)
    for name, found in gradients(model, x).items():
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found.flatten(), expected[name].flatten(), dim=0) > 0.9
    assert not {name for name in layout_report(model).exact if name.endswith(("layers.1.mlp.fc1", "q_proj"))}
    assert isinstance(model.base_model.model.vit.layers[0].mlp.fc1, LoraLinear)


def test_a_stack_compiles_without_graph_breaks():
    torch._dynamo.reset()
    _, model = pair({"lora_dropout": 0.2}, r=3, grad_input_rank=3)
    x = images()
    torch.manual_seed(1)
    expected = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    found = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, x).items()}
    assert largest_difference(found, expected) < 1e-5
    with exact_backward(model):  # so that equality says something
        torch.manual_seed(1)
        assert largest_difference(gradients(model, x), expected) > 1e-2


def test_second_derivatives_of_some_weights_are_refused():
    """`torch.autograd.grad` runs only what lies on a path to these weights, and the refusal has to lie on it."""
    model = get_peft_model(tiny_vit(attn_implementation="eager"), LBPWHTConfig(r=3, modules_to_save=["classifier"]))
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = forward(model.train(), images()).logsumexp(-1).sum()
    first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), weights)
