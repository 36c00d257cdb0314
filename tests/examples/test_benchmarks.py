"""Small runs of the benchmarks: what they count is checked, what they time is not."""

import gc
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from benchmarks import (
    adaptive_variants,
    call_overhead,
    input_gradients,
    methods,
    peak_memory_table,
    projections,
    roofline,
    single_layers,
    step_profile,
    steps_by_process,
    summed_weights,
    tracing_cost,
    training_step,
)
from benchmarks.comparisons import COMPARISON, COMPILED, MEMORY, expanded
from benchmarks.floors import Rates, Work, measure_rates
from benchmarks.methods import NotAvailable, adapted, default_methods, words
from benchmarks.models import MODELS, Model
from benchmarks.records import label
from models import tiny_vit
from processes import environment_of
from torch import nn

from lbp_peft import layout_report
from lbp_peft.bases.grids import TokenLayout
from lbp_peft.encoder import encoder_linears
from lbp_peft.measure import multiply_adds
from lbp_peft.measure.memory import allocated
from lbp_peft.measure.timing import quartiles, ratios, rounds_within, run_interleaved

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
CPU = torch.device("cpu")
N = 1000


# Timing


def test_runs_take_turns():
    order = []
    results = run_interleaved([lambda: order.append("a") or 1, lambda: order.append("b") or 2], range(3))
    assert order == list("ababab") and results == [[1, 1, 1], [2, 2, 2]]


def test_only_the_last_call_of_a_turn_counts():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1
        return calls[name]

    assert run_interleaved([lambda: count("a"), lambda: count("b")], range(2), unmeasured=1) == [[2, 4], [2, 4]]


def test_ratios_are_taken_within_a_round_and_quartiles_include_the_ends():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rounds_stop_when_the_time_is_up():
    assert list(rounds_within(minutes=0, rounds=5)) == [0]
    assert list(rounds_within(minutes=60, rounds=5)) == [0, 1, 2, 3, 4]


# Peak memory


