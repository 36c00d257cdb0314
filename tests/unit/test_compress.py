"""What is saved in few bits for the backward pass: derivatives, norms, attention, projected inputs."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from comparing import cosine
from models import forward, gradients, images, largest_difference, patches_of, tiny_vit, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lbp_peft import LBPWHTConfig, exact_backward, layout_report
from lbp_peft.formats import in_groups
from lbp_peft.formats.in_groups import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows
from lbp_peft.measure import multiply_adds, saved_activations
from lbp_peft.ops.activation import compressed_layer
from lbp_peft.ops.layer_norm import compressed_layer_norm
from lbp_peft.ops.rms_norm import compressed_rms_norm
from lbp_peft.tuner.patches.activation_patch import ActivationPatch, _rms_norm_of, is_compressible


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels, scales", [(128, 2), (192, 3), (48, 1), (65, 1)])
def test_rounding_is_off_by_half_a_step_at_most(channels, scales):
    x = draw(2, 5, channels)
    x[0, 0] = 0
    values, found = quantize_groups(x)
    assert values.dtype == torch.int8 and values.shape == x.shape and found.shape == (2, 5, scales)
    steps = found.repeat_interleave(channels // scales, -1)
    assert ((dequantize_groups(values, found, x.dtype) - x).abs() <= 0.501 * steps).all()
    largest = x.unflatten(-1, (scales, -1)).abs().amax(-1)
    torch.testing.assert_close(found, largest / 127, rtol=1e-6, atol=1e-30)


def test_an_outlier_costs_only_its_group():
    x = draw(1, 3, 256)
    x[..., 7] = 1000
    error = (dequantize_groups(*quantize_groups(x), x.dtype) - x).abs()
    assert error[..., :64].max() > 1 > 0.1 > error[..., 64:].max()


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, -126), (torch.bfloat16, -126), (torch.float16, -14)])
@pytest.mark.parametrize("channels", [48, 128])
def test_rounding_is_the_same_at_every_scale(dtype, smallest, channels):
    x = (draw(3, 4, channels) * 40).round().clamp(-127, 127) / 128  # of few bits: none is lost
    x[..., ::16] = 1
    x = x.to(dtype)
    values, scales = quantize_groups(x)
    for exponent in (smallest, smallest + 3, -10, 10):
        found, found_scales = quantize_groups(x * 2.0**exponent)
        assert torch.equal(found, values), exponent
        torch.testing.assert_close(found_scales.double(), scales.double() * 2.0**exponent, rtol=1e-4, atol=0)
        difference = dequantize_groups(found, found_scales, dtype).double() - x.double() * 2.0**exponent
        assert difference.abs().max() <= 0.01 * 2.0**exponent


LAYERS = {
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "quick": ACT2FN["quick_gelu"],
    "new": ACT2FN["gelu_new"], "norm": nn.LayerNorm(128), "rms": nn.RMSNorm(128),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exact_forward_and_near_backward(name):
    layer = copy.deepcopy(LAYERS[name])
    assert is_compressible(layer)
    x, goal = draw(2, 9, 128).requires_grad_(), draw(2, 9, 128, seed=1)
    y = compressed_layer(layer, x)
    assert torch.equal(y, layer(x))
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(y, wanted, goal)
    # The derivative at the rounded input is what is computed.
    at = dequantize_groups(*quantize_groups(x.detach()), x.dtype).requires_grad_()
    expected = torch.autograd.grad(layer(at), [at, *layer.parameters()], goal)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    exact = torch.autograd.grad(layer(x), wanted, goal)
    for f, e in zip(found, exact, strict=True):
        assert 1e-5 < (f - e).norm() / e.norm() < 0.02 or torch.equal(f, e)


def test_the_backward_pass_can_be_counted():
    model = adapted()
    loss = forward(model, images()).sum()
    with multiply_adds() as counted:
        loss.backward()
    assert counted.total > 0


def test_second_derivatives_are_refused():
    x = draw(2, 64).requires_grad_()
    (first,) = torch.autograd.grad(compressed_layer(nn.GELU(), x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_under_autocast():
    norm, x = nn.LayerNorm(64), draw(2, 5, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compressed_layer(norm, x), norm(x)
    assert torch.equal(y, expected)
    found, exact = (torch.autograd.grad(z, x, draw(2, 5, 64, seed=1).to(z.dtype))[0] for z in (y, expected))
    assert (found - exact).norm() < 0.05 * exact.norm()


# In a model


def adapted(base=tiny_vit, **settings):
    return get_peft_model(base(), LBPWHTConfig(**({"r": 10, "compress_activations": "all"} | settings))).train()


def compressed(model):
    return list(patches_of(model, ActivationPatch))


@pytest.mark.parametrize("word, share", [
    ("activation", 0.85), ("norm", 0.9), ("attention", 0.85), ("projection", 0.98), ("all", 0.4),
])  # fmt: skip
def test_gradients_are_near_and_less_is_saved(word, share):
    settings = {"grad_input_dtype": "full"}
    model, plain = adapted(compress_activations=word, **settings), adapted(compress_activations=None, **settings)
    inside = len(compressed(model))  # two norms and an activation function a block
    assert inside == (0 if word in ("attention", "projection") else 2 * 3) and not compressed(plain)
    found, expected = gradients(model, images()), gradients(plain, images())
    assert cosine(found, expected) > 0.998 and largest_difference(found, expected) > 1e-4
    sizes = []
    for each in (model, plain):
        with saved_activations(each) as saved:
            forward(each, images())
        sizes.append(saved.bytes)
    assert sizes[0] < share * sizes[1]
    assert len(layout_report(model).layers) == len(layout_report(plain).layers)
    assert not layout_report(model).exact


def test_only_blocks_with_adapted_layers():
    model = adapted(target_modules=r".*layers\.1\.mlp\.fc1")
    assert len(compressed(model)) == 3 and all("layers.1" in name for name in compressed(model))


def test_forward_is_exact_and_so_are_other_modes():
    model, plain = adapted(), adapted(compress_activations=None)
    assert torch.equal(forward(model, images()), forward(plain, images()))
    with exact_backward(model), exact_backward(plain):
        assert largest_difference(gradients(model, images()), gradients(plain, images())) < 1e-6
    model.eval(), plain.eval()
    assert largest_difference(gradients(model, images()), gradients(plain, images())) < 1e-6
    model.train().disable_adapter_layers()
    x = images().requires_grad_()
    with saved_activations(model) as saved:
        forward(model, x)
    model.enable_adapter_layers()
    with saved_activations(model) as less:
        forward(model, x)
    assert less.bytes < saved.bytes


def test_it_trains_and_its_checkpoint_loads(tmp_path):
    model = adapted(modules_to_save=["classifier"], grad_input_rank=10)
    losses = train(model, images(), 5)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    assert compressed(loaded) == compressed(model)
    assert torch.equal(forward(loaded.eval(), images()), forward(model.eval(), images()))
    base = model.merge_and_unload()
    assert type(base.vit.layers[0].layernorm_before) is nn.LayerNorm and not compressed(base)
    assert base.state_dict().keys() == tiny_vit().state_dict().keys()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_work_on_their_own(how):
    model = adapted()
    expected = gradients(model, images())
    again = how(model)
    del model
    assert largest_difference(gradients(again, images()), expected) < 1e-6


def test_a_copy_that_is_trained_beside_the_adapter_belongs_to_the_same_block():
    """PEFT copies modules_to_save for each adapter, and a host together with its patch."""
    settings = {"modules_to_save": ["layernorm_before"]}
    model = adapted(**settings)
    model.add_adapter("other", LBPWHTConfig(r=10, compress_activations="all", **settings))
    model.set_adapter("other")
    blocks = set(model.base_model.model.vit.layers)
    inside = patches_of(model, ActivationPatch)
    assert any("modules_to_save.other" in name for name in inside)
    assert {one.block for one in inside.values()} == blocks


def test_with_lora_beneath():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    base = get_peft_model(tiny_vit(), lora)
    found = {}
    for compress in (None, "all"):
        config = LBPWHTConfig(r=64, train_base_weight=False, compress_activations=compress)
        found[compress] = gradients(get_peft_model(copy.deepcopy(base), config).train(), images())
    assert cosine(found["all"], found[None]) > 0.999
    assert largest_difference(found["all"], found[None]) > 1e-5


def test_the_adapter_that_asks_for_it_has_it():
    model = adapted()
    model.add_adapter("plain", LBPWHTConfig(r=10))
    both = adapted(compress_activations=None)
    both.add_adapter("plain", LBPWHTConfig(r=10))
    sizes = {}
    for name in ("default", "plain"):
        for which, each in (("some", model), ("none", both)):
            each.set_adapter(name)
            with saved_activations(each) as saved:
                forward(each, images())
            sizes[name, which] = saved.bytes
    assert sizes["plain", "some"] == sizes["plain", "none"] == sizes["default", "none"]
    assert sizes["default", "some"] < sizes["default", "none"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    expected = gradients(adapted(), images())
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with saved_activations(model) as saved:
        forward(model, images())
    with saved_activations(plain := adapted()) as more:
        forward(plain, images())
    assert saved.bytes < more.bytes
    found = gradients(model, images())
    # With an input that needs a gradient the first norm keeps its own in 8 bits too, to which nothing is trained.
    assert largest_difference(found, expected) < 1e-5


def test_words_of_the_setting(tmp_path):
    for given, kept in (
        (None, None), ("all", "all"), ("norm", ("norm",)), ("gelu", ("activation",)), ({"projection"}, ("projection",)),
        (["attention", "norm"], ("norm", "attention")),
    ):  # fmt: skip
        config = LBPWHTConfig(compress_activations=given)
        assert config.compress_activations == kept
        config.save_pretrained(tmp_path)
        assert LBPWHTConfig.from_pretrained(tmp_path).compress_activations == kept
    with pytest.warns(DeprecationWarning, match="int8.*deprecated") as caught:
        assert LBPWHTConfig(compress_activations="int8").compress_activations == ("activation", "norm")
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("value", ["int4", True, (), ("norm", 3), ["gelu", "dropout"], {}])
def test_words_that_are_not_known_are_refused(value):
    with pytest.raises(ValueError, match='compress_activations must be "all", some of activation, norm, attention'):
        LBPWHTConfig(compress_activations=value)


def test_what_is_not_compressible():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not is_compressible(nn.BatchNorm2d(4)) and not is_compressible(nn.ReLU(inplace=True))


def test_a_function_whose_settings_change_has_another_table():
    model, plain = (adapted(lambda: tiny_vit(hidden_act="leaky_relu"), compress_activations=c) for c in ("gelu", None))
    for slope in (0.01, 0.7):
        for each in (model, plain):
            for module in each.modules():
                if isinstance(module, nn.LeakyReLU):
                    module.negative_slope = slope
        assert largest_difference(gradients(model, images()), gradients(plain, images())) < 1e-5  # it has two values


def test_trained_slopes_and_unbounded_derivatives_keep_the_input():
    for name in ("prelu", "relu2"):
        base = functools.partial(tiny_vit, hidden_act=name)
        model, plain = (adapted(base, compress_activations=c) for c in ("gelu", None))
        assert cosine(gradients(model, images()), gradients(plain, images())) > 0.999
        with saved_activations(model) as less:
            forward(model, images())
        with saved_activations(plain) as saved:
            forward(plain, images())
        assert less.bytes < 0.9 * saved.bytes


# Groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values_at_once", [1, 1000, 2**17])
def test_rounding_by_parts_and_in_whatever_order(values_at_once, dtype, monkeypatch):
    monkeypatch.setattr(in_groups, "_VALUES_AT_ONCE", values_at_once)
    x = draw(3, 7, 2, 128).to(dtype).transpose(1, 2)
    for offset in (None, x.mean(-2, keepdim=True), x.mean(-1, keepdim=True), x[:1, :1, :1]):
        exact = x.double() - (0 if offset is None else offset.double())
        values, scales = quantize_groups(x, offset)
        largest = exact.unflatten(-1, (2, 64)).abs().amax(-1)
        torch.testing.assert_close(scales.double(), largest / 127, rtol=1e-5, atol=1e-40)
        steps = scales.repeat_interleave(64, -1)
        assert (
            values.shape == x.shape
            and ((dequantize_groups(values, scales, torch.float64) - exact).abs() <= 0.501 * steps).all()
        )


def test_a_row_and_its_scale_are_one_tensor():
    x = draw(2, 5, 33) * torch.tensor([1e-20, 1, 1e10, 0, 3]).view(5, 1)
    rows = quantize_rows(x)
    assert rows.dtype == torch.int8 and rows.shape == (2, 5, 37)
    error = (dequantize_rows(rows, torch.float32) - x).abs()
    assert (error <= 0.501 / 127 * x.abs().amax(-1, keepdim=True)).all()


# Layer norm


@pytest.mark.parametrize("shape", [(2, 9, 128), (3, 65), (1, 2, 3, 192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_has_the_gradients_of_float64(shape, dtype, affine):
    x = (3 + draw(*shape)).to(dtype).requires_grad_()
    parameters = [(1 + draw(shape[-1], seed=s)).to(dtype).requires_grad_() for s in (1, 2)] if affine else [None, None]
    goal = draw(*shape, seed=3).to(dtype)
    y = compressed_layer_norm(x, *parameters, 1e-6)
    assert torch.equal(y, nn.functional.layer_norm(x, shape[-1:], *parameters, 1e-6))
    wanted = [x, *(p for p in parameters if p is not None)]
    found = torch.autograd.grad(y, wanted, goal)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in (x, *parameters)]
    exact = nn.functional.layer_norm(doubles[0], shape[-1:], *doubles[1:], 1e-6)
    expected = torch.autograd.grad(exact, [t for t in doubles if t is not None], goal.double())
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype and (f.double() - e).norm() < 0.02 * e.norm()


def test_a_layer_norm_reads_only_what_it_saved():
    norm, x = nn.LayerNorm(64), draw(2, 5, 64).requires_grad_()
    y = compressed_layer_norm(x, norm.weight, norm.bias, norm.eps)
    expected = torch.autograd.grad(y.sum() * 2 + y.square().sum(), x, retain_graph=True)[0]
    norm.weight.data = torch.zeros(64)
    assert torch.equal(torch.autograd.grad(y.sum() * 2 + y.square().sum(), x, retain_graph=True)[0], expected)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    norm = nn.LayerNorm(64)
    y = compressed_layer_norm(x, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# RMS norm


class OfAnotherKind(nn.RMSNorm):
    """A module whose name says what it is not."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


