"""The methods that LBP-WHT is compared with are exact where their papers say so, and in the limit of their settings."""

import json

import pytest
import torch
from benchmarks import rivals_table
from benchmarks.gradient_fidelity import both_gradients
from benchmarks.methods import NotAvailable, adapted
from benchmarks.models import MODELS, Model
from benchmarks.rivals import RIVALS
from benchmarks.rivals.gradient_filter import GradientFilter
from benchmarks.rivals.hlq import HLQ
from benchmarks.rivals.hosvd import HOSVD
from benchmarks.rivals.hot import HOT, PER_IMAGE, PER_TOKEN
from benchmarks.rivals.instant import INSTANT
from benchmarks.rivals.linear import RivalLinear, square_grid
from benchmarks.rivals.lowmemory_bp import MSLayerNorm, ReGELU2
from benchmarks.rivals.rounding import dequantize, lowest_sequencies, quantize
from datasets import Dataset, Features, Image
from models import tiny_vit
from PIL import Image as PILImage
from torch import nn
from torch.nn import functional as F

from lbp_peft.measure import saved_activations

B, L, C_IN, C_OUT = 3, 26, 24, 48  # [CLS] and a grid of 5 x 5, which neither 2 nor 16 divides
MANY_BITS = {"bits": 24, "weight_bits": 24}
IN_THE_LIMIT = {
    "HOSVD": (HOSVD(energy=1.0), 1e-10),
    "HLQ": (HLQ(**MANY_BITS, rank=16), 1e-5),
    "HOT": (HOT(**MANY_BITS, rank=16), 1e-5),
    "INSTANT": (INSTANT(energy=1.0), 1e-10),
    "gradient filtering": (GradientFilter(patch=1), 1e-12),
}
BY_DEFAULT = {
    "HOSVD": HOSVD(),
    "HLQ": HLQ(),
    "HOT": HOT(),
    "INSTANT": INSTANT(),
    "gradient filtering": GradientFilter(),
}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(C_IN, C_OUT, dtype=torch.float64)


def gradients(module, x, g):
    x = x.detach().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, module.weight, module.bias], g)


def inputs(dtype=torch.float64):
    """Inputs that are smooth over the grid, so that low frequencies hold most of the energy."""
    ramp = torch.linspace(0, 3, L, dtype=dtype)[:, None]
    return [(ramp + torch.arange(width, dtype=dtype)).sin() + 0.1 * torch.randn(B, L, width, dtype=dtype)
            for width in (C_IN, C_OUT)]  # fmt: skip


def cosine(one, other):
    return F.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


@pytest.mark.parametrize("name", IN_THE_LIMIT)
def test_gradients_are_exact_in_the_limit(layer, name):
    rule, tolerance = IN_THE_LIMIT[name]
    x, g = inputs()
    for found, exact in zip(gradients(RivalLinear(layer, rule), x, g), gradients(layer, x, g), strict=True):
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance * float(exact.detach().abs().max()))


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_by_default_gradients_point_the_right_way_and_are_not_exact(layer, name):
    x, g = inputs()
    y, dx, dw, db = gradients(RivalLinear(layer, BY_DEFAULT[name]), x, g)
    exact = gradients(layer, x, g)
    assert torch.equal(y, exact[0])
    torch.testing.assert_close(db, exact[3])
    assert 0.8 < cosine(dw, exact[2]) < 1 - 1e-9 and dw.shape == exact[2].shape
    assert cosine(dx, exact[1]) > 0.8 and dx.shape == x.shape
    assert (cosine(dx, exact[1]) > 1 - 1e-12) == (name == "HOSVD")  # which alone keeps dx exact


@pytest.mark.parametrize(
    "name, size",
    [
        ("HLQ", B * (2 * 8) * C_IN + 4 * B),  # 26 tokens are two blocks of 16; 8 rows of each in int8, and scales
        ("HOT", B * (2 * 8) * C_IN + 4 * B),
        ("gradient filtering", 4 * B * (1 + 9) * C_IN),  # [CLS] and 3 x 3 squares
    ],
)
def test_what_is_kept(layer, name, size):
    module = RivalLinear(layer.float(), BY_DEFAULT[name])
    x, _ = inputs(torch.float32)
    with saved_activations(module) as saved:
        module(x.requires_grad_())
    assert saved.bytes == size


def test_hosvd_and_instant_keep_what_low_rank_inputs_need(layer):
    torch.manual_seed(0)
    factors = [torch.randn(size, 2, dtype=torch.float64) for size in (B, L, C_IN)]
    x = torch.einsum("bi,li,ci->blc", *factors)
    kept = HOSVD(energy=1 - 1e-12).kept(x)
    assert [tuple(part.shape) for part in kept] == [(2, 2, 2), (B, 2), (L, 2), (C_IN, 2)]
    assert INSTANT(energy=1 - 1e-12, oversampling=0).kept(x)[0].shape == (B, 2, C_IN)
    exact = gradients(layer, x, g := inputs()[1])[2]
    torch.testing.assert_close(gradients(RivalLinear(layer, HOSVD(energy=1 - 1e-12)), x, g)[2], exact)


