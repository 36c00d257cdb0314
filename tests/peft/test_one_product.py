"""A stack on LoRA may run its forward pass as one product with the sum of the matrices: when, and how exactly."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from models import forward, images, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lbp_peft import LBPWHTConfig, heuristics, layout_report
from lbp_peft.ops import linear, summed_weight

C_IN, C_OUT = 48, 32


class Tokens(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.lin = nn.Linear(C_IN, C_OUT, dtype=dtype)

    def forward(self, x):
        return self.lin(x)


def tokens(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 64, C_IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def stack(*loras, base=None, size=0.2, dtype=torch.float32, **settings):
    """LBP-WHT on LoRA adapters that are active together and have random weights."""
    torch.manual_seed(0)
    loras = loras or (LoraConfig(r=4, target_modules=["lin"]),)
    model = get_peft_model(base or Tokens(dtype), loras[0], autocast_adapter_dtype=False)
    for index, config in enumerate(loras[1:]):
        model.add_adapter(f"more{index}", config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(model.peft_config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape))
    config = LBPWHTConfig(**{"train_base_weight": False, "grid_size": (8, 8), "r": 3, **settings})
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def host(model):
    return model.base_model.model.lin


def with_branch(layer, x):
    return type(layer).plain_class.forward(layer, x)


def with_sum(layer, x):
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    for name in layer.active_adapters:
        factors = layer.lora_B[name].weight, layer.lora_A[name].weight
        weight = torch.addmm(weight, *factors, alpha=layer.scaling[name])
        if layer.lora_B[name].bias is not None:
            bias = bias + layer.lora_B[name].bias * layer.scaling[name]
    return F.linear(x, weight, bias)


@pytest.mark.parametrize(
    "loras",
    [
        [{}],
        [{"use_rslora": True, "lora_alpha": 3}],
        [{"lora_bias": True}, {"r": 2, "lora_alpha": 1}],
    ],
)
def test_the_default_is_one_product_and_exact_forward_gives_loras_bits(loras):
    configs = [LoraConfig(target_modules=["lin"], **settings) for settings in loras]
    x = tokens()
    layer = host(stack(*configs))
    y = layer(x)
    assert torch.equal(y, with_sum(layer, x)) and not torch.equal(y, with_branch(layer, x))
    layer = host(stack(*configs, exact_forward=True))
    assert torch.equal(layer(x), with_branch(layer, x))


def test_the_branches_are_kept_where_they_are_needed():
    x = tokens()
    dropout = host(stack(LoraConfig(r=4, target_modules=["lin"], lora_dropout=0.3)))
    torch.manual_seed(3)
    y = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(y, with_branch(dropout, x))
    dora = host(stack(LoraConfig(r=4, target_modules=["lin"], use_dora=True)))
    assert torch.equal(dora(x), with_branch(dora, x))
    half = host(stack(dtype=torch.float16))
    assert torch.equal(half(x.half()), with_branch(half, x.half()))
    model = stack()
    layer = host(model)
    with model.disable_adapter():
        assert torch.equal(model(x), F.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    mixed = {"adapter_names": ["default", "__base__"]}
    model.eval()
    assert torch.equal(layer(x, **mixed), type(layer).plain_class.forward(layer, x, **mixed))


def test_in_float32_one_product_is_as_exact_as_the_branches():
    x = tokens()
    for size in (1e-4, 1e-2, 1.0):  # of the update
        layer = host(stack(size=size))
        with torch.no_grad():
            found, branch = layer(x), with_branch(layer, x)
            exact = with_branch(layer.double(), x.double())
        assert (found - exact).norm() < 1.1 * (branch - exact).norm()


def test_under_autocast_the_sum_is_made_in_float32():
    """Updates far below the spacing of bfloat16 at the weights would be lost if the weights were rounded first."""
    x = tokens(8)
    layer = host(stack(size=1e-3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        branch = with_branch(layer, x).double()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    found.float().sum().backward()
    with torch.no_grad():
        sums = summed_weight.summed_weight(
            layer.base_layer.weight,
            [layer.lora_A["default"].weight.bfloat16(), layer.lora_B["default"].weight.bfloat16()],
            [layer.scaling["default"]],
            torch.bfloat16,
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found, F.linear(x, sums, layer.base_layer.bias))
        exact = with_branch(layer.double(), x.double())
    assert found.dtype == torch.bfloat16 and layer.lora_A["default"].weight.grad is not None
    assert (found.double() - exact).norm() < 1.1 * (branch - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_rounded_sum_is_made_some_rows_at_a_time(monkeypatch, dtype, transposed):
    """Of two adapters, with parts that do not divide the rows: the same as the whole sum, rounded once."""
    monkeypatch.setattr(summed_weight, "_ELEMENTS_AT_ONCE", 5 * C_IN + 3)
    monkeypatch.setattr(summed_weight, "_ELEMENTS_OF_SMALL_SUM", 0)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    weight = draw(C_IN, C_OUT).t() if transposed else draw(C_OUT, C_IN)
    factors = [draw(2, C_IN), draw(C_OUT, 2), draw(3, C_IN).bfloat16(), draw(C_OUT, 3).bfloat16()]
    calls = []
    original = summed_weight._rounded_sum
    monkeypatch.setattr(summed_weight, "_rounded_sum", lambda *given: calls.append(1) or original(*given))
    sums = summed_weight.summed_weight(weight, factors, [0.5, -2.0], torch.bfloat16)
    exact = weight.double()
    for down, up, scaling in zip(factors[::2], factors[1::2], [0.5, -2.0], strict=True):
        exact = exact + scaling * up.double() @ down.double()
    assert calls and sums.dtype == torch.bfloat16
    torch.testing.assert_close(sums.double(), exact, rtol=2**-8 * 1.01, atol=1e-6)
    empty = summed_weight.summed_weight(weight[:0], [factors[0], factors[1][:0]], [1.0], torch.bfloat16)
    assert empty.shape == (0, C_IN)
    narrow = weight.bfloat16()
    assert summed_weight.summed_weight(narrow, [], [], torch.bfloat16) is narrow
    assert len(calls) == 1


def test_in_a_dispatch_mode_no_buffer_is_written_twice(monkeypatch):
    """Selective checkpointing may keep the results of operations, and raises if they are changed in place."""
    monkeypatch.setattr(summed_weight, "_ELEMENTS_OF_SMALL_SUM", 0)
    calls, original = [], summed_weight._rounded_sum
    monkeypatch.setattr(summed_weight, "_rounded_sum", lambda *given: calls.append(1) or original(*given))

    class Written(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.names.append(str(operation))
            return operation(*args, **kwargs or {})

    weight, factors = torch.randn(C_OUT, C_IN), [torch.randn(2, C_IN), torch.randn(C_OUT, 2)]
    plain = summed_weight.summed_weight(weight, factors, [0.5], torch.bfloat16)
    with Written():
        found = summed_weight.summed_weight(weight, factors, [0.5], torch.bfloat16)
    assert len(calls) == 1  # outside of the mode
    assert any("addmm" in name for name in Written.names)
    assert not any("addmm.out" in name or "copy_." in name for name in Written.names)
    torch.testing.assert_close(found, plain, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"grad_input_rank": 3}, {"grad_input_dtype": "int8"}])
def test_gradients_do_not_depend_on_the_way(settings, monkeypatch):
    summed = []
    original = linear.weight_in_backward
    monkeypatch.setattr(linear, "weight_in_backward", lambda w, f, *a: summed.append(bool(f)) or original(w, f, *a))
    grads = []
    for exact_forward in (False, True):
        model, x = stack(exact_forward=exact_forward, **settings), tokens()
        generator = torch.Generator().manual_seed(5)
        model(x).backward(torch.randn(2, 64, C_OUT, generator=generator))
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append([x.grad, *(p.grad for p in trained)])
    assert any(summed) == (not settings)  # few rows are multiplied, or a rounded copy of W is kept
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 if settings else 1e-6)


@pytest.mark.parametrize("frozen", ["default", "more0"])
@pytest.mark.parametrize("exact_forward", [False, True])
def test_a_frozen_adapter_beside_a_trained_one(frozen, exact_forward):
    """Both are in the forward pass and in the input gradient, and only one gets a gradient.

    All tokens of an image are equal, so that the first Walsh function holds them and low-rank gradients are exact.
    """
    configs = (LoraConfig(r=4, target_modules=["lin"]), LoraConfig(r=2, lora_alpha=3, target_modules=["lin"]))
    model = stack(*configs, dtype=torch.float64, exact_forward=exact_forward, grad_input_dtype="full")
    layer = host(model)
    factors = {name: (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in layer.active_adapters}
    for factor in factors[frozen]:
        factor.requires_grad = False
    x = tokens(dtype=torch.float64).detach()[:, :1].repeat(1, 64, 1).requires_grad_()
    given = torch.randn(2, 64, C_OUT, dtype=torch.float64)
    y = model(x)
    assert {ran.grad_weight_rows for ran in layout_report(model).layers.values()} == {3}
    y.backward(given)
    weight = layer.base_layer.weight + sum(layer.scaling[name] * up @ down for name, (down, up) in factors.items())
    torch.testing.assert_close(y, F.linear(x, weight, layer.base_layer.bias))
    torch.testing.assert_close(x.grad, given @ weight)
    assert all(factor.grad is None for factor in factors[frozen])
    (trained,) = factors.keys() - {frozen}
    (down, up), scaling = factors[trained], layer.scaling[trained]
    full = given.flatten(0, 1).t() @ x.flatten(0, 1)
    torch.testing.assert_close(down.grad, scaling * up.t() @ full)
    torch.testing.assert_close(up.grad, scaling * full @ down.t())


def saved_bytes(model, x):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    return y, sum(seen.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_compiled_graph_saves_no_weights(stacked, bf16):
    """It saves neither the sum nor a copy in bfloat16, which the compiler would keep from the forward pass."""
    torch.compiler.reset()
    if stacked:
        model = stack(grad_input_dtype="full")
    else:
        config = LBPWHTConfig(target_modules=["lin"], grid_size=(8, 8), r=3, grad_input_dtype="full")
        model = get_peft_model(Tokens(), config).train()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    found = []
    for run in (model, compiled):
        x = tokens()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            run(x)  # the layout is found, the graph made
            y, saved = saved_bytes(run, x)
        y.float().square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((y, saved, [x.grad, *grads]))
    (y, eager, grads), (compiled_y, kept, compiled_grads) = found
    torch.testing.assert_close(compiled_y, y, rtol=1e-2 if bf16 else 1e-5, atol=1e-2 if bf16 else 1e-5)
    for one, other in zip(compiled_grads, grads, strict=True):
        assert (one - other).norm() < (0.02 if bf16 else 1e-5) * other.norm()
    assert kept < eager + C_IN * C_OUT, (kept, eager)


def test_checkpointing_and_shared_weights():
    """The blocks of the model share their base weights and are run again in the backward pass."""
    found = []
    for checkpointing in (False, True):
        vit = tiny_vit(num_hidden_layers=2)
        vit.vit.layers[1].mlp.fc1.weight = vit.vit.layers[0].mlp.fc1.weight
        lora = LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
        torch.manual_seed(2)
        model = get_peft_model(get_peft_model(vit, lora), LBPWHTConfig(train_base_weight=False, r=3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        forward(model, images()).square().sum().backward()
        found.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for one, other in zip(*found, strict=True):
        assert one.norm() > 0 and torch.equal(one, other)


def test_other_heuristics_decide():
    class Never(heuristics.Heuristics):
        def sum_weights(self, rows, out_features, in_features):
            return False

    layer, x = host(stack()), tokens()
    with heuristics.using(Never()):
        assert torch.equal(layer(x), with_branch(layer, x))
