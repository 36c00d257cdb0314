"""Low-rank backpropagation combines with whatever else PyTorch does in a training step, or is exact instead."""

import contextlib
import copy
import gc
import shutil
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import (
    PatchMixer,
    disturb,
    forward,
    gradients,
    images,
    input_gradient,
    largest_difference,
    layers_of,
    outputs,
    tiny_vit,
    train,
)
from peft import get_peft_model
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from lbp_peft import LBPWHTConfig, exact_backward, layout_report
from lbp_peft.layout import compiled as compiled_layouts
from lbp_peft.measure import saved_activations


def adapted(build=tiny_vit, **settings):
    model = get_peft_model(build(), LBPWHTConfig(**({"r": 3} | input_gradient(3) | settings)))
    disturb(model)
    return model.train()


def exact_gradients(model, x):
    """The gradients of plain layers with the adapter's weights, by autograd's own linear."""
    plain = copy.deepcopy(model)
    for layer in layers_of(plain).values():
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight, layer.bias)
    return gradients(plain, x)


def saved_shapes(model, x):
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(model, x)
    return sorted(shapes)


# Where the gradients are exact


def test_full_rank_gives_exact_gradients_and_less_does_not():
    x = images()
    model = adapted(r=64, grad_input_rank=64)
    expected = exact_gradients(model, x)
    assert largest_difference(gradients(model, x), expected) < 1e-5
    assert all("as many rows as there are tokens" in why for why in layout_report(model).exact.values())
    # One basis fewer and they differ: the comparison can fail.
    for settings in ({"r": 63, "grad_input_rank": 64}, {"r": 64, "grad_input_rank": 63}):
        model = adapted(**settings)
        assert largest_difference(gradients(model, x), expected) > 1e-3
        assert len(layout_report(model).exact) < 12


def test_eval_mode_is_exact_and_saves_what_plain_layers_save():
    x = images()
    model = adapted()
    low_rank, expected = gradients(model, x), exact_gradients(model, x)
    shapes = saved_shapes(model, x)
    model.eval()
    assert largest_difference(gradients(model, x), expected) == 0
    assert largest_difference(low_rank, expected) > 1e-2
    plain = copy.deepcopy(model)
    for layer in layers_of(plain).values():
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight, layer.bias)
    assert saved_shapes(model, x) == saved_shapes(plain, x) != shapes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_noted_without_gradients(context):
    model = adapted()
    with context():
        logits = forward(model, images())
    assert torch.equal(logits, outputs(model, images()))
    assert set(layout_report(model).layers.values()) == {None}
    # Bases that a later training step needs can be saved for its backward pass.
    gradients(model, images())


def test_exact_backward_is_exact_and_ends():
    x = images()
    model = adapted()
    low_rank, expected = gradients(model, x), exact_gradients(model, x)
    with exact_backward(model):
        found = gradients(model, x)
        with exact_backward(model):
            pass
        assert largest_difference(gradients(model, x), found) == 0
    assert largest_difference(found, expected) == 0
    assert largest_difference(gradients(model, x), low_rank) == 0
    with contextlib.suppress(KeyError), exact_backward(model):
        raise KeyError
    assert largest_difference(gradients(model, x), low_rank) == 0


def test_exact_backward_is_decided_in_the_forward_pass():
    model = adapted()
    expected = exact_gradients(model, images())
    model.zero_grad()
    with exact_backward(model):
        logits = forward(model, images())
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits - goal).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(found, expected) == 0


def test_single_tokens_and_pooled_features_are_exact_without_a_warning(recwarn):
    model = adapted(PatchMixer, target_modules=["tokens0", "tokens1", "pooled"])
    gradients(model, images())
    exact = layout_report(model).exact
    assert exact == {"pooled": "its input has no token axis"}
    layer = layers_of(model)["base_model.model.pooled"]
    layer(torch.randn(2, 1, 12, requires_grad=True)).sum().backward()
    assert layout_report(model).exact["pooled"] == "its input has a single token"
    assert not [w for w in recwarn if "exact" in str(w.message)]


def test_the_forward_pass_is_that_of_the_plain_model_in_training_mode():
    model = adapted()
    assert torch.equal(forward(model, images()), outputs(model, images()))


# Ways of training


