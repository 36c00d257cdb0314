"""What grad_input_dtype="auto", the default, chooses, and how tokens are projected."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import gradients, images, tiny_vit
from peft import LoraConfig, get_peft_model

from lbp_peft import LBPWHTConfig, instructions, layout_report
from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.grids import TokenLayout
from lbp_peft.heuristics import Heuristics
from lbp_peft.instructions import Instructions, multiplies_bf16, multiplies_int8, product_dtype
from lbp_peft.projection import DenseProjection, Float32Projection, SeparableProjection, projection

HEURISTICS = Heuristics()
CPU, GPU = torch.device("cpu"), torch.device("cuda")
NONE = Instructions()
VNNI, AVX512_BF16 = Instructions(int8=True), Instructions(int8=True, bf16=True)
AMX = Instructions(int8=True, bf16=True, amx=True)
FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def processor(monkeypatch):
    """Set which instructions the processor has."""
    return lambda found: monkeypatch.setattr(instructions, "of_cpu", lambda: found)


@pytest.mark.parametrize(
    ("found", "shape", "dtype", "expected"),
    [
        (AMX, (1576, 3072, 768), FLOAT, "bf16"),
        (AMX, (1576, 3072, 768), BF16, "full"),
        (AMX, (1576, 64, 64), FLOAT, "full"),
        (AVX512_BF16, (1576, 3072, 768), FLOAT, "int8"),
        (AVX512_BF16, (1576, 384, 384), FLOAT, "bf16"),
        (AVX512_BF16, (1576, 3072, 768), BF16, "int8"),
        (AVX512_BF16, (1576, 384, 384), BF16, "full"),
        (VNNI, (1576, 384, 384), FLOAT, "int8"),
        (VNNI, (20, 3072, 768), FLOAT, "full"),
        (NONE, (1576, 3072, 768), FLOAT, "full"),
        (NONE, (1576, 3072, 768), BF16, "full"),
        (VNNI, (1576, 3072, 768), BF16, "int8"),
        (AMX, (1576, 3072, 768), torch.float16, "full"),
        (AMX, (1576, 3072, 768), torch.float64, "full"),
    ],
)
def test_the_precision_follows_instructions_and_shape(processor, found, shape, dtype, expected):
    processor(found)
    assert HEURISTICS.fastest_precision(*shape, dtype, CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "full")])
def test_on_gpus_the_precision_follows_the_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert HEURISTICS.fastest_precision(1576, 768, 768, FLOAT, GPU) == expected
    assert HEURISTICS.fastest_precision(1576, 768, 768, BF16, GPU) == "full"
    assert HEURISTICS.use_low_rank(64, 197, 41, 4096, 1024, BF16, GPU) and not HEURISTICS.use_low_rank(
        64, 197, 41, 192, 192, BF16, GPU
    )


@pytest.mark.parametrize(
    ("found", "features", "dtype", "is_used"),
    [
        (AMX, (384, 384), FLOAT, True),
        (AMX, (64, 256), FLOAT, False),
        (AMX, (768, 768), BF16, True),
        (AMX, (384, 1536), BF16, False),
        (AMX, (3072, 768), BF16, True),
        (AVX512_BF16, (384, 384), BF16, True),
        (NONE, (384, 384), FLOAT, True),
        (NONE, (384, 384), BF16, True),  # what is exact is slow there
        (VNNI, (384, 384), BF16, True),
        (NONE, (128, 128), FLOAT, False),
    ],
)
def test_narrow_layers_are_left_exact(processor, found, features, dtype, is_used):
    processor(found)
    assert HEURISTICS.use_low_rank(8, 197, 41, *features, dtype, CPU) is is_used


def test_on_images_layers_have_to_be_wider(processor):
    processor(NONE)
    assert HEURISTICS.use_low_rank(8, 196, 40, 448, 448, FLOAT, CPU)
    assert not HEURISTICS.use_low_rank(8, 196, 40, 448, 448, FLOAT, CPU, on_images=True)


@pytest.mark.parametrize(
    ("names", "limit", "expected"),
    [
        (["amx_tile", "avx512_bf16", "vnni"], "default", AMX),
        (["amx_tile", "avx512_bf16", "avx512_fp16", "vnni"], "default", AMX._replace(fp16=True)),
        (["avx512_bf16", "vnni"], "all", AVX512_BF16),
        (["avx512_bf16", "vnni"], "no value of oneDNN's", AVX512_BF16),  # which ignores such
        (["vnni"], "default", VNNI),
        ([], "default", NONE),
        (["avx_vnni", "avx_ne_convert"], "default", NONE),
        (["amx_tile", "avx512_bf16", "avx512_fp16", "vnni"], "avx512_core_fp16", AVX512_BF16._replace(fp16=True)),
        (["amx_tile", "avx512_bf16", "avx512_fp16", "vnni"], "avx512_core_bf16", AVX512_BF16),
        (["amx_tile", "avx512_bf16", "vnni"], "avx512_core_vnni", VNNI),
        (["amx_tile", "avx512_bf16", "vnni"], "avx512_core", NONE),
        (["amx_tile", "avx512_bf16", "vnni"], "avx2_vnni", NONE),
        (["amx_tile", "avx512_bf16", "vnni"], "avx2", NONE),
    ],
)
def test_instructions_are_those_of_the_processor_below_the_limit_of_onednn(names, limit, expected):
    assert instructions._instructions(lambda name: name in names, limit) == expected


def test_the_processor_is_asked_for_its_instructions(monkeypatch):
    def having(*names):
        for name in ("amx_tile", "avx512_bf16", "vnni"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda found=name in names: found, raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)
        return instructions._instructions(instructions._has, "default")

    assert having("amx_tile", "avx512_bf16", "vnni") == AMX
    assert having("avx512_bf16", "avx512_fp16", "vnni") == AVX512_BF16._replace(fp16=True)
    assert having("vnni") == VNNI and having() == NONE
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "get_capabilities"):
        monkeypatch.delattr(torch.cpu, name)  # an older PyTorch
    assert instructions._instructions(instructions._has, "default") == NONE


def test_what_the_processor_says_of_itself_is_what_is_found():
    cpuinfo = Path("/proc/cpuinfo")
    if not (cpuinfo.exists() and "avx2" in cpuinfo.read_text()):
        pytest.skip("no x86 processor that tells its instructions")
    flags, found = cpuinfo.read_text(), instructions._instructions(instructions._has, "default")
    assert found.bf16 == ("avx512_bf16" in flags or "amx_tile" in flags)
    assert found.int8 == ("avx512_vnni" in flags or "amx_tile" in flags)
    if hasattr(torch.cpu, "get_capabilities"):
        assert found.fp16 == ("avx512_fp16" in flags)


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_onednn_may_not_use_does_not_count(variable, monkeypatch):
    monkeypatch.setenv(variable, "AVX2")
    instructions._of_this_machine.cache_clear()
    try:
        assert instructions.of_cpu() == NONE
    finally:
        instructions._of_this_machine.cache_clear()


def test_without_onednn_there_are_no_instructions():
    with torch.backends.mkldnn.flags(enabled=False):
        assert instructions.of_cpu() == NONE


def test_the_dtype_of_a_product_is_float32_where_there_are_no_instructions_for_it(processor):
    processor(NONE)
    dtypes = {BF16: FLOAT, torch.float16: FLOAT, FLOAT: FLOAT, torch.float64: torch.float64}
    assert {dtype: product_dtype(dtype, CPU) for dtype in dtypes} == dtypes
    processor(AMX._replace(fp16=True))
    assert all(product_dtype(dtype, CPU) == dtype for dtype in dtypes)


@pytest.mark.parametrize(("capability", "bf16", "int8"), [((9, 0), True, True), ((7, 5), False, True),
                                                          ((7, 0), False, False)])  # fmt: skip
def test_gpus_are_known_by_their_capability(monkeypatch, capability, bf16, int8):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (multiplies_bf16(GPU), multiplies_int8(GPU)) == (bf16, int8)
    assert product_dtype(BF16, GPU) == (BF16 if bf16 else FLOAT) and product_dtype(torch.float16, GPU) == torch.float16


def test_nothing_is_taken_for_granted_of_other_devices(processor):
    processor(AMX)
    for name in ("mps", "xpu"):
        device = torch.device(name)
        assert not multiplies_bf16(device) and not multiplies_int8(device) and product_dtype(BF16, device) == BF16


@pytest.mark.parametrize(
    ("found", "dtype", "expected"),
    [
        (AVX512_BF16, FLOAT, ["bf16", "int8"]),
        (AVX512_BF16, BF16, ["int8"]),
        (VNNI, FLOAT, ["int8"]),
        (NONE, FLOAT, []),
        (NONE, BF16, []),
    ],
)
def test_formats_that_help_are_those_with_instructions(processor, found, dtype, expected):
    processor(found)
    assert HEURISTICS.faster_formats(dtype, CPU) == expected


# In a model


WIDE = {"hidden_size": 64, "intermediate_size": 768, "num_hidden_layers": 1}


def adapted(**settings):
    return get_peft_model(tiny_vit(**WIDE), LBPWHTConfig(**({"modules_to_save": ["classifier"]} | settings)))


@pytest.mark.own_choice
def test_auto_is_the_default_and_leaves_narrow_layers_exact_with_one_warning(decide):
    def use_low_rank(images, tokens, kept, out_features, in_features, *_):
        return out_features * in_features > 64 * 64

    decide(use_low_rank=use_low_rank, fastest_precision=lambda rows, out, into, *_: "int8" if out > into else "full")
    model = adapted()
    with pytest.warns(
        UserWarning, match=r'q_proj uses exact backpropagation.*narrow.*grad_input_dtype="full"'
    ) as caught:
        gradients(model, images())
        gradients(model, images())
    assert len(caught) == 1
    ran = {name.rsplit(".")[-1]: r for name, r in layout_report(model).layers.items()}
    assert "narrow" in ran["o_proj"].why_exact and ran["fc1"].precision == "int8" and ran["fc2"].precision == "full"
    assert ran["fc1"].grad_weight_rows == ran["fc2"].grad_weight_rows == 11
    assert not ran["fc2"].why_exact


@pytest.mark.own_choice
@pytest.mark.parametrize(
    ("found", "formats"), [(NONE, ""), (VNNI, ' \\(or "int8"\\)'), (AMX, ' \\(or "bf16", "int8"\\)')]
)
def test_the_warning_of_narrow_layers_names_only_what_helps_on_this_machine(decide, processor, found, formats):
    processor(found)
    decide(use_low_rank=False)
    with pytest.warns(UserWarning, match=rf'set grad_input_dtype="full"{formats}\.$'):
        gradients(adapted(), images())


@pytest.mark.parametrize("found", [NONE, VNNI, AVX512_BF16])
@pytest.mark.parametrize("way", ["autocast", "model"])
def test_a_model_in_bfloat16_is_said_to_be_slow_where_it_is(processor, found, way):
    processor(found)
    model, x = adapted(grad_input_dtype="full"), images()
    if way == "model":
        model, x = model.to(BF16), x.to(BF16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for _ in range(2):
            with torch.autocast("cpu", BF16, enabled=way == "autocast"):
                model(x).logits.sum().backward()
    said = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert len(said) == (0 if found.bf16 else 1)
    assert all("q_proj" in text and "no instructions" in text and "Train in float32" in text for text in said)


def test_a_model_in_float32_is_not_said_to_be_slow(processor):
    processor(NONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gradients(adapted(grad_input_dtype="full"), images())


@pytest.mark.own_choice
def test_only_auto_leaves_layers_exact(decide):
    decide(use_low_rank=False)
    model = adapted(grad_input_dtype="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, images())
    assert not layout_report(model).exact


@pytest.mark.own_choice
@pytest.mark.parametrize("stacked", [True, False])
def test_where_only_factors_are_trained_layers_are_judged_as_in_float32(decide, stacked):
    asked = []
    decide(use_low_rank=lambda *given: not asked.append(given[5]), fastest_precision="full")
    targets = ["q_proj", "fc1"]
    lora = LoraConfig(r=4, target_modules=targets)
    settings = {"train_base_weight": False, "stack_on": lora} if stacked else {}
    model = adapted(target_modules=targets, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).logits.sum().backward()
    assert asked == [FLOAT if stacked else BF16] * 2
    assert {ran.grad_weight_rows for ran in layout_report(model).layers.values()} == {11}


@pytest.mark.own_choice
def test_at_full_rank_auto_is_exact(decide):
    decide(use_low_rank=True, fastest_precision="int8")
    model = adapted(r=64)
    gradients(model, images())
    assert all("as many rows" in why for why in layout_report(model).exact.values())
    assert len(layout_report(model).exact) == 6


def test_auto_compiles_without_a_break():
    """This runs in a process of its own, in which nothing is patched."""
    program = """
