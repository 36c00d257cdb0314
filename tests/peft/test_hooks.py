"""Hooks and replaced forward methods run as before, whether they were attached before or after a layer is adapted."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from mixers import ConvMLP, Mixer
from models import MLP, Case, disturb, forward, gradients, images, largest_difference, layers_of, tiny_vit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from lbp_peft import BasisSet, ExactProduct, FixedBasis, LBPWHTConfig, exact_backward, layout_report

LORA = {"r": 4, "target_modules": ["o_proj", "fc1"], "init_lora_weights": False}
WAYS = {
    "alone": lambda: LBPWHTConfig(r=6, grad_input_dtype="full", target_modules=["o_proj", "fc1"]),
    "int8": lambda: LBPWHTConfig(r=6, grad_input_dtype="int8", target_modules=["o_proj", "fc1"]),
    "frozen": lambda: LBPWHTConfig(r=6, grad_input_rank=6, target_modules=["o_proj", "fc1"], train_base_weight=False),
    "LoRA": lambda: LBPWHTConfig(r=6, grad_input_rank=6, train_base_weight=False, stack_on=LoraConfig(**LORA)),
    "LoRA, int8": lambda: LBPWHTConfig(
        r=6, grad_input_dtype="int8", train_base_weight=False, stack_on=LoraConfig(**LORA)
    ),
    "DoRA": lambda: LBPWHTConfig(
        r=6, grad_input_rank=6, train_base_weight=False, stack_on=LoraConfig(**LORA, use_dora=True)
    ),
}  # fmt: skip
alone_and_stacked = pytest.mark.parametrize("way", WAYS)


def adapted(base, way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return get_peft_model(base, WAYS[way]()).train()


def layer_in(model):
    """The plain layer in a model that is adapted or not."""
    found = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("layers.1.attention.o_proj")))
    while hasattr(found, "base_layer"):
        found = found.base_layer
    return found


def shapes(gradients):
    return [None if g is None else g.shape for g in gradients]


def all_gradients(model):
    """The gradients, including those of the images: where all weights are frozen there are no others."""
    x = images().requires_grad_()
    return gradients(model, x) | {"images": x.grad}


def note_calls(layer, calls):
    layer.register_forward_pre_hook(lambda m, args: calls.append(("before", m, args[0].shape)))
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(("before, kwargs", m, args[0].shape, tuple(kwargs))), with_kwargs=True
    )
    layer.register_forward_hook(lambda m, args, y: calls.append(("after", m, y.shape)))
    layer.register_forward_hook(
        lambda m, args, kwargs, y: calls.append(("after, kwargs", m, y.shape, tuple(kwargs))), with_kwargs=True
    )
    layer.register_full_backward_pre_hook(lambda m, g: calls.append(("backward, before", m, shapes(g))))
    layer.register_full_backward_hook(lambda m, g, h: calls.append(("backward", m, shapes(g), shapes(h))))


def names(calls):
    return [(kind, *rest) for kind, _, *rest in calls]


def change_output(layer):
    layer.register_forward_hook(lambda m, args, y: y * torch.linspace(0.5, 2, y.shape[-1]))


def change_input(layer):
    layer.register_forward_pre_hook(lambda m, args: (args[0] * torch.linspace(0.5, 2, args[0].shape[-1]),))


def change_keyword_input(layer):
    layer.register_forward_pre_hook(lambda m, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)


def replace_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 3 * plain(x)


def prune_half(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


CHANGES = [
    change_output, change_input, change_keyword_input, replace_forward, prune_half, parametrizations.weight_norm,
    parametrizations.orthogonal, nn.utils.weight_norm,
]  # fmt: skip


@alone_and_stacked
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_each_call_once(way, when):
    """They see the arguments, the results and the gradients that they see in the plain model."""
    expected, base = [], tiny_vit()
    note_calls(layer_in(base), expected)
    x = images().requires_grad_()
    forward(base, x).sum().backward()
    calls, base = [], tiny_vit()
    if when == "before":
        note_calls(layer_in(base), calls)
    model = adapted(base, way)
    if when == "after":
        note_calls(layer_in(model), calls)
    for mode in (True, False):
        calls.clear()
        forward(model.train(mode), images().requires_grad_()).sum().backward()
        assert names(calls) == names(expected) and all(m is layer_in(model) for _, m, *_ in calls)
    calls.clear()
    with model.disable_adapter(), torch.no_grad():
        forward(model, images())
    assert names(calls) == names(expected)[:4]


@alone_and_stacked
@pytest.mark.parametrize("change", CHANGES)
def test_wrapping_does_not_change_what_a_changed_layer_puts_out(way, change):
    base = tiny_vit()
    change(layer_in(base))
    expected = forward(base.eval(), images())
    assert not torch.equal(expected, forward(tiny_vit().eval(), images()))
    model = adapted(base, way)
    for mode in (True, False):
        with model.disable_adapter():
            assert torch.equal(forward(model.train(mode), images()), expected)
        if "LoRA" not in way and "DoRA" not in way:  # the adapter was initialised to change the output
            torch.testing.assert_close(forward(model.train(mode), images()), expected, rtol=0, atol=1e-6)
    outputs = [forward(model.train(mode), images()) for mode in (True, False)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@alone_and_stacked
@pytest.mark.parametrize("change", [change_output, change_input, replace_forward])
def test_gradients_of_a_changed_layer_are_exact_at_full_rank(way, change):
    base = tiny_vit()
    change(layer_in(base))
    model = adapted(base, way)
    for layer in layers_of(model).values():
        rule = layer.lbpwht_rule["default"]
        whole = BasisSet(64)
        input_gradient = FixedBasis(whole) if isinstance(rule.input_gradient, FixedBasis) else ExactProduct()
        layer.lbpwht_rule["default"] = type(rule)(whole, input_gradient)
    found = all_gradients(model)
    with exact_backward(model):
        assert largest_difference(found, all_gradients(model)) < 1e-5


@alone_and_stacked
def test_the_backward_pass_stays_low_rank_under_hooks(way):
    """Gradients equal those without hooks; layers that would have to run again have exact ones, with a warning."""
    plain, watched = adapted(tiny_vit(), way), adapted(tiny_vit(), way)
    note_calls(layer_in(watched), [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = all_gradients(watched)
    expected = all_gradients(plain)
    told = [str(w.message) for w in caught if "hooks" in str(w.message)]
    assert all("layers.1.attention.o_proj" in message for message in told)
    report = layout_report(watched)
    exact = report.exact.keys() - layout_report(plain).exact.keys()
    assert len(told) == len(exact) == (way == "DoRA"), (told, exact)
    if way != "DoRA":
        assert largest_difference(found, expected) < (0.05 if "int8" in way else 1e-5)
        ran, ran_plain = (  # hooks add operations on the way to a layer
            [one and replace(one, known_by="") for one in layout_report(m).layers.values()] for m in (watched, plain)
        )
        assert ran == ran_plain


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout", "base_layer"])
def test_hooks_on_the_parts_of_a_lora_layer(part, dropout):
    config = LBPWHTConfig(
        r=6, grad_input_rank=6, train_base_weight=False, stack_on=LoraConfig(**LORA, lora_dropout=dropout)
    )
    model = get_peft_model(tiny_vit(), config).train()
    host = next(m for n, m in model.named_modules() if n.endswith("layers.1.attention.o_proj"))
    watched = host.base_layer if part == "base_layer" else getattr(host, part)["default"]
    torch.manual_seed(1)
    expected = all_gradients(model)
    calls = []
    note_calls(watched, calls)
    torch.manual_seed(1)
    found = all_gradients(model)
    kinds = [kind for kind, *_ in calls]
    assert kinds[:4] == ["before", "before, kwargs", "after", "after, kwargs"] and len(kinds) == 6
    assert largest_difference(found, expected) < 1e-5
    assert "forward" not in vars(watched)
    change_output(watched)
    torch.manual_seed(1)
    changed = forward(model, images())
    with exact_backward(model):
        torch.manual_seed(1)
        torch.testing.assert_close(forward(model, images()), changed, rtol=0, atol=1e-6)


@alone_and_stacked
def test_global_hooks_see_the_plain_layer(way):
    model = adapted(tiny_vit(), way)
    layer, seen = layer_in(model), []
    handle = module_hooks.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that DoRA is exact now
            all_gradients(model)
    finally:
        handle.remove()
    assert sum(m is layer for m in seen) == 1
    assert {type(m).__name__ for m in seen}.isdisjoint({"UnpatchedForward", "_ChannelsLast"})


@alone_and_stacked
def test_a_flop_counter_does_not_change_what_is_counted(way):
    model = adapted(tiny_vit(), way)
    expected, report = all_gradients(model), str(layout_report(model))
    with FlopCounterMode(display=False):
        found = all_gradients(model)
    assert largest_difference(found, expected) < 1e-6 and str(layout_report(model)) == report


def test_a_replaced_forward_method_of_a_lora_layer_is_told_of():
    model = get_peft_model(tiny_vit(), LoraConfig(**LORA))
    host = model.base_model.model.vit.layers[1].attention.o_proj
    plain = host.forward
    host.forward = lambda x: 2 * plain(x)
    expected = gradients(model.train(), images())
    with pytest.warns(UserWarning, match=r"layers\.1\.attention\.o_proj uses exact backpropagation.* forward method"):
        model = get_peft_model(model, LBPWHTConfig(r=64, grad_input_dtype="full", train_base_weight=False)).train()
    found = gradients(model, images())
    names = {name.rpartition("model.")[2]: grad for name, grad in found.items()}
    assert largest_difference(names, {name.rpartition("model.")[2]: grad for name, grad in expected.items()}) < 1e-5


def test_hooks_that_are_always_called():
    calls, base = [], tiny_vit()

    def fail(module, args, output):
        raise ValueError("stop")

    layer_in(base).register_forward_hook(fail)
    layer_in(base).register_forward_hook(lambda m, args, y: calls.append(m), always_call=True)
    model = adapted(base, "alone")
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"):
            forward(model, images())
    assert calls == 2 * [layer_in(model)] and "forward" not in vars(layer_in(model))


@pytest.mark.parametrize("build", [lambda: Mixer("Conv1D"), lambda: Mixer("Conv1d"), ConvMLP])
def test_other_kinds_of_layers(build):
    torch.manual_seed(0)
    base = build()
    config = LBPWHTConfig(r=3, grad_input_dtype="full")
    targets = [n.removeprefix("base_model.model.") for n in layers_of(get_peft_model(copy.deepcopy(base), config))]
    assert targets
    for name in targets:
        base.get_submodule(name).register_forward_hook(lambda m, args, y: 1.5 * y)
    height = 48 if isinstance(base, Mixer) else 32
    x = images(height=32, width=height)
    model = get_peft_model(copy.deepcopy(base), config).train()
    assert torch.equal(forward(model, x), forward(base.train(), x))
    assert not layout_report(model).exact


def test_hooks_outlive_the_adapter():
    for end in ("unload", "merge_and_unload"):
        calls, base = [], tiny_vit()
        change_output(layer_in(base))
        note_calls(layer_in(base), calls)
        model = adapted(base, "alone")
        disturb(model)
        expected = forward(model.eval(), images())
        copied = copy.deepcopy(model)
        torch.testing.assert_close(forward(copied, images()), expected)
        plain = getattr(model, end)()
        calls.clear()
        found = forward(plain, images())
        assert [kind for kind, *_ in calls] == ["before", "before, kwargs", "after", "after, kwargs"]
        assert torch.equal(found, expected) == (end == "merge_and_unload")


@pytest.mark.parametrize("compute", [prune_half, parametrizations.weight_norm, nn.utils.weight_norm])
def test_merging_into_a_computed_weight_is_refused(compute):
    """The weight would be computed again, and the merged values would be lost."""
    base = tiny_vit()
    compute(layer_in(base))
    model = adapted(base, "alone")
    disturb(model)
    expected = forward(model.eval(), images())
    refused = r"layers\.1\.attention\.o_proj is computed by a parametrization or by pruning"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=refused):
            merge()
        assert torch.equal(forward(model, images()), expected)


def test_threads_do_not_disturb_one_another():
    base = tiny_vit()
    note_calls(layer_in(base), [])
    model = adapted(base, "alone").eval()
    disturb(model)
    inputs = [images(seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [forward(model, x) for x in inputs]
    wrong = []

    def run(x, y):
        with torch.no_grad():
            wrong.extend(not torch.equal(forward(model, x), y) for _ in range(25))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 100 and not any(wrong) and "forward" not in vars(layer_in(model))


@pytest.mark.parametrize("way", ["alone", "LoRA"])
def test_hooks_run_in_a_compiled_model(way):
    base, calls = tiny_vit(), []
    change_output(layer_in(base))
    layer_in(base).register_forward_hook(lambda m, args, y: calls.append(m))
    model = adapted(base, way)
    expected = gradients(model, images())
    calls.clear()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    model.zero_grad()
    logits = compiled(images()).logits
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits - goal).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert calls == [layer_in(model)]
    assert largest_difference(found, expected) < 1e-4


def test_layers_without_tokens():
    case = Case("mlp", MLP, lambda: torch.randn(4, 10), {"target_modules": ["lin0", "lin1"]})
    base = case.base()
    change_output(base.lin0)
    x = case.inputs()
    model = get_peft_model(copy.deepcopy(base), case.config()).train()
    assert torch.equal(model(x), base(x))