def test_double_backward_is_refused_with_the_remedy():
    model, x = adapted(), images().requires_grad_()
    (grad,) = torch.autograd.grad(forward(model, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*exact_backward"):
        grad.square().sum().backward()


def test_double_backward_works_where_gradients_are_exact():
    def second(model, x, context):
        with context:
            (grad,) = torch.autograd.grad(forward(model, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = images().requires_grad_()
    # The fused attention of PyTorch has no second derivative on the CPU.
    model = get_peft_model(tiny_vit(attn_implementation="eager"), LBPWHTConfig(r=3)).train()
    found = second(model, x, exact_backward(model))
    expected = second(tiny_vit(attn_implementation="eager").train(), x, contextlib.nullcontext())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    x = images()
    expected = gradients(adapted(), x)
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert largest_difference(gradients(model, x), expected) < 1e-6
    assert not layout_report(model).exact


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_evaluation_between_forward_and_checkpointed_backward_does_no_harm(reentrant):
    x = images()
    expected = gradients(adapted(), x)
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logits = forward(model, x)
    model.eval()
    with torch.no_grad():
        model(images(1, 64, 48), interpolate_pos_encoding=True)
    model.train()
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits - goal).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(found, expected) < 1e-6


def test_gradients_accumulate_over_half_batches():
    x = images(4)
    whole, halves = adapted(), adapted()
    forward(whole, x).square().sum().backward()
    for half in x.split(2):
        forward(halves, half).square().sum().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (halves, whole))
    assert largest_difference(found, expected) < 1e-4


def test_float64_and_float32_agree():
    x = images()
    expected = gradients(adapted().double(), x.double())
    assert all(g.dtype == torch.float64 for g in expected.values())
    assert largest_difference({n: g.double() for n, g in gradients(adapted(), x).items()}, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The forward pass is the plain one under autocast; gradients are off by its rounding only."""
    x = images()
    model = adapted()
    with torch.autocast("cpu", dtype):
        logits = forward(model, x)
        with exact_backward(model):
            assert torch.equal(logits, forward(model, x))
        found = gradients(model, x)
    assert all(g.dtype == torch.float32 for g in found.values())
    expected = gradients(model, x)
    keys = [n for n in expected if "k_proj" in n and "bias" in n]  # nothing but rounding
    for each in (found, expected):
        for name in keys:
            del each[name]
    assert largest_difference(found, expected) < 0.1
    with torch.autocast("cpu", dtype):
        losses = train(model, x)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("grad_input", ["full", 3, "int8"])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))],
)
def test_float16_with_a_scaler(device, grad_input):
    """Gradients are as near to those in float32 as plain autocast's, and a step that overflows is left out."""
    x = images().to(device)
    model = adapted(**input_gradient(grad_input)).to(device)
    expected = gradients(model, x)
    with exact_backward(model):
        exact = gradients(model, x)

    def scaled(scale):
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            logits = forward(model, x).float()
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).to(device)
        loss = (logits - goal).square().sum()  # as in `gradients`
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        scaler.step(optimizer)
        scaler.update()
        return found, scaler.get_scale()

    def distance(found, goal):
        missed = sum((found[n] - goal[n]).square().sum() for n in found)
        return (missed / sum(goal[n].square().sum() for n in found)).sqrt().item()

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found, scale = scaled(2.0**24)
    assert scale < 2.0**24
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with exact_backward(model):
        plain, _ = scaled(2.0**8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    found, scale = scaled(2.0**8)
    assert scale == 2.0**8
    assert distance(found, expected) < 2 * distance(plain, exact) + (0.01 if grad_input == "int8" else 0)


def test_functional_call_uses_the_weights_it_is_given():
    x = images()
    model, other = adapted(), adapted()
    disturb(other, seed=11)
    given = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters() if p.requires_grad}
    logits = torch.func.functional_call(model, given, (x,)).logits
    assert torch.equal(logits, forward(other, x))
    found = torch.autograd.grad(logits.square().sum(), list(given.values()))
    forward(other, x).square().sum().backward()
    expected = {n: other.get_parameter(n).grad for n in given}
    assert largest_difference(dict(zip(given, found, strict=True)), expected) == 0


def test_batches_of_any_size():
    model = adapted()
    for batch in (1, 3, 2):
        assert forward(model, images(batch)).shape == (batch, 5)
        gradients(model, images(batch))
    assert not layout_report(model).exact


class Counter:
    """A backend for torch.compile that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


def test_a_single_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    model = adapted(PatchMixer, target_modules=["tokens0"], grid_size=(8, 8))
    layer = layers_of(model)["base_model.model.tokens0"]
    counter = Counter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)

    def run(function):
        x = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}

    expected = {n: t.clone() for n, t in run(layer).items()}
    found = run(compiled)
    assert torch.equal(found["y"], expected["y"])
    assert largest_difference(found, expected) < 1e-6
    assert counter.graphs == 1


def one_block():
    return tiny_vit(num_hidden_layers=1)


def compiled_gradients(backend, dynamic=None, batches=(2,)):
    torch._dynamo.reset()
    model = adapted(one_block)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in batches:
        expected = gradients(model, images(batch))
        model.zero_grad()
        logits = forward(compiled, images(batch))
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
        (logits - goal).square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert largest_difference(found, expected) < 1e-3  # inductor rounds differently
        with exact_backward(model):  # so that equality says something
            assert largest_difference(gradients(model, images(batch)), expected) > 1e-2


@pytest.mark.parametrize("batches", [(2,), (2, 3)])
def test_a_whole_model_compiles_without_graph_breaks(batches):
    compiled_gradients("aot_eager", batches=batches)


def test_the_first_compiled_step_saves_what_later_ones_save():
    """The pass that finds the patches while the model is compiled belongs to no step."""
    torch._dynamo.reset()
    model = adapted(one_block)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    figures = []
    for _ in range(2):
        with saved_activations(model) as saved:
            logits = forward(compiled, images(2))
        logits.sum().backward()
        figures.append(saved.bytes)
    assert figures[0] == figures[1] > 0


def test_the_pass_that_finds_patches_leaves_nothing_behind():
    """Not even where an operation saves its result, as softmax does, and no backward pass follows."""
    model = adapted(one_block)
    model.get_base_model().set_attn_implementation("eager")
    parameter = weakref.ref(next(parameter for parameter in model.parameters() if parameter.requires_grad))
    compiled_layouts._run_eagerly(model, {"pixel_values": ((3, 32, 32), torch.float32)})
    del model
    gc.collect()
    assert parameter() is None


def test_a_model_compiles_where_hooks_on_saved_tensors_are_refused():
    torch._dynamo.reset()
    model = adapted(one_block)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"), warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled_layouts._run_eagerly(model, {"pixel_values": ((3, 32, 32), torch.float32)})
    assert not layout_report(model).exact


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_whole_model_compiles_with_inductor():
    compiled_gradients("inductor")


# train_base_weight=False


def test_without_weights_of_its_own_earlier_parameters_get_low_rank_gradients():
    x = images()

    def build(**settings):
        config = {"train_base_weight": False, "modules_to_save": ["classifier", "layernorm_before"], **settings}
        return get_peft_model(tiny_vit(), LBPWHTConfig(**config)).train()

    model = build(grad_input_rank=3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("modules_to_save" in name for name in trainable)
    found, exact = gradients(model, x), exact_gradients(model, x)
    assert not layout_report(model).exact
    assert {ran.grad_input_rows for ran in layout_report(model).layers.values()} == {4}
    assert largest_difference(found, exact) > 1e-2
    for name in found:  # no low-rank layer follows the head
        if "classifier" in name:
            assert torch.equal(found[name], exact[name])
    exact_model = build(**input_gradient("full"))
    assert largest_difference(gradients(exact_model, x), exact) == 0
    assert len(layout_report(exact_model).exact) == 12


def test_without_weights_of_its_own_the_input_is_not_saved():
    given = {"grid_size": (8, 8), "num_prefix_tokens": 1}  # a layer that is called by itself cannot find its grid
    model = get_peft_model(tiny_vit(), LBPWHTConfig(train_base_weight=False, grad_input_rank=3, **given)).train()
    layer = layers_of(model)["base_model.model.vit.layers.0.mlp.fc1"]
    tokens = torch.randn(2, 65, 32, requires_grad=True)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(tokens)
    assert shapes == [(64, 32)]


def test_without_weights_of_its_own_training_moves_the_rest():
    config = LBPWHTConfig(
        train_base_weight=False, grad_input_rank=10, modules_to_save=["classifier", "layernorm_before"]
    )
    model = get_peft_model(tiny_vit(), config)
    losses = train(model, images(), steps=4)
    assert losses[-1] < losses[0]
    assert not layout_report(model).exact


@pytest.mark.parametrize("settings", [{"batch_first": True}, {"batch_first": True, "norm_first": True}])
def test_encoders_that_read_weights_instead_of_calling_layers_see_the_adapted_ones(settings):
    """PyTorch's own encoder layer has a fused path in eval mode, which reads linear1.weight."""
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **settings)
    x = torch.randn(2, 9, 16)
    model = get_peft_model(base, LBPWHTConfig(target_modules=["linear1", "linear2", "out_proj"]))
    disturb(model)
    in_training = model.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), in_training, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert (model(x) - in_training).norm() > 1e-2
    torch.testing.assert_close(outputs(model.merge_and_unload(), x), in_training, rtol=1e-4, atol=1e-5)
