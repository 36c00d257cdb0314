"""Attention with a backward pass of matrix products: gradients, the cases that are left to PyTorch, and models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from comparing import cosine
from models import forward, gradients, images, largest_difference, patches_of, tiny_vit
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn, overrides
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.overrides import BaseTorchFunctionMode

from lbp_peft import LBPWHTConfig, exact_backward
from lbp_peft import heuristics as cost
from lbp_peft.ops import attention
from lbp_peft.tuner.patches import attention_patch
from lbp_peft.tuner.patches.attention_patch import AttentionPatch
from lbp_peft.tuner.patches.forward_patch import PATCH_ATTR

SHAPES = [  # N, heads, L, S, d, d_v
    (2, 3, 65, 65, 16, 16),
    (1, 2, 20, 33, 8, 24),
    (1, 2, 33, 1, 8, 8),
    (1, 2, 197, 197, 64, 64),
]


@pytest.fixture(autouse=True)
def multiplies_bf16(monkeypatch):
    """Have the package assume instructions for bfloat16, whatever the processor has."""
    for module in (cost, attention_patch):
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: True)


@pytest.fixture
def used(monkeypatch):
    """The shapes of the queries whose attention had a backward pass of matrix products."""
    seen, plain = [], attention._gradients

    def noting(query, *others):
        seen.append(tuple(query.shape))
        return plain(query, *others)

    monkeypatch.setattr(attention, "_gradients", noting)
    return seen


def draw(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(batch, heads, queries, keys, d, d_v):
    """A query, a key and a value, and the gradient of the result."""
    shapes = (queries, d), (keys, d), (keys, d_v)
    tensors = [draw(batch, heads, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    return tensors, draw(batch, heads, queries, d_v, seed=3)


def in_float64(tensors, grad, scale=None):
    q, k, v = (t.detach().double().requires_grad_() for t in tensors)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.autograd.grad(logits.softmax(-1) @ v, (q, k, v), grad.double())


def errors(found, expected):
    scale = max(e.norm() for e in expected)  # of a single key those of query and key vanish
    return [((f.double() - e).norm() / scale).item() for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("scale", [None, -0.3, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forward_pass_is_pytorchs_and_the_backward_pass_as_near_to_the_truth(shape, scale, used):
    tensors, grad = problem(*shape)
    y = attention.attention(*tensors, scale=scale)
    plain = F.scaled_dot_product_attention(*tensors, scale=scale)
    assert torch.equal(y, plain)
    found, fused = (torch.autograd.grad(z, tensors, grad) for z in (y, plain))
    assert len(used) == 1
    assert all(f.dtype == torch.bfloat16 and f.shape == t.shape for f, t in zip(found, tensors, strict=True))
    expected = in_float64(tensors, grad, scale)
    for ours, theirs in zip(errors(found, expected), errors(fused, expected), strict=True):
        assert ours < 2**-9 + 1.5 * theirs  # half a step of bfloat16


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_what_all_values_have_in_common_costs_no_precision(shape):
    """The common part cancels. If it were subtracted after rounding, a tenth of the gradient would be wrong."""
    (query, key, value), grad = problem(*shape)
    tensors = query, key, (value.detach() + 30).requires_grad_()
    found = torch.autograd.grad(attention.attention(*tensors), tensors, grad)
    for f, e in zip(found, in_float64(tensors, grad), strict=True):
        assert (f.double() - e).norm() < 6e-3 * e.norm()


def test_tensors_need_not_be_contiguous():
    """Layers produce (N, L, heads, d) with two axes exchanged."""
    tensors, grad = problem(2, 3, 20, 33, 8, 8)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*tensors, grad)]
    expected = torch.autograd.grad(attention.attention(*tensors), tensors, grad)
    found = torch.autograd.grad(attention.attention(*turned[:3]), tensors, turned[3])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    (of_value,) = torch.autograd.grad(
        attention.attention(*(t.detach() for t in tensors[:2]), tensors[2]), tensors[2], grad
    )
    assert torch.equal(of_value, expected[2])


@pytest.mark.parametrize("entries", [1, 2 * 20 * 33, 4 * 20 * 33 + 5, 2**20])
def test_a_few_heads_at_a_time(entries, monkeypatch):
    tensors, grad = problem(1, 7, 20, 33, 8, 24)
    monkeypatch.setattr(attention, "_ENTRIES_AT_ONCE", entries)
    found = torch.autograd.grad(attention.attention(*tensors), tensors, grad)
    assert max(errors(found, in_float64(tensors, grad))) < 6e-3


def changed(**settings):
    return {"shapes": [(2, 4, 20, 8)] * 3, "dtype": torch.bfloat16} | settings


PLAIN = {
    "mask": changed(attn_mask=torch.ones(20, 20, dtype=torch.bool).tril()),
    "dropout": changed(dropout_p=0.3),
    "causal": changed(is_causal=True),
    "no scale": changed(scale=0.0),
    "gqa": changed(enable_gqa=True, shapes=[(2, 4, 20, 8), (2, 2, 20, 8), (2, 2, 20, 8)]),
    "float32": changed(dtype=torch.float32),
    "many keys": changed(shapes=[(1, 2, 4, 8), (1, 2, 601, 8), (1, 2, 601, 8)]),
    "broadcast": changed(shapes=[(2, 4, 20, 8), (1, 4, 20, 8), (1, 4, 20, 8)]),
    "three axes": changed(shapes=[(4, 20, 8)] * 3),
}


@pytest.mark.parametrize("case", PLAIN)
def test_all_else_is_left_to_pytorch(case, used):
    settings = dict(PLAIN[case])
    shapes, dtype = settings.pop("shapes"), settings.pop("dtype")
    tensors = [draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]

    def run(function):
        torch.manual_seed(0)
        y = function(*tensors, **settings)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    found, expected = run(attention.attention), run(F.scaled_dot_product_attention)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert not used


def test_it_is_left_to_pytorch_too_where_products_are_not_faster_or_nothing_goes_backward(monkeypatch):
    tensors, _ = problem(*SHAPES[0])
    name = "_AttentionBackward"
    assert type(attention.attention(*tensors).grad_fn).__name__ == name
    with torch.no_grad():
        assert attention.attention(*tensors).grad_fn is None
    assert attention.attention(*(t.detach() for t in tensors)).grad_fn is None
    monkeypatch.setattr(cost, "multiplies_bf16", lambda device: False)
    assert type(attention.attention(*tensors).grad_fn).__name__ != name


@pytest.mark.skipif(
    Version(torch.__version__).release < (2, 13), reason="PyTorch 2.11 divides by zero for empty tensors and ends"
)
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
def test_there_may_be_nothing_to_attend_to(shape):
    tensors = [draw(*shape).requires_grad_() for _ in range(3)]
    attention.attention(*tensors).sum().backward()
    assert all(t.grad.shape == shape for t in tensors)


def test_only_query_key_and_value_are_saved():
    tensors, _ = problem(*SHAPES[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        attention.attention(*tensors)
    assert kept == [t.data_ptr() for t in tensors]


def test_second_derivatives_are_refused():
    tensors, grad = problem(*SHAPES[1])
    (first,) = torch.autograd.grad(attention.attention(*tensors), tensors[0], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_a_backward_pass_within_autocast_is_the_same():
    tensors, grad = problem(*SHAPES[0])
    expected = torch.autograd.grad(attention.attention(*tensors), tensors, grad)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(attention.attention(*tensors), tensors, grad)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# In a model


def adapted(base=tiny_vit, **settings):
    return get_peft_model(base(), LBPWHTConfig(**({"r": 10, "grad_input_dtype": "full"} | settings))).train()


def in_bf16(model):
    """The gradients when the forward pass runs under autocast."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = forward(model, images())
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits.float() - goal).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def those_inside(model):
    return patches_of(model, AttentionPatch)