def test_hosvd_keeps_the_share_of_the_energy():
    x, _ = inputs()
    core = HOSVD(energy=0.9).kept(x)[0]
    assert 0.7 * x.square().sum() <= core.square().sum() < x.square().sum()  # each axis loses at most a tenth


def test_instant_calibrates_again_after_so_many_passes(layer):
    rule = INSTANT(every=2)
    module, (x, g) = RivalLinear(layer, rule), inputs()
    seen = []
    for step in range(3):
        gradients(module, x + step, g)
        seen.append((rule.of_input, rule.of_gradient))
    assert seen[0][0] is seen[1][0] and seen[0][1] is seen[1][1]
    assert seen[1][0] is not seen[2][0] and seen[1][1] is not seen[2][1]


def test_instant_makes_up_for_the_discarded_energy():
    x, _ = inputs()
    squares = torch.linalg.eigvalsh((x @ x.mT).mean(0)).flip(0).square()
    bases = INSTANT(energy=0.5, oversampling=0).calibrated(x)
    share = squares[: len(bases)].sum() / squares.sum()
    torch.testing.assert_close(bases @ bases.T, torch.eye(len(bases), dtype=x.dtype) / share)


def test_gradient_filtering_is_lbp_with_constant_bases(layer):
    """Means times sums equal the result of a projection onto functions that are constant on each square."""
    x, g = inputs()
    rule = GradientFilter()
    onto = torch.eye(L, dtype=x.dtype)[None]
    projection = rule.copied(rule.means(onto), L)[0]
    torch.testing.assert_close(projection @ projection, projection)
    torch.testing.assert_close(projection, projection.T)
    _, dx, dw, _ = gradients(RivalLinear(layer, rule), x, g)
    torch.testing.assert_close(dx, projection @ g @ layer.weight)
    torch.testing.assert_close(dw, torch.einsum("blo,blc->oc", projection @ g, x))


def test_stochastic_rounding_has_the_right_mean_and_the_nearest_the_least_error():
    torch.manual_seed(0)
    x = torch.randn(1, 40, 5, dtype=torch.float64)
    mean = torch.stack([dequantize(*quantize(x, 4, (1, 2), stochastic=True)) for _ in range(400)]).mean(0)
    values, scales = quantize(x, 4, (1, 2))
    assert (mean - x).abs().max() < 5 * scales.item() / 2 / 400**0.5
    assert (dequantize(values, scales) - x).abs().max() <= scales.item() / 2 and values.abs().max() == 7


def test_all_sequencies_of_padded_blocks_keep_inner_products():
    x, g = inputs()
    for prefix in (0, 1):
        torch.testing.assert_close(
            lowest_sequencies(x, 16, prefix).mT @ lowest_sequencies(g, 16, prefix), x.mT @ g
        )  # fmt: skip
    assert torch.equal(lowest_sequencies(x, 3, prefix=1)[:, :1], x[:, :1])


def test_hot_chooses_scales_for_tokens_where_one_stands_out(layer):
    x, g = inputs()
    even, uneven = HOT(), HOT()
    gradients(RivalLinear(layer, even), x, g.sign())
    g[:, 0] *= 5
    gradients(RivalLinear(layer, uneven), x, g)
    assert even.axes["dx"] == PER_IMAGE and uneven.axes["dx"] == PER_TOKEN


# LowMemoryBP