import torch
from lbp_peft.heuristics import active
def chosen(x):
    shape = (8, 197, 41, 768, 768, x.dtype, x.device)
    kind = x.dtype, x.device
    choices = (active().fastest_precision(1576, 768, 768, *kind), active().use_low_rank(*shape),
               active().use_dense_projection(41, *kind), active().use_attention_by_products(197, *kind))
    return x + 1, choices
for dtype in (torch.float32, torch.bfloat16):
    x = torch.zeros(3, dtype=dtype)
    assert torch.compile(chosen, fullgraph=True, backend="eager")(x)[1] == chosen(x)[1]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.own_choice
@pytest.mark.parametrize("width", [64, 512])
def test_batches_of_many_sizes_need_one_graph(width):
    graphs = []
    torch._dynamo.reset()
    shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1}
    model = get_peft_model(tiny_vit(**shape), LBPWHTConfig(modules_to_save=["classifier"])).train()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for batch in (2, 3, 5):
        x = images(batch)
        gradients(model, x)  # its grid is known by now
        torch._dynamo.mark_dynamic(x, 0)
        compiled(pixel_values=x).logits.sum().backward()
    assert len(graphs) == 1


# Projections and attention


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("r", [3, 30])
def test_tokens_are_projected_in_float32_where_there_are_no_instructions(processor, r, dtype):
    layout, bases = TokenLayout((16, 16), 1), BasisSet(r)
    processor(AMX._replace(fp16=True))
    tokens = torch.randn(2, 257, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    fast = projection(layout, bases, dtype, CPU)
    expected = fast.project(tokens)
    processor(NONE)
    slow = projection(layout, bases, dtype, CPU)
    assert type(slow) is Float32Projection
    found = slow.project(tokens)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(slow.lift(found), fast.lift(expected), rtol=0.02, atol=0.05)
    torch.testing.assert_close(slow.sum(found), fast.sum(expected), rtol=0.02, atol=1.0)
    wide = slow.of_dtype(FLOAT)
    assert wide.dtype == FLOAT and type(wide) is not Float32Projection
    assert type(wide.of_dtype(dtype)) is Float32Projection
    assert slow.of_dtype(torch.float64).project(tokens.double()).dtype == torch.float64
    image = tokens[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    on_image = projection(TokenLayout((16, 16)), bases, dtype, CPU)
    assert on_image.project_image(image).dtype == dtype
    torch.testing.assert_close(on_image.project_image(image), found[:, 1:], rtol=0.02, atol=0.05)
    assert on_image.lift_image(on_image.project_image(image)).shape == image.shape


@pytest.mark.parametrize(("found", "dtype", "most"), [(AMX, BF16, 208), (AVX512_BF16, BF16, 64), (NONE, BF16, 32),
                                                      (AMX, FLOAT, 32)])  # fmt: skip
def test_one_matrix_serves_few_coefficients(processor, found, dtype, most):
    processor(found)
    assert HEURISTICS.use_dense_projection(most, dtype, CPU) and not HEURISTICS.use_dense_projection(
        most + 1, dtype, CPU
    )


def test_two_images_at_once_are_for_some_forty_coefficients_in_bfloat16_with_amx(processor):
    processor(AMX)
    assert HEURISTICS.project_images_in_pairs(41, 197, BF16, CPU)
    for kept, tokens, dtype, device in ((32, 197, BF16, CPU), (64, 197, BF16, CPU), (41, 785, BF16, CPU),
                                        (41, 197, FLOAT, CPU), (41, 197, BF16, GPU)):  # fmt: skip
        assert not HEURISTICS.project_images_in_pairs(kept, tokens, dtype, device)
    for found in (AVX512_BF16, NONE):
        processor(found)
        assert not HEURISTICS.project_images_in_pairs(41, 197, BF16, CPU)


def test_the_cheaper_projection_is_taken():
    few, many = (projection(TokenLayout((16, 16)), BasisSet(r), FLOAT, CPU) for r in (3, 15))
    assert type(few) is DenseProjection and type(many) is SeparableProjection


def test_attention_by_products_is_for_short_sequences_in_bfloat16(processor):
    processor(AVX512_BF16)
    assert HEURISTICS.use_attention_by_products(197, BF16, CPU)
    assert not HEURISTICS.use_attention_by_products(197, FLOAT, CPU) and not HEURISTICS.use_attention_by_products(
        2000, BF16, CPU
    )
    assert not HEURISTICS.use_attention_by_products(197, BF16, GPU)
    processor(VNNI)
    assert not HEURISTICS.use_attention_by_products(197, BF16, CPU)