def test_the_blocks_of_an_adapted_model_use_it(used, monkeypatch):
    model = adapted()
    found = in_bf16(model)
    assert used == 2 * [(2, 2, 65, 16)]
    monkeypatch.setattr(attention_patch, "multiplies_bf16", lambda device: False)
    assert cosine(in_bf16(model), found) > 0.9999 and len(used) == 2


def test_so_do_models_in_bfloat16(used):
    gradients(adapted(lambda: tiny_vit().to(torch.bfloat16)), images().to(torch.bfloat16))
    assert len(used) == 2


def test_after_one_pass_only_attention_is_watched():
    model = adapted()
    inside_of = those_inside(model)
    assert len(inside_of) == 4 and not any(inside._without_attention for inside in inside_of.values())
    in_bf16(model)
    found = {name.rpartition(".")[2]: bool(inside._without_attention) for name, inside in inside_of.items()}
    assert found == {"attention": False, "mlp": True}


def test_operations_of_adapted_layers_are_not_watched(used, monkeypatch):
    seen, original = [], attention.AttentionMode.__torch_function__

    def noting(self, function, *others):
        seen.append(function)
        return original(self, function, *others)

    monkeypatch.setattr(attention.AttentionMode, "__torch_function__", noting)
    model = adapted()
    in_bf16(model)  # in which the modules without attention are watched too
    seen.clear()
    in_bf16(model)
    assert seen.count(F.scaled_dot_product_attention) == 2 and len(used) == 4
    assert F.linear not in seen and torch.bmm not in seen


def test_only_the_mode_of_attention_is_left():
    with attention.AttentionMode(attention.attention) as mode:
        with attention.outside_attention_mode():
            assert overrides._get_current_function_mode() is None
        assert overrides._get_current_function_mode() is mode
        with BaseTorchFunctionMode() as other, attention.outside_attention_mode():
            assert overrides._get_current_function_mode() is other


def test_only_blocks_with_adapted_layers(used):
    model = adapted(target_modules=r".*layers\.1\.attention\.q_proj", modules_to_save=["layernorm_before"])
    in_bf16(model)
    assert len(used) == 1 and all("layers.1" in name for name in those_inside(model))


