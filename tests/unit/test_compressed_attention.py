"""Attention that saves query, key and value in 8 bits, and what a compiled graph saves."""

import pytest
import torch
import torch.nn.functional as F
from comparing import cosine
from models import gradients, images, largest_difference, tiny_vit
from peft import LoraConfig, get_peft_model
from test_attention import draw, errors, in_float64, problem
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from lbp_peft import LBPWHTConfig, low_rank_linear
from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.grids import TokenLayout
from lbp_peft.formats.derivatives import derivative_table
from lbp_peft.measure import saved_activations
from lbp_peft.ops import compressed_attention as module
from lbp_peft.ops.compressed_attention import compressed_attention
from lbp_peft.ops.conv1x1 import low_rank_pointwise_conv
from lbp_peft.ops.elementwise import elementwise_function
from lbp_peft.ops.layer_norm import compressed_layer_norm
from lbp_peft.ops.plan import BackwardPlan


@pytest.mark.parametrize("shape", [(2, 3, 65, 65, 16, 16), (1, 2, 20, 33, 64, 24), (1, 2, 197, 197, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bf16", [True, False])
def test_by_products(shape, dtype, with_bf16, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bf16", lambda device: with_bf16)
    tensors, grad = problem(*shape)
    tensors, grad = [t.detach().to(dtype).requires_grad_() for t in tensors], grad.to(dtype)
    y = compressed_attention(*tensors)
    assert torch.equal(y, F.scaled_dot_product_attention(*tensors))
    found = torch.autograd.grad(y, tensors, grad)
    assert all(f.dtype == dtype and f.shape == t.shape for f, t in zip(found, tensors, strict=True))
    assert max(errors(found, in_float64(tensors, grad))) < 0.015


CASES = {
    "mask": {"attn_mask": torch.ones(20, 20, dtype=torch.bool).tril()},
    "added": {"attn_mask": draw(20, 20, seed=7, dtype=torch.float32)},
    "causal": {"is_causal": True},
    "many keys": {"keys": 601},
    "gqa": {"enable_gqa": True, "kv_heads": 2},
    "scale": {"scale": -0.4},
}


@pytest.mark.parametrize("case", CASES)
def test_by_running_it_again(case):
    settings = dict(CASES[case])
    keys, heads = settings.pop("keys", 20), settings.pop("kv_heads", 4)
    tensors = [
        draw(2, h, n, 16, seed=s, dtype=torch.float32) for s, (h, n) in enumerate([(4, 20), *[(heads, keys)] * 2])
    ]
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors]
    grad = draw(2, 4, 20, 16, seed=3, dtype=torch.float32)
    y, exact = compressed_attention(*tensors, **settings), F.scaled_dot_product_attention(*tensors, **settings)
    assert torch.equal(y, exact)
    found, expected = (torch.autograd.grad(z, tensors, grad) for z in (y, exact))
    assert 1e-5 < max(errors(found, [e.double() for e in expected])) < 0.015
    with saved_activations(nn.Module()) as saved:
        compressed_attention(*tensors, **settings)
    assert saved.bytes < 0.6 * sum(t.numel() * 4 for t in tensors) + 20 * 20 * 4


def test_what_keys_and_values_have_in_common_costs_no_precision():
    (query, key, value), grad = problem(1, 2, 33, 33, 16, 16)
    plain = [t.detach().float().requires_grad_() for t in (query, key, value)]
    shifted = [plain[0], (plain[1].detach() + 30).requires_grad_(), (plain[2].detach() - 30).requires_grad_()]
    found, expected = (torch.autograd.grad(compressed_attention(*t), t, grad.float()) for t in (shifted, plain))
    assert max(errors(found, [e.double() for e in expected])) < 0.01


HIDDEN = [torch.bool, -1e4, torch.finfo(torch.float32).min, -torch.inf]


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("shape", [(9, 12), (2, 1, 1, 12), (2, 3, 9, 12)], ids=str)
def test_hidden_keys_of_any_size_cost_no_precision(hidden, shape):
    tensors = [draw(2, 3, n, 16, seed=s, dtype=torch.float32) for s, n in enumerate((9, 12, 12))]
    grad = draw(2, 3, 9, 16, seed=3, dtype=torch.float32)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 8:] = False
    if hidden is not torch.bool:
        mask = torch.zeros(shape).masked_fill(~mask, hidden)
    tensors[1][:, :, 8:] = 300 * tensors[1][:, :, 8:].abs()
    tensors[2][:, :, 8:] *= 1e6
    tensors[0].abs_().neg_()  # the additive mask of -1e4 alone would not hide keys that fit the queries as well
    tensors = [t.requires_grad_() for t in tensors]
    found, expected = (
        torch.autograd.grad(f(*tensors, mask), tensors, grad)
        for f in (compressed_attention, F.scaled_dot_product_attention)
    )
    assert max(errors(found, [e.double() for e in expected])) < 0.02


@pytest.mark.parametrize("case", ["dropout", "trained mask", "float64", "three axes"])
def test_all_else_is_left_to_pytorch(case):
    dtype = torch.float64 if case == "float64" else torch.float32
    tensors = [draw(2, 4, 20, 8, seed=s, dtype=dtype).requires_grad_() for s in range(3)]
    settings = {}
    if case == "three axes":
        tensors = [t[0].detach().requires_grad_() for t in tensors]
    if case == "dropout":
        settings["dropout_p"] = 0.3
    if case == "trained mask":
        settings["attn_mask"] = draw(20, 20, seed=5, dtype=dtype).requires_grad_()

    def run(function):
        torch.manual_seed(0)
        y = function(*tensors, **settings)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    found, expected = run(compressed_attention), run(F.scaled_dot_product_attention)
    assert torch.equal(found[0], expected[0]) and max(errors(found, [e.double() for e in expected])) < 1e-6


def test_second_derivatives_are_refused_and_changes_in_place_noticed():
    tensors, grad = problem(1, 2, 9, 9, 8, 8)
    (first,) = torch.autograd.grad(compressed_attention(*tensors), tensors[0], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    y = compressed_attention(*tensors)
    expected = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    for t in tensors:  # it keeps copies
        t.data.zero_()
    assert all(map(torch.equal, torch.autograd.grad(y, tensors, grad), expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_under_autocast_is_cast_as_pytorch_casts_it(autocast):
    tensors = [draw(2, 4, 20, 8, seed=s, dtype=torch.float32).requires_grad_() for s in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, exact = compressed_attention(*tensors), F.scaled_dot_product_attention(*tensors)
    assert torch.equal(y, exact) and y.dtype == exact.dtype
    found, expected = (torch.autograd.grad(z.float().square().sum(), tensors) for z in (y, exact))
    assert max(errors(found, [e.double() for e in expected])) < 0.02


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_in_a_model(implementation):
    found = {}
    for words in (None, "attention"):
        model = tiny_vit(attn_implementation=implementation)
        config = LBPWHTConfig(r=10, grad_input_dtype="full", compress_activations=words)
        model = get_peft_model(model, config).train()
        found[words] = gradients(model, images())
    assert cosine(found[None], found["attention"]) > 0.999
    is_other = largest_difference(found["attention"], found[None]) > 1e-5
    assert is_other == (implementation == "sdpa")  # the other one calls matrix products


# Projected inputs


def saved_bytes(run):
    with saved_activations(nn.Module()) as saved:
        run()
    return saved.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tokens", "image"])
def test_projected_inputs(kind, dtype):
    basis, layout = BasisSet(10), TokenLayout((8, 8))
    x, weight = draw(2, 48, 8, 8, dtype=dtype), draw(32, 48, seed=1, dtype=dtype).requires_grad_()

    def run(eight):
        plan = BackwardPlan(layout, basis, saves_8_bits=eight)
        if kind == "image":
            return low_rank_pointwise_conv(x, weight[..., None, None], plan=plan)
        return low_rank_linear(x.flatten(2).mT, weight, plan=plan)

    assert torch.equal(run(True), run(False))
    found, expected = (
        torch.autograd.grad(run(eight), weight, draw(*run(False).shape, seed=2, dtype=dtype))[0].double()
        for eight in (True, False)
    )
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.015
    assert saved_bytes(lambda: run(True)) < (0.3 if dtype == torch.float32 else 0.56) * saved_bytes(lambda: run(False))


@pytest.mark.parametrize("method", [LoraConfig(r=2, init_lora_weights=False), LoraConfig(r=2, use_dora=True)])
def test_projected_inputs_of_other_methods(method):
    method.target_modules = {"q_proj", "fc1"}
    found = {}
    for words in (None, "projection"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_vit(), method)
        config = LBPWHTConfig(r=10, train_base_weight=False, grad_input_dtype="full", compress_activations=words)
        found[words] = gradients(get_peft_model(model, config).train(), images())
    assert cosine(found[None], found["projection"]) > 0.999
    assert largest_difference(found["projection"], found[None]) > 1e-5


# Under torch.compile


def test_compiled_graphs_keep_the_few_bits():
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    gelu = nn.GELU()
    table, plan = derivative_table(gelu), BackwardPlan(TokenLayout((8, 8)), BasisSet(10), saves_8_bits=True)
    parameters = [
        t.requires_grad_() for t in (draw(64, dtype=torch.float32), draw(96, 64, seed=1, dtype=torch.float32))
    ]

    def run(x):
        x = compressed_layer_norm(x, parameters[0], None, 1e-6)
        q = x.unflatten(-1, (2, 32)).transpose(1, 2)
        x = compressed_attention(q, 2 * q, q + 1).transpose(1, 2).flatten(2)
        return elementwise_function(gelu, low_rank_linear(x, parameters[1], plan=plan), table)

    x, sizes, found = draw(2, 64, 64, seed=2, dtype=torch.float32).requires_grad_(), [], []
    for each in (run, torch.compile(run, backend=backend, fullgraph=True)):
        with saved_activations(nn.ParameterList(parameters)) as saved:
            y = each(x)
        sizes.append(saved.bytes)
        found.append((y, *torch.autograd.grad(y, (x, *parameters), draw(*y.shape, seed=3, dtype=torch.float32))))
    for c, e in zip(*found, strict=True):
        assert (c - e).norm() < 0.01 * e.norm()
    assert sizes[1] < 1.1 * sizes[0] < 2 * 64 * 64 * 4 * 1.5  # the attention alone would otherwise save as much