def test_the_peak_is_what_is_allocated_at_once():
    def run():
        a = torch.ones(N)
        b = a + 1  # two
        del a
        c = b + 1  # two again
        c = torch.cat((b, c, c))  # b, the old c, and three more: five
        del b
        return c[: N // 2].clone()  # three and a half

    with allocated(CPU) as memory:
        left = run()
    assert memory.left == left.nbytes == 4 * N // 2
    assert 0 <= memory.peak - 4 * 5 * N < 100  # beside numbers that became tensors for a moment


def test_the_peak_of_a_backward_pass():
    model, x = nn.Linear(N, N, bias=False), torch.ones(8, N)
    with allocated(CPU) as memory:
        model(x).sum().backward()
    # The gradient of the weight, with that of the output (one number, expanded) or a copy of it.
    assert memory.left == 4 * N * N
    assert 4 * N * N <= memory.peak <= 4 * (N * N + 2 * 8 * N) + 100


# Methods


def test_a_method_is_words_with_settings():
    assert words("lora-all:r=16+lbp-wht:r=3,grad_input_dtype=full") == [
        ("lora-all", {"r": 16}),
        ("lbp-wht", {"r": 3, "grad_input_dtype": "full"}),
    ]


@pytest.mark.parametrize("method", ["", "lorax", "full+", "lbp-wht:r", "lbp-wht:r="])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(ValueError, match="Cannot read the method"):
        words(method)


def test_methods_share_the_base_models_memory_and_nothing_else():
    base = tiny_vit()
    full, lora = (adapted(base, method, ["classifier"]) for method in ("full", "lora-qv"))
    name = "vit.layers.0.attention.q_proj"
    weights = [base.get_submodule(name).weight, full.get_submodule(name).weight]
    weights.append(lora.get_base_model().get_submodule(name).base_layer.weight)
    assert len({weight.data_ptr() for weight in weights}) == 1 and len({id(weight) for weight in weights}) == 3
    assert [weight.requires_grad for weight in weights] == [True, True, False]


def test_the_defaults_are_what_this_version_knows(monkeypatch):
    known = default_methods()
    assert {"full", "lora-all", "lbp-wht:r=10,grad_input_rank=10"} <= set(known) <= set(methods.DEFAULT_METHODS)
    monkeypatch.setattr(methods, "DEFAULT_METHODS", ("lora-all+lbp-wht:grad_input_dtype=nonsense", "full"))
    assert default_methods() == ["full"]


def test_a_set_stands_for_its_methods_and_each_is_measured_once():
    assert expanded(["full", "comparison", "lora-all:r=4"]) == [*COMPARISON, "lora-all:r=4"]
    together = expanded(["comparison", "memory"])
    assert len(together) == len(set(together)) and set(together) == {*COMPARISON, *MEMORY}
    for method in together:
        adapted(tiny_vit(image_size=64), method, ["classifier"])
    assert [words(method)[:-1] for method in COMPILED] == [words(method) for method in COMPARISON]
    parser = training_step.parser(None)
    options = training_step.completed(parser.parse_args(["--methods", "memory"]), parser)
    assert options.methods == list(MEMORY)


def test_steps_and_peaks_are_measured_of_the_same_methods():
    assert {label(method) for method in MEMORY} == {label(method) for method in peak_memory_table.METHODS}


def test_every_model_of_a_run_is_compiled():
    """By default PyTorch compiles eight versions of the same code, and runs the others in eager mode."""

    class Wrapped(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(width, 1)

        def forward(self, x):
            return self.layer(x)

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for width in range(1, 11):
            model = methods.compiled(Wrapped(width), [], {"backend": "eager", "dynamic": False})
            assert model(torch.ones(2, width)).shape == (2, 1)
    torch.compiler.reset()
    assert torch._dynamo.config.recompile_limit == 8


def test_what_cannot_be_had_is_said():
    with pytest.raises(NotAvailable, match="grad_input_dtype"):
        adapted(tiny_vit(), "lbp-wht:grad_input_dtype=nonsense", ["classifier"])
    with pytest.raises(NotAvailable, match="gradient checkpointing"):
        adapted(nn.Sequential(nn.Linear(2, 2)), "full+checkpointing", [])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_has_a_loss_and_its_heads(name):
    kind = MODELS[name]
    if name.startswith("efficientformer"):
        pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = kind.build(kind.size)
        loss = kind.loss(model, kind.batch(1, kind.size))
    assert loss.shape == () and all(hasattr(model, head) for head in kind.heads)


# The programs


def tiny(size):
    return tiny_vit(image_size=size[0])


TINY = Model(tiny, size=(32, 32), batch=lambda n, size: {
    "pixel_values": torch.randn(n, 3, *size), "labels": torch.randint(5, (n,)),
})  # fmt: skip


def test_training_step(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    monkeypatch.setitem(MODELS, "tiny", TINY)
    chosen = [*default_methods(), "lbp-wht:grad_input_dtype=nonsense"]
    output = tmp_path / "new" / "tiny.json"
    arguments = ["--model", "tiny", "--batch-size", "2", "--rounds", "2", "--device", "cpu", "--output", str(output)]
    training_step.main([*arguments, "--methods", *chosen])
    gc.unfreeze()

    printed = capsys.readouterr().out
    assert "left out lbp-wht:grad_input_dtype=nonsense: grad_input_dtype must be" in printed
    record = json.loads(output.read_text())
    assert record["environment"]["torch"] == torch.__version__ and record["options"]["image_size"] == [32, 32]
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == chosen[:-1] and all(method in printed for method in rows)
    assert output.with_suffix(".png").stat().st_size > 10_000

    full = rows["full"]
    parameters = sum(parameter.nbytes for parameter in tiny((32, 32)).parameters())
    assert full["trained_mib"] == full["weights_mib"] == parameters / 2**20
    assert full["peak_mib"] > full["weights_mib"] + full["saved_mib"]
    assert all(len(row["rounds_ms"]) == 2 and row["step_over_full"][0] > 0 for row in rows.values())
    # A trained copy of every linear layer of the encoder, and of the head.
    assert rows["lbp-wht:r=10,grad_input_dtype=full"]["weights_mib"] > 1.5 * full["weights_mib"]
    for leaner in ("full+checkpointing", "lora-fa", "lbp-wht:r=10,grad_input_dtype=full"):
        assert rows[leaner]["saved_over_full"] < 0.9
    assert rows["lora-fa"]["saved_mib"] < rows["lora-all"]["saved_mib"]
    assert rows["full+checkpointing"]["backward_gmacs"] > full["backward_gmacs"]


def test_a_profile_tells_products_from_projections(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    output = tmp_path / "profile.json"
    chosen = ["full", "lbp-wht:r=10,grad_input_dtype=full"]
    small = ["--model", "tiny", "--batch-size", "2", "--rounds", "1", "--output", str(output)]
    step_profile.main([*small, "--methods", *chosen])
    printed = capsys.readouterr().out
    full, low_rank = json.loads(output.read_text())["rows"]
    assert [full["method"], low_rank["method"]] == chosen and all(method in printed for method in chosen)
    for phase in ("forward", "backward"):
        assert set(full[phase]) == set(step_profile.COLUMNS) and min(full[phase].values()) >= 0
        assert min(full[phase][column] for column in ("layers' products", "attention", "GELU and norms")) > 0
        assert full[phase]["projections and lifts"] == 0 < low_rank[phase]["projections and lifts"]


def test_steps_by_process(tmp_path, capsys):
    output = tmp_path / "steps.json"
    small = ["--model", "vit-s", "--image-size", "32", "--batch-size", "1", "--rounds", "2", "--device", "cpu"]
    methods = ["full", "lbp-wht:r=3,grad_input_rank=3", "lbp-wht:r=3,nonsense=1"]
    with pytest.raises(SystemExit):
        steps_by_process.main([*small, "--methods", "full+nonsense"])
    with pytest.raises(SystemExit):
        steps_by_process.main([*small, "--methods", "full+cuda-graph"])
    steps_by_process.main([*small, "--threads", "1", "--at-once", "2", "--output", str(output), "--methods", *methods])

    printed = capsys.readouterr().out
    assert "left out lbp-wht:r=3,nonsense=1: " in printed
    full, low_rank = json.loads(output.read_text())["rows"]
    assert [full["method"], low_rank["method"]] == methods[:2]
    assert len(low_rank["rounds_ms"]) == 2 and low_rank["step_over_full"][0] > 0
    assert full["cosine"] == 1 and low_rank["cosine"] < 1
    assert low_rank["backward_gmacs"] < full["backward_gmacs"]


@pytest.mark.parametrize("flags", [[], ["--cpu-time"]])
def test_input_gradients(flags, tmp_path, capsys):
    output = tmp_path / "input_gradients.json"
    small = ["--width", "32", "--grid", "6", "--batch-size", "2", "--rounds", "2", "--device", "cpu"]
    input_gradients.main([*small, *flags, "--adaptive", "3", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["way"] for row in rows] == ["exact", "walsh r=10", "adaptive k=3"] * 3
    assert {tuple(row["features"]) for row in rows} == {(32, 32), (32, 128), (128, 32)}
    assert all(abs(sum(row["parts_ms"].values()) - row["least_ms"]) < 1e-6 for row in rows)
    assert "adaptive k=3" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_single_layers(flags, tmp_path, capsys):
    output = tmp_path / "layers.json"
    small = ["--batch-size", "1", "--rounds", "1", "--rate-side", "64", "--rate-mib", "1", "--device", "cpu"]
    for layers, tokens in (("vit-s qkv", 197), ("efficientformer-l1 stage 3 fc1", 49)):
        single_layers.main([*small, *flags, "--layers", layers, "--output", str(output)])
        record = json.loads(output.read_text())
        modes = [row["mode"] for row in record["rows"]]
        assert {"plain", "full", "10"} <= set(modes) <= {*single_layers.MODES, "10"}
        assert f"1 x {tokens} x " in capsys.readouterr().out
        assert record["rows"][0]["over_plain"] == [1.0, 1.0, 1.0]


def test_a_layer_multiplies_and_moves_no_less_than_this():
    shape = next(shape for shape in single_layers.SHAPES if shape.layer == "vit-s fc1")
    rates = Rates({"float32": 1e9, "int8": 8e9}, 1e9)
    x, y, weight = 2 * 197 * 384, 2 * 197 * 1536, 384 * 1536

    plain = single_layers.work(shape, "plain", 10, 2, False, rates)
    assert plain == Work({"float32": 3 * x * 1536}, 4 * (2 * x + 2 * y + x + 3 * weight))
    kept = 2 * 41 * 384  # of 14 x 14 patches: four blocks of 10, and [CLS]
    int8 = single_layers.work(shape, "int8", 10, 2, False, rates)
    assert int8 == Work({"float32": x * 1536, "int8": (kept + x) * 1536}, 4 * (2 * x + 2 * y + 2 * kept + 3 * weight))
    paper = single_layers.work(shape, "10", 10, 2, False, rates)
    assert paper.multiply_adds == {"float32": (x + 2 * kept) * 1536}
    assert plain.seconds(rates) == (3 * x * 1536 / 1e9, plain.bytes / 1e9)
    assert single_layers.work(shape, "bf16", 10, 2, False, rates).seconds(rates) is None  # not available


def test_rates_are_those_of_the_device():
    rates = measure_rates(CPU, side=64, mib=1)
    assert rates.multiply_adds["float32"] > 0 and rates.bytes > 0


def test_the_programs_find_their_modules_from_any_folder(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--help"]
    here = environment_of(BENCHMARKS.parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here, timeout=120)
    assert done.returncode == 0 and "--methods" in done.stdout, done.stderr[-2000:]


def test_multiply_adds_of_efficientformer_by_hand():
    """Forward products are counted by hooks on the layers, and each has two gradients where both are asked for."""
    pytest.importorskip("timm", reason="timm is not installed")
    import argparse

    from benchmarks.backward_cost import adapted, backward_macs
    from timm.models.efficientformer import Attention

    model = adapted(argparse.Namespace(classes=10), "exact", r"stages\.")
    expected = 0

    def count(module, inputs, output):
        nonlocal expected
        x = inputs[0]
        if isinstance(module, Attention):
            tokens = x.shape[1]
            product = len(x) * module.num_heads * tokens * tokens
            expected += 2 * product * (module.key_dim + module.val_dim)  # q k^T and its product with v
            return
        rows = output.numel() // output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[:-1].numel()
        expected += rows * module.weight.numel() * (x.requires_grad + module.weight.requires_grad)

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, Attention)):
            module.register_forward_hook(count)
    assert backward_macs(model, torch.randn(2, 3, 224, 224), check=True) == expected


@pytest.mark.parametrize("images_need_gradients", [False, True])
def test_the_check_against_pytorchs_counter_covers_what_that_gets_wrong(images_need_gradients, monkeypatch):
    from benchmarks import backward_cost

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.linear = nn.Linear(8, 24)

        def forward(self, x):
            query, key, value = self.linear(self.depthwise(self.conv(x)).flatten(2).mT).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])

    images = torch.randn(2, 3, 8, 8, requires_grad=images_need_gradients)
    pixels = 2 * 16
    convolutions = pixels * 8 * 12 * (1 + images_need_gradients) + 2 * pixels * 8 * 9
    expected = convolutions + 2 * pixels * 8 * 24 + 5 * pixels * 16 * 8
    assert backward_cost.backward_macs(Mixed(), images, check=True) == expected
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(backward_cost, "multiply_adds", _half_of_it)
        backward_cost.backward_macs(Mixed(), images, check=True)


@contextmanager
def _half_of_it():
    with multiply_adds() as counted:
        yield counted
    counted.total //= 2


def test_several_words_are_joined_by_a_slash():
    model = adapted(tiny_vit(), "lbp-wht:r=3,compress_activations=norm/activation", ["classifier"])
    assert model.active_peft_config.compress_activations == ("activation", "norm")


def test_projections(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(projections, "LAYOUTS", [TokenLayout((8, 8), 1)])
    monkeypatch.setattr(projections, "CHANNELS", (16,))
    output = tmp_path / "projections.json"
    projections.main(
        ["--batch-size", "2", "--r", "3", "21", "--rounds", "2", "--device", "cpu", "--output", str(output)]
    )
    rows = json.loads(output.read_text())["rows"]
    assert [(row["dtype"], row["r"], row["k"]) for row in rows] == [
        ("float32", 3, 4), ("float32", 21, 22), ("bf16", 3, 4), ("bf16", 21, 22),
    ]  # fmt: skip
    assert all(row["project_ratio"][0] > 0 and row["chosen"] == "one matrix" for row in rows)
    assert "one matrix ms" in capsys.readouterr().out


def test_tracing_cost(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    output = tmp_path / "tracing_cost.json"
    small = ["--models", "tiny", "--batch-size", "2", "--rounds", "3", "--device", "cpu"]
    tracing_cost.main([*small, "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["traced_forward_ratio"][1] > 1 > row["look_ups_of_step"][1] > 0
    assert 0 < row["peak_mib"] <= row["traced_peak_mib"] < 2 * row["peak_mib"]
    assert "traced / forward" in capsys.readouterr().out


# Peaks of processes


def test_every_other_block_is_checkpointed():
    blocks = adapted(tiny_vit(), "lbp-wht:r=3+checkpointing:every=2", ["classifier"]).base_model.model.vit.layers
    assert [block.gradient_checkpointing for block in blocks] == [False, True]
    for wrong in ("every=0", "each=2"):
        with pytest.raises(NotAvailable, match="every"):
            adapted(tiny_vit(), f"full+checkpointing:{wrong}", ["classifier"])


def test_the_peak_of_this_process_grows_with_what_it_holds():
    before = peak_memory_table.peak_of_process()
    held = torch.ones(2**24)  # 64 MiB
    assert peak_memory_table.peak_of_process() >= max(before, held.nbytes)


def test_peaks_are_measured_once_and_put_beside_those_of_the_references(tmp_path, monkeypatch, capsys):
    output = tmp_path / "peaks.json"
    arguments = ["--model", "vit-s", "--methods", "full", "lora-all", "lbp-wht", "velora", "--output", str(output)]
    asked = []

    def in_a_process(given, limit):
        asked.append(given)
        method = given[given.index("--methods") + 1]
        if "times" in given:
            return {name: {"step_ms": [1, 2, 3], "least_ms": 1, "over full": [1, 1.5, 2]} for name in ("full",)}, ""
        if method == "velora":
            return None, "ended by signal 9"
        if "tensors" in given:
            return {"stay_mib": 200, "saved_mib_an_image": 30}, ""
        return {"peak_mib": {"full": 1000, "lora-all": 1200, "lbp-wht": 900}[method], "libraries_mib": 300}, ""

    monkeypatch.setattr(peak_memory_table, "in_a_process", in_a_process)
    peak_memory_table.main(arguments)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("lbp-wht") and "MiB" not in line)
    assert line.split()[1:5] == ["900", "0.900", "0.750", "740"] and "velora, batch 8: ended by signal 9" in printed
    assert len(asked) == 9 and json.loads(output.read_text())["peaks"]["8"]["full"]["peak_mib"] == 1000
    peak_memory_table.main([*arguments, "--rounds", "0"])
    assert len(asked) == 11  # only the one that failed
    with pytest.raises(SystemExit, match="other options"):
        peak_memory_table.main([*arguments, "--steps", "3"])
    with pytest.raises(SystemExit):
        peak_memory_table.main([*arguments, "--steps", "1"])


def test_a_process_trains_and_reports_its_peak(monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "vit-s", Model(lambda size: tiny_vit(), size=(32, 32), batch=small_batch))
    peak_memory_table.main(["--model", "vit-s", "--only", "peak", "--methods", "lbp-wht", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["peak_mib"] >= found["libraries_mib"] > 0
    peak_memory_table.main(["--model", "vit-s", "--only", "tensors", "--methods", "lbp-wht", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["stay_mib"] > 0 and found["saved_mib_an_image"] > 0
    peak_memory_table.main(["--model", "vit-s", "--only", "peak", "--methods", "lbp-wht:r=99", "--device", "cpu"])
    assert "r must be" in json.loads(capsys.readouterr().out)["left out"]


def small_batch(batch_size, size):
    return {"pixel_values": torch.randn(batch_size, 3, *size), "labels": torch.zeros(batch_size, dtype=torch.long)}


def test_roofline_by_hand(capsys):
    layer = roofline.Layer(2, 197, 41, 768, 3072)
    forward, backward = roofline.full(layer)
    assert sum(kernel.multiply_adds for kernel in (*forward, *backward)) == 3 * 2 * 197 * 768 * 3072
    kernel, gpu = roofline.product(10, 20, 30), roofline.Gpu(1e9, 1e6)
    assert (kernel.bytes, kernel.multiply_adds) == (2 * (200 + 600 + 300), 6000)
    assert kernel.seconds(gpu) == 2200 / 1e6
    roofline.main([])
    assert "not measured" in capsys.readouterr().out


def test_summed_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(summed_weights, "LAYERS", {"small": (48, 32)})
    output = tmp_path / "sums.json"
    small = ["--rows", "64", "--rows-of-errors", "64", "--rounds", "1", "--device", "cpu"]
    summed_weights.main([*small, "--output", str(output)])
    rows = [row for row in json.loads(output.read_text())["rows"] if row.get("weights") == "float32"]
    for row in rows:
        branch, one = (row["errors"][way][0] for way in ("branch", "one product"))
        assert 0 < one < 1.5 * branch < 1e-5


def test_float8_converts_the_encoder(monkeypatch):
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    model = adapted(tiny_vit(), "float8:emulate=true", ["classifier"])
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert converted == set(encoder_linears(tiny_vit()))
    exact = tiny_vit()
    x, grads = torch.randn(2, 3, 32, 32), []
    for one in (model, exact):
        one(pixel_values=x).logits.square().sum().backward()
        grads.append(torch.cat([one.get_submodule(name).weight.grad.flatten() for name in sorted(converted)]))
    cosine = torch.cosine_similarity(*grads, dim=0)
    assert 0.9 < cosine < 0.99999
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotAvailable, match="GPU of compute capability"):
        adapted(tiny_vit(), "float8", ["classifier"])


def test_lora_in_one_product_has_loras_gradients(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    grads = []
    for method in ("lora-all", "lora-one-product"):
        torch.manual_seed(3)
        model = adapted(tiny((32, 32)), method, ["classifier"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        batch = TINY.batch(2, (32, 32))
        TINY.loss(model, batch).backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", adaptive_variants.VARIANTS, ids=lambda variant: variant.name)
def test_variants_of_the_adaptive_basis(variant):
    """Each changes the gradients or the number of fits, and keeps the gradients' direction."""
    base = tiny_vit(num_hidden_layers=3, initializer_range=0.3)  # so that attention has patterns of its own
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}

    def measured(of, rank):
        return adaptive_variants.measured(base, batch, ["classifier"], of, r=64, rank=rank)

    built = measured(adaptive_variants.VARIANTS[0], 6)
    *cosines, fits, ms = measured(variant, 6)
    assert all(0.3 < value <= 1.0001 for value in cosines) and ms > 0 and 0 < fits <= built[4]
    if variant is not adaptive_variants.VARIANTS[0]:
        assert fits < built[4] or max(abs(one - other) for one, other in zip(cosines, built, strict=False)) > 1e-5


def test_call_overhead(tmp_path):
    call_overhead.main(["--rounds", "2", "--output", str(tmp_path / "calls.json")])
    rows = {row["way"]: row for row in json.loads((tmp_path / "calls.json").read_text())["rows"]}
    assert rows["plain"]["extra_us"] == rows["LoRA"]["extra_us"] == [0, 0, 0]
    assert all(part[1] > 0 for row in rows.values() for part in row["us"])


@pytest.mark.parametrize("way", call_overhead.MAKE)
@pytest.mark.own_choice
def test_the_layers_whose_calls_are_measured_are_what_they_are_called(way):
    model = call_overhead.MAKE[way]().train()
    model(torch.randn(1, call_overhead.TOKENS, call_overhead.FEATURES, requires_grad=True)).sum().backward()
    if "low-rank" in way or "auto" in way:
        ran = layout_report(model).layers.values()
        assert [bool(one.why_exact) for one in ran] == ["low-rank" not in way] * call_overhead.LAYERS