RMS_NORMS = {
    "torch": lambda: nn.RMSNorm(128), "without a weight": lambda: nn.RMSNorm(128, elementwise_affine=False),
    "Llama": lambda: LlamaRMSNorm(128), "Gemma": lambda: Gemma2RMSNorm(128, eps=1e-3),
    "T5": lambda: T5LayerNorm(128),
}  # fmt: skip


@pytest.mark.parametrize("name", RMS_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_rms_norm_has_the_gradients_of_float64(name, dtype):
    norm = RMS_NORMS[name]()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += draw(128, seed=2)
    kind, exact = _rms_norm_of(norm), copy.deepcopy(norm).double()
    norm, x, goal = norm.to(dtype), draw(2, 9, 128).to(dtype).requires_grad_(), draw(2, 9, 128, seed=1).to(dtype)
    weight = next(norm.parameters(), None)
    with torch.no_grad():
        y = norm(x)
    z = compressed_rms_norm(y, x, weight, kind.eps(norm, x), kind.shift)
    assert torch.equal(z, y)
    found = torch.autograd.grad(z, [x, *norm.parameters()], goal)
    doubled = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(exact(doubled), [doubled, *exact.parameters()], goal.double())
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype and 1e-5 < (f.double() - e).norm() / e.norm() < 0.02


def test_norms_of_another_kind_are_run_again():
    assert _rms_norm_of(OfAnotherKind(128)) is None and _rms_norm_of(nn.LayerNorm(128)) is None


@pytest.mark.parametrize("compiled", [False, True])
def test_rms_norms_in_a_model_keep_8_bits(compiled):
    """This also holds in compiled graphs."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = LlamaRMSNorm(128), nn.Linear(128, 128)

        def forward(self, x):
            return x + self.fc(self.norm(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    plain = Model()
    found = {}
    for word in (None, "norm"):
        config = LBPWHTConfig(
            r=2, grid_size=(4, 4), target_modules=["fc"], compress_activations=word, grad_input_dtype="full"
        )
        model = get_peft_model(copy.deepcopy(plain), config).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        x = draw(2, 16, 128).requires_grad_()
        with saved_activations(model) as saved:
            loss = run(x).square().sum()
        loss.backward()
        found[word] = x.grad, saved.bytes
    assert (found["norm"][0] - found[None][0]).norm() < 0.01 * found[None][0].norm()
    assert found["norm"][1] < 0.8 * found[None][1]


def test_functions_with_a_forward_method_of_their_own_are_left_alone():
    """They need not work element by element, and this one does not."""

    class Normalised(nn.GELU):
        def forward(self, x):
            return F.gelu(x) / (x.abs().mean(-1, keepdim=True) + 1)

    assert is_compressible(nn.GELU()) and not is_compressible(Normalised())


@pytest.mark.parametrize("kind", [nn.LayerNorm, type(ACT2FN["gelu"])])
def test_hosts_that_are_called_by_keyword_do_as_their_class_does(kind):
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, compress_activations="all"))
    host = next(m for n, m in model.named_modules() if n in patches_of(model, ActivationPatch) and isinstance(m, kind))
    x = torch.randn(2, 3, 32 if kind is nn.LayerNorm else 64)
    assert torch.equal(host(input=x), host(x))