class InTurn(nn.Module):
    """Like nn.Sequential, without being one."""

    def __init__(self, *layers):
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def test_a_host_that_calls_all_its_children_finds_only_its_own():
    def build():
        return nn.ModuleDict({"blocks": nn.ModuleList([InTurn(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))])})

    model = adapted(build, grid_size=(8, 8), num_prefix_tokens=0)
    (block,) = model.base_model.model["blocks"]
    assert len(those_inside(model)) == 1
    block(draw(2, 64, 12, dtype=torch.float32)).sum().backward()


def test_other_modes_are_left_to_pytorch(used):
    model = adapted()
    gradients(model, images())  # in float32
    with exact_backward(model):
        in_bf16(model)
    with model.disable_adapter():
        x = images().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            forward(model, x).sum().backward()
    in_bf16(model.eval())
    assert not used
    in_bf16(model.train())
    assert len(used) == 2


def test_the_forward_pass_is_that_of_the_plain_model():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(adapted(), images()), forward(tiny_vit().train(), images()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant, used):
    expected = in_bf16(adapted())
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    used.clear()
    assert largest_difference(in_bf16(model), expected) < 1e-5
    assert len(used) == 2


def test_in_a_compiled_model():
    torch._dynamo.reset()
    model = adapted(grid_size=(8, 8), num_prefix_tokens=1)
    module, x = model.base_model.model.vit.layers[0].attention, draw(2, 65, 32)
    backward_passes, found = [], []

    def keeping(graph, _):
        backward_passes.append(graph.code)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=keeping)
    for run in (module, torch.compile(module, backend=backend, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            run(x)[0].float().square().sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert len(backward_passes) == 1 and "attention" not in backward_passes[0] and "softmax" in backward_passes[0]
    assert cosine(*found) > 0.9999


@pytest.mark.skipif(
    Version(torch.__version__).release < (2, 13), reason="the compiler of torch 2.11 makes a graph for each batch size"
)
def test_compiled_batches_of_many_sizes_need_one_graph():
    torch._dynamo.reset()
    graphs = []
    model = adapted(grid_size=(8, 8), num_prefix_tokens=1)
    backend = aot_autograd(
        fw_compiler=lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
    )
    module = model.base_model.model.vit.layers[0].attention
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for batch in (2, 3, 5):
        x, found = draw(batch, 65, 32), []
        torch._dynamo.mark_dynamic(x, 0)
        for run in (module, compiled):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                run(x)[0].float().square().sum().backward()
            found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        assert cosine(*found) > 0.9999
    assert len(graphs) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_work_on_their_own(how, used):
    model = adapted()
    expected = in_bf16(model)
    again = how(model)
    assert {inside.block for inside in those_inside(again).values()} == set(again.base_model.model.vit.layers)
    model.base_model.disable_adapter_layers()
    used.clear()
    assert largest_difference(in_bf16(again), expected) == 0
    assert len(used) == 2


@pytest.mark.parametrize("take_out", ["unload", "merge_and_unload"])
def test_it_goes_with_the_adapter(take_out, used):
    base = getattr(adapted(), take_out)()
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_vit().modules()]
    assert not any(hasattr(m, PATCH_ATTR) for m in base.modules())
    in_bf16(base.train().requires_grad_(True))
    assert not used


def test_the_active_adapter_decides(used):
    """An adapter that adapts no layer of a block leaves the block's attention alone."""
    model = adapted(target_modules=r".*layers\.0\..*_proj", modules_to_save=["classifier"])
    model.add_adapter("other", LBPWHTConfig(r=10, grad_input_dtype="full", target_modules=r".*layers\.1\..*_proj"))
    for name in ("default", "other"):
        model.set_adapter(name)
        used.clear()
        in_bf16(model)
        assert len(used) == 1, name


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1"]])
def test_on_lora(targets, used):
    lora = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model = get_peft_model(lora, LBPWHTConfig(r=10, grad_input_dtype="full", train_base_weight=False)).train()
    found = in_bf16(model)
    # In the first block, the adapter of "fc1" trains nothing before the MLP.
    assert len(used) == (2 if "q_proj" in targets else 1)
    with exact_backward(model):
        assert cosine(found, in_bf16(model)) > 0.8


def test_outputs_that_are_asked_for(used):
    model, plain = adapted(), tiny_vit().train()
    settings = {"output_attentions": True, "output_hidden_states": True}
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(images(), **settings) for m in (model, plain))
    assert torch.equal(found.logits, expected.logits)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert all(torch.equal(f, e) for f, e in zip(found.hidden_states, expected.hidden_states, strict=True))
    assert (found.attentions is None) == (expected.attentions is None)


def test_eager_attention_is_not_its_business(used):
    model = adapted(lambda: tiny_vit(attn_implementation="eager"))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(), output_attentions=True)
    assert len(found.attentions) == 2 and found.attentions[0].shape == (2, 2, 65, 65)
    in_bf16(model)
    assert not used and all(inside._without_attention for inside in those_inside(model).values())
    model.base_model.model.set_attn_implementation("sdpa")
    in_bf16(model)
    assert len(used) == 2


def test_timm(used):
    timm = pytest.importorskip("timm")
    model = adapted(lambda: timm.create_model("test_vit", img_size=64, num_classes=5))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(2, 64)).float().square().sum().backward()
    assert used