def test_regelu2_is_gelu_with_a_step_for_a_derivative_in_two_bits():
    x = torch.linspace(-6, 6, 1001, requires_grad=True)
    module = ReGELU2()
    with saved_activations(module) as saved:
        y = module(x)
    assert torch.equal(y, F.gelu(x)) and saved.bytes == 251
    (found,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(F.gelu(x).sum(), x)
    assert len(found.unique()) == 4 and cosine(found, exact) > 0.95
    assert abs((found - exact).mean()) < 1e-3  # so that the sum of ReLUs ends where GELU does
    assert found[0] == 0 and found[-1].item() == pytest.approx(1, abs=1e-4)


def test_the_layer_norm_is_exact_and_shares_its_output():
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(8, dtype=torch.float64), nn.Linear(8, 4, dtype=torch.float64)
    nn.init.normal_(norm.weight, 1, 0.2)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    shared = MSLayerNorm(norm)
    together = nn.Sequential(shared, linear)
    with saved_activations(together) as saved:
        y = together(x)
    assert saved.bytes == 8 * (2 * 5 * 8 + 2 * 5)  # the linear layer's input and 1 / standard deviation
    trained = [x, norm.weight, norm.bias]
    found = torch.autograd.grad(y.square().sum(), trained)
    exact = torch.autograd.grad(linear(norm(x)).square().sum(), trained)
    torch.testing.assert_close(found, exact)


# On a model


def model_gradients(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RIVALS)
def test_a_model_is_trained_by_the_word(name):
    torch.manual_seed(0)
    base = tiny_vit(hidden_act="gelu")
    side = base.config.image_size
    batch = {"pixel_values": torch.randn(4, 3, side, side), "labels": torch.arange(4)}
    losses, found = zip(
        *(model_gradients(adapted(base, word, []).train(), batch) for word in ("full", name)), strict=True
    )
    torch.testing.assert_close(losses[1], losses[0])
    assert found[0].keys() == found[1].keys()
    all_of = [torch.cat([own[key].flatten() for key in found[0]]) for own in found]
    assert cosine(*all_of) > 0.5 and not torch.equal(*all_of)
    model = adapted(base, name, []).eval()
    assert torch.equal(model(**batch).logits, base.eval()(**batch).logits)


def test_what_does_not_fit_is_said():
    with pytest.raises(NotAvailable, match="hosvd: energy"):
        adapted(tiny_vit(), "hosvd:energy=2", [])
    with pytest.raises(NotAvailable, match="unexpected keyword argument 'r'"):
        adapted(tiny_vit(), "hlq:r=3", [])
    with pytest.raises(NotAvailable, match="another method"):
        adapted(tiny_vit(), "lora-all+hlq", [])
    with pytest.raises(NotAvailable, match="neither a GELU nor"):
        adapted(nn.Sequential(nn.Linear(2, 2)), "lowmemory-bp", [])
    with pytest.raises(ValueError, match="not a square grid"):
        square_grid(60)
    with pytest.raises(ValueError, match=r"\(B, L, C\)"):
        RivalLinear(nn.Linear(2, 2), HLQ()).train()(torch.ones(3, 2))


# The table


def tiny_batch(size=4):
    return {"pixel_values": torch.randn(size, 3, 32, 32), "labels": torch.arange(size)}


def test_fidelity_is_one_for_exact_gradients_and_less_for_others():
    rows = rivals_table.chosen(["full", "lbp-wht:r=3,grad_input_rank=3", "instant"])
    results = rivals_table.measured_fidelity(tiny_vit(image_size=32), tiny_batch(), tiny_batch(), rows)
    keys = ["dw", "dx", "block_dw", "block_dx"]
    assert [results[0][key] for key in keys] == pytest.approx([1] * 4, abs=1e-6)
    for row in results[1:]:
        assert all(0 < row[key] < 1 + 1e-6 for key in keys) and len(row["layers"]) == 6
        assert row["block_dw"] < 0.99 and row["block_dx"] < 0.99


def test_gradient_fidelity_takes_a_related_method_for_a_setting():
    torch.manual_seed(0)
    base, batch = tiny_vit(image_size=32).double(), {**tiny_batch()}
    batch["pixel_values"] = batch["pixel_values"].double()
    found, exact = both_gradients(base, batch, "hosvd:energy=1.0", ["classifier"])
    assert len(found) == 6 * base.config.num_hidden_layers
    torch.testing.assert_close(found, exact)


def test_the_program_writes_records_and_prints_the_table(tmp_path, capsys, monkeypatch):
    tiny = Model(lambda size: tiny_vit(image_size=size[0]), size=(32, 32), batch=lambda n, size: tiny_batch(n))
    monkeypatch.setitem(MODELS, "vit-b", tiny)
    given = ["--methods", "full", "gradient-filter", "--rounds", "1", "--output", str(tmp_path)]
    images = Dataset.from_dict(
        {"image": [PILImage.new("RGB", (8, 8), (shade, 0, 255)) for shade in range(0, 40, 10)]},
        features=Features({"image": Image()}),
    )
    images.to_parquet(str(tmp_path / "images.parquet"))
    rivals_table.main(["costs", *given, "--train-files", str(tmp_path / "images.parquet")])
    record = json.loads((tmp_path / "rivals-costs.json").read_text())
    full, filtered = record["rows"]
    assert filtered["forward_gmacs"] == full["forward_gmacs"]
    assert filtered["backward_gmacs"] < 0.6 * full["backward_gmacs"] and filtered["saved_mib"] < full["saved_mib"]
    rows = [{"method": "full", **dict.fromkeys(["dw", "dx", "block_dw", "block_dx"], 1.0)}]
    (tmp_path / "rivals-fidelity.json").write_text(json.dumps({**record, "rows": rows}))
    capsys.readouterr()
    rivals_table.main(["table", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "| exact backpropagation | 1.000 | 1.000 | 1.000 | 1.000 |" in lines[2] and lines[2].endswith("| 1.00 |  |")
    assert lines[6].startswith("| gradient filtering, 2 x 2 | - | - |") and "19x faster" in lines[6]
    with pytest.raises(SystemExit):
        rivals_table.main(["fidelity"])
    assert "needs --model and --train-files" in capsys.readouterr().err
