"""The Triton kernels equal plain PyTorch, in Triton's interpreter on the CPU and on a GPU where there is one.

Triton decides at its import whether it interprets. So one test runs this file again, in a process that does; there the
others run on the CPU.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from plans import plan_of
from torch.utils.flop_counter import FlopCounterMode

from lbp_peft import BasisSet, TokenLayout, kernels, low_rank_linear
from lbp_peft.bases.grids import TokenOrder
from lbp_peft.formats.products import Precision, product
from lbp_peft.formats.registry import FORMATS
from lbp_peft.projection import SeparableProjection

triton = pytest.importorskip("triton")

from lbp_peft.kernels import blocks, lift, project, quantize  # noqa: E402  they need triton

INTERPRETED = kernels.INTERPRETED
SQUARE = TokenLayout((8, 8))
LAYOUTS = [
    TokenLayout((8, 8), 1, 70),  # more tokens outside the grid than one program copies
    TokenLayout((4, 12), 5),
    TokenLayout((14, 14), 1),
    TokenLayout((7, 7)),
    TokenLayout((1, 100)),
]
CHANNELS = (20, 70)  # fewer than a program takes, and more


@pytest.fixture
def device(monkeypatch):
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU; test_in_the_interpreter runs it on the CPU")
    monkeypatch.setattr(kernels, "IN_USE", True)
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def served(device, monkeypatch):
    """The names of the kernels that were used, in order."""
    names = []

    def note(run):
        def noted(*args):
            names.append(run.__name__)
            return run(*args)

        monkeypatch.setattr(kernels, run.__name__, noted)

    for run in (kernels.project_tokens, kernels.lift_coefficients, kernels.quantize_rows):
        note(run)
    return names


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", kernels.VARIABLE: "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def cases():
    for layout in LAYOUTS:
        for boundary in ("orthogonal", "reflect"):
            if boundary == "orthogonal" or 1 not in layout.grid:  # a single row cannot be reflected
                yield pytest.param(layout, boundary, id=f"{layout.grid}-{layout.num_outside}-{boundary}")


def gradients(layout, boundary, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(2, layout.num_tokens, CHANNELS[0], device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(*CHANNELS[::-1], device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(CHANNELS[1], device=device, dtype=dtype, requires_grad=True)
    ranks = (BasisSet(rank, boundary=boundary) for rank in (10, 3))
    y = low_rank_linear(x, weight, bias, plan=plan_of(layout, *ranks))
    return torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y))


@pytest.mark.parametrize("layout, boundary", cases())
def test_gradients_are_those_of_the_plain_path(layout, boundary, device, served, monkeypatch):
    found = gradients(layout, boundary, torch.float32, device)
    assert served == 3 * ["project_tokens"] + ["lift_coefficients"]  # x, and its gradient for each of two ranks
    monkeypatch.setattr(kernels, "IN_USE", False)
    expected = gradients(layout, boundary, torch.float32, device)
    assert len(served) == 4
    assert max(relative(f, e) for f, e in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("bases", [BasisSet(5, 4, "lp_linf"), BasisSet(40)], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_dtypes_and_bases(dtype, bound, bases, device, served):
    layout = TokenLayout((7, 9), 2, 1)
    maps, exact = (SeparableProjection(layout, bases, kind, device) for kind in (dtype, torch.float64))
    tokens = torch.randn(2, layout.num_tokens, 40, device=device, dtype=dtype)
    small = maps.project(tokens)
    again = maps.lift(small)
    assert served == ["project_tokens", "lift_coefficients"]
    assert small.dtype == again.dtype == dtype
    assert relative(small, exact.project(tokens.double())) < bound
    assert relative(again, exact.lift(small.double())) < bound


def test_tokens_outside_the_grid_pass_bit_for_bit(device, served):
    layout = TokenLayout((8, 10), 3, 40)
    maps = SeparableProjection(layout, BasisSet(3), torch.float32, device)
    tokens = torch.randn(2, layout.num_tokens, 70, device=device)
    small = maps.project(tokens)
    for found in (small, maps.lift(small)):
        assert torch.equal(found[:, :3], tokens[:, :3]) and torch.equal(found[:, -40:], tokens[:, -40:])
    assert len(served) == 2


def test_blocks_of_unequal_sizes(device):
    layout, bases = TokenLayout((5, 9), 1), BasisSet(3, 4)
    table = blocks.analysis(layout, bases, torch.float32, torch.device("cpu"))
    assert table.matrix.shape == (2 * 3, 16, 16)
    # 2 + 3 rows, 2 + 4 + 3 columns
    assert (table.places >= 0).sum(dim=1).tolist() == [4, 8, 6, 6, 12, 9]
    assert table.starts.tolist() == [1, 4, 7, 10, 13, 16, 19]
    assert table.multiply_adds == 3 * 5 * 9
    maps, exact = (SeparableProjection(layout, bases, dtype, device) for dtype in (torch.float32, torch.float64))
    tokens = torch.randn(1, layout.num_tokens, 8, device=device)
    assert relative(maps.project(tokens), exact.project(tokens.double())) < 1e-6


def test_what_is_not_served_takes_the_plain_path(device):
    tokens, bases = torch.randn(2, 64, 16, device=device), BasisSet(3)
    assert kernels.serve_tokens(tokens, SQUARE, bases, None)
    assert not kernels.serve_tokens(tokens.double(), SQUARE, bases, None)
    assert not kernels.serve_tokens(tokens[:0], SQUARE, bases, None)
    assert not kernels.serve_tokens(tokens.transpose(1, 2), SQUARE, bases, None)
    assert not kernels.serve_tokens(tokens, SQUARE, BasisSet(3, 16), None)
    assert not kernels.serve_tokens(tokens, SQUARE, bases, torch.zeros(2, 64, dtype=torch.bool))
    assert not kernels.serve_tokens(
        tokens, TokenLayout((8, 8), order=TokenOrder(reference.unrolled((8, 8), ((2, 2),)))), bases, None
    )
    assert not kernels.serve_tokens(tokens.clone().requires_grad_(), SQUARE, bases, None)
    assert kernels.serve_rows(tokens[0], 16) and kernels.serve_rows(tokens[0], 0)
    assert not kernels.serve_rows(tokens[0], 8)
    assert not kernels.serve_rows(tokens[0].new_ones(1, 8200), 0)
    with torch.no_grad():
        x = tokens.clone().requires_grad_()
        assert kernels.serve_tokens(x, SQUARE, bases, None)
    layout = TokenLayout((8, 8), order=TokenOrder(reference.unrolled((8, 8), ((2, 2),))))
    some = SeparableProjection(layout, bases, torch.float32, device)
    on_grid = SeparableProjection(SQUARE, bases, torch.float32, device)
    order = torch.arange(64).view(1, 4, 2, 4, 2).permute(0, 2, 4, 1, 3).flatten()
    torch.testing.assert_close(some.project(tokens[:, order]), on_grid.project(tokens))


def plainly(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "IN_USE", False)
        return run()


def _quantized_rows(rows, hadamard_size, dtype):
    return FORMATS["int8" if dtype == torch.int8 else "fp8"].quantize_rows(rows, hadamard_size)


@pytest.mark.parametrize("rotation", [0, 16, 64])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_rounding_to_int8(dtype, bound, rotation, device, served, monkeypatch):
    rows = torch.randn(5, 320, device=device).mul_(torch.logspace(-3, 3, 5, device=device)[:, None]).to(dtype)
    rows[2] = 0
    found = _quantized_rows(rows, rotation, torch.int8)
    assert served == ["quantize_rows"] and found.values.dtype == torch.int8 and found.scales.dtype == torch.float32
    expected = plainly(monkeypatch, lambda: _quantized_rows(rows.float(), rotation, torch.int8))
    assert relative(found.scales, expected.scales) < bound
    differences = (found.values.int() - expected.values.int()).abs()
    assert differences.max() <= 1 and differences.sum() <= 0.01 * differences.numel()
    assert not found.values[2].any()


def test_rounding_to_fp8(device, served, monkeypatch):
    """Values are ones that fp8 can hold; the interpreter rounds some others wrongly (a mantissa that carries over)."""
    exponents, eighths = torch.randint(-4, 8, (6, 200)), torch.randint(8, 16, (6, 200))
    rows = (eighths / 8 * 2.0**exponents * torch.randn(6, 200).sign()).to(device)
    rows[:, 7] = 448
    found = _quantized_rows(rows, 0, torch.float8_e4m3fn)
    expected = plainly(monkeypatch, lambda: _quantized_rows(rows, 0, torch.float8_e4m3fn))
    assert served == ["quantize_rows"]
    assert torch.equal(found.values.float(), rows) and torch.equal(found.values.float(), expected.values.float())
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, -126), (torch.bfloat16, -126), (torch.float16, -14)])
@pytest.mark.parametrize("into", [torch.int8, torch.float8_e4m3fn])
def test_rounding_is_the_same_at_every_scale(dtype, smallest, into, device, served):
    rows = torch.randint(-127, 128, (4, 200), device=device) / 128
    rows[:, 0] = 1
    if into == torch.float8_e4m3fn or dtype == torch.bfloat16:
        rows = rows.sign()  # the interpreter rounds some others to fp8 wrongly, and reads subnormal bfloat16 wrongly
    expected = _quantized_rows(rows.to(dtype), 0, into)
    for exponent in (smallest, smallest + 3, -10, 10):
        found = _quantized_rows(rows.to(dtype) * 2.0**exponent, 0, into)
        assert torch.equal(found.values.view(torch.int8), expected.values.view(torch.int8)), exponent
        torch.testing.assert_close(found.scales.double(), expected.scales.double() * 2.0**exponent, rtol=1e-4, atol=0)
    assert set(served) == {"quantize_rows"}


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_vanish(value, rotation, device):
    rows = torch.randn(3, 64, device=device)
    rows[1, 5] = value
    found = _quantized_rows(rows, rotation, torch.int8)
    assert found.scales.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.skipif(INTERPRETED, reason="on CPUs products are taken by parts that stay in the cache")
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_products_in_low_precision(name, device, served, monkeypatch):
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    grad, weight = torch.randn(40, 768, device=device), torch.randn(768, 192, device=device)
    precision = Precision(name, 16)
    found = product(grad, weight, precision)
    assert served == ["quantize_rows"]
    assert relative(found, plainly(monkeypatch, lambda: product(grad, weight, precision))) < 1e-2


OPERATORS = {
    "project": lambda device: (torch.randn(2, 50, 20, device=device), (7, 7), 1, 0, 10, 8, "lp_l1", "orthogonal"),
    "lift": lambda device: (torch.randn(2, 11, 20, device=device), (7, 7), 1, 0, 10, 8, "lp_l1", "orthogonal"),
    "quantize_rows": lambda device: (torch.randn(6, 64, device=device), 16, torch.int8),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, device):
    torch.library.opcheck(getattr(torch.ops.lbp_peft, name).default, OPERATORS[name](device))


# Multiply-adds: 2 images, 49 tokens, 10 bases, 20 channels; 6 rows of 64, each mixed with 15 others.
@pytest.mark.parametrize(
    "name, expected", [("project", 2 * 49 * 10 * 20), ("lift", 2 * 49 * 10 * 20), ("quantize_rows", 6 * 64 * 16)]
)
def test_flop_counters_see_them(name, expected, device):
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.lbp_peft, name)(*OPERATORS[name](device))
    assert counter.get_total_flops() == 2 * expected


def test_under_torch_compile(device):
    seen = set()

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def note(graph, inputs):
            seen.update(str(node.target) for node in graph.graph.nodes)
            return graph

        return aot_autograd(fw_compiler=note, bw_compiler=note)(graph, inputs)

    layer = torch.nn.Linear(20, 30, device=device)

    def run(x):
        return low_rank_linear(
            x, layer.weight, layer.bias, plan=plan_of(TokenLayout((8, 8), 1), BasisSet(10), BasisSet(3))
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 65, 20, device=device, requires_grad=True)
        found, expected = (
            torch.autograd.grad(f(x), (x, layer.weight, layer.bias), torch.ones(batch, 65, 30, device=device))
            for f in (compiled, run)
        )
        assert max(relative(f, e) for f, e in zip(found, expected, strict=True)) < 1e-5
    assert {"lbp_peft.project.default", "lbp_peft.lift.default"} <= seen


# Without a GPU: that they compile for one.


def compiled_for_gpu(kernel, types, constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel.fn, signature=arguments | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["project", "lift"])
def test_kernels_of_tokens_compile_for_a_gpu(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("tokens", "coefficients", "matrices"), "*bf16") | dict.fromkeys(("places", "starts"), "*i64")
    kernel = project.project_kernel if name == "project" else lift.lift_kernel
    assert "mma" in compiled_for_gpu(kernel, types, {"R": 16, "T": 64, "PRECISION": "tf32x3", "BLOCK_C": 64})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("target", ["i8", "fp8e4nv"])
def test_rounding_compiles_for_a_gpu(target, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"rows": "*bf16", "values": f"*{target}", "scales": "*fp32", "hadamard": "*bf16", "factor": "fp32"}
    constants = {"ROTATE": True, "TO_INTEGERS": target == "i8", "GROUPS": 64, "B": 16, "PRECISION": "tf32x3"}
    assert "mma" in compiled_for_gpu(quantize.quantize_kernel, types, {"LARGEST": 127.0, **constants})


# The environment variable.


@pytest.fixture
def reloaded(monkeypatch):
    with monkeypatch.context() as patch:
        yield lambda value: (patch.setenv(kernels.VARIABLE, value), importlib.reload(kernels))[1]
    importlib.reload(kernels)


def test_the_kernels_are_off_unless_asked_for(reloaded):
    assert not reloaded("").IN_USE
    assert reloaded("triton").IN_USE
    with pytest.raises(ValueError, match="LBP_PEFT_KERNELS is 'cuda'"):
        reloaded("cuda")


def test_without_triton(reloaded, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("common", "lift", "project", "quantize"):
            patch.delitem(sys.modules, f"lbp_peft.kernels.{name}")
            patch.delattr(kernels, name)
        patch.setitem(sys.modules, "triton", None)
        with pytest.raises(ImportError, match="needs triton"):
            reloaded("triton")
