"""Models for semantic segmentation, the mean IoU, and the example program that adapts them.

The grids expected here follow from the architectures: image size over patch size, or over the strides of the stages.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from processes import environment_of
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Dinov2Config,
    Dinov2Model,
    DPTConfig,
    DPTForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitDetConfig,
    ViTImageProcessor,
)

from lbp_peft import LBPWHTConfig, exact_backward, layout_report

pytest.importorskip("datasets", reason="the example needs datasets")
pytest.importorskip("evaluate", reason="the example needs evaluate")

from common.metrics import MeanIoU, confusion_matrix, load_metric, score
from common.models import head_modules, train_mode
from common.segmentation import Segmentation, SegmentationOptions

from lbp_peft.loading.options import Parser
from lbp_peft.loading.preprocessing import Preprocessor
from lbp_peft.loading.segmentation import label_map, upernet
from lbp_peft.loading.views import View

torch.set_num_threads(1)

CLASSES = 5
PROGRAM = Path(__file__).parents[2] / "examples" / "semantic_segmentation.py"
FLAT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip
VITDET = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip
PYRAMID = {
    "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
    "decoder_hidden_size": 16, "drop_path_rate": 0.0,
}  # fmt: skip
DPT = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16}
DEPTHS = [1, 2, 3, 4]


def under_upernet(backbone):
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_channels=16, pool_scales=[1, 2], num_labels=CLASSES
        )
    )


# name: (model, image, {part of a layer's name, which differs between versions of transformers: (grid, prefix tokens)});
# the last part that occurs counts
MODELS = {
    "segformer": (
        lambda: SegformerForSemanticSegmentation(SegformerConfig(**PYRAMID, num_labels=CLASSES)),
        (64, 96),
        {
            r"(stages|block)\.0\.": ((16, 24), 0), r"(stages|block)\.1\.": ((8, 12), 0),
            r"(stages|block)\.2\.": ((4, 6), 0), r"(stages|block)\.3\.": ((2, 3), 0),
            r"[kv]_proj|self\.(key|value)": ((2, 3), 0),
        },
    ),
    "upernet on dinov2": (
        lambda: under_upernet(Dinov2Config(**FLAT, out_indices=DEPTHS)),
        (64, 96),
        {"": ((8, 12), 1)},
    ),
    "upernet on beit": (
        lambda: under_upernet(BeitConfig(**FLAT, out_indices=DEPTHS, add_fpn=True, drop_path_rate=0.0)),
        (64, 64),
        {"": ((8, 8), 1)},
    ),
    "upernet on vitdet": (
        lambda: under_upernet(VitDetConfig(**VITDET, out_indices=DEPTHS)),
        (64, 64),
        {"": ((8, 8), 0)},
    ),
    "dpt": (
        lambda: DPTForSemanticSegmentation(DPTConfig(**FLAT, **DPT, num_labels=CLASSES)),
        (64, 64),
        {"": ((8, 8), 1)},
    ),
    "beit": (
        lambda: BeitForSemanticSegmentation(
            BeitConfig(**FLAT, out_indices=DEPTHS, drop_path_rate=0.0, pool_scales=[1, 2], num_labels=CLASSES)
        ),
        (64, 64),
        {"": ((8, 8), 1)},
    ),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


def build(name, seed=0):
    """Build a small random instance without dropout, so that outputs and gradients can be repeated."""
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch_for(name):
    height, width = MODELS[name][1]
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (2, height, width), generator=generator)
    labels[:, :7] = 255
    return {"pixel_values": torch.randn(2, 3, height, width, generator=generator), "labels": labels}


def heads_of(model):
    return head_modules(model, SegmentationOptions())


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_model
def test_the_default_adapts_the_encoder_on_its_true_grids(name):
    base, (_, _, expected) = build(name), MODELS[name]
    heads = heads_of(base)
    outside = [child for child, _ in base.named_children() if child not in ("backbone", base.base_model_prefix)]
    of_heads = {n for n in gradients(base.train(), batch_for(name)) if n.split(".")[0] in outside}
    model = get_peft_model(base, LBPWHTConfig(r=3, grad_input_rank=3, modules_to_save=heads)).train()
    trained = {parameter.removeprefix("base_model.model.") for parameter in gradients(model, batch_for(name))}
    layers = layout_report(model).layers
    assert layers
    for layer, ran in layers.items():
        assert layer.split(".")[0] not in outside
        matching = [grid for part, grid in expected.items() if re.search(part, layer)]
        assert (ran.layout.grid, ran.layout.num_prefix_tokens) == matching[-1], layer
    assert {n.replace("modules_to_save.default.", "") for n in trained if "lbpwht_" not in n} == of_heads


@each_model
def test_gradients_at_full_rank_are_those_of_exact_backpropagation(name):
    base = build(name)
    model = get_peft_model(base, LBPWHTConfig(r=64, grad_input_rank=64, modules_to_save=heads_of(base))).train()
    batch = batch_for(name)
    found = gradients(model, batch)
    with exact_backward(model):
        exact = gradients(model, batch)
    assert found.keys() == exact.keys() and len(exact) > 50
    error = sum((found[n] - e).square().sum() for n, e in exact.items()) / sum(e.square().sum() for e in exact.values())
    assert error.sqrt() < 1e-5


@each_model
@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "on LoRA"])
def test_a_trained_model_comes_back_with_its_batch_norms(name, stacked, tmp_path):
    base = build(name)
    heads = heads_of(base)
    if stacked:
        lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=heads)
        config = LBPWHTConfig(r=3, train_base_weight=False, stack_on=lora)
    else:
        config = LBPWHTConfig(r=3, modules_to_save=heads)
    model, batch = get_peft_model(base, config), batch_for(name)
    assert not any(head in layer for head in heads for layer in layout_report(model).layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train_mode(model)
    before = {buffer: value.clone() for buffer, value in model.named_buffers() if "running_mean" in buffer}
    for _ in range(2):
        gradients(model, batch)
        optimizer.step()
    moved = {buffer for buffer, value in before.items() if not torch.equal(model.get_buffer(buffer), value)}
    assert moved and all("modules_to_save" in buffer for buffer in moved)

    model.save_pretrained(tmp_path)
    fresh = build(name)
    for head in heads:  # agreement then shows that the heads came with the adapter
        fresh.get_submodule(head).apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch["pixel_values"]).logits, model.eval()(batch["pixel_values"]).logits)


def test_batch_norms_that_are_not_trained_keep_their_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].requires_grad_(False)
    train_mode(model)
    assert model.training and not model[0].training and model[1].training


def mean_iou_by_sets(pairs, classes, ignore):
    """Compute the mean IoU from sets of pixels, one class at a time."""
    ratios = []
    for k in range(classes):
        found, there = set(), set()
        for image, (prediction, label) in enumerate(pairs):
            pixels = [(image, *at) for at in np.ndindex(label.shape) if label[at] != ignore]
            found |= {p for p in pixels if prediction[p[1:]] == k}
            there |= {p for p in pixels if label[p[1:]] == k}
        if found | there:
            ratios.append(len(found & there) / len(found | there))
    return sum(ratios) / len(ratios)


def test_mean_iou_is_that_of_sets_of_pixels():
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for height, width in [(5, 9), (4, 4), (7, 3)]:
        label = torch.randint(0, 4, (height, width), generator=generator)  # of 6 classes, two of which never occur
        prediction = torch.where(torch.rand(height, width, generator=generator) < 0.6, label, 0)
        pairs.append((prediction, label.masked_fill(torch.rand(height, width, generator=generator) < 0.2, 255)))
    metric = MeanIoU(keep_in_memory=True)
    for prediction, label in pairs:
        metric.add(confusion=confusion_matrix(prediction, label, 6, 255).numpy())
    expected = mean_iou_by_sets(pairs, 6, 255)
    assert 0.2 < expected < 0.9
    assert metric.compute()["mean_iou"] == pytest.approx(expected, rel=1e-12)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match="labels from 0 to 6"):
        confusion_matrix(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[0, 6], [255, 1]]), 6, 255)


PIXEL_ACCURACY = """
import datasets
import evaluate
import numpy as np

class PixelAccuracy(evaluate.Metric):
    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(
            {"predictions": maps, "references": maps}))

    def _compute(self, predictions, references, ignore_index):
        right = [np.equal(p, r)[np.not_equal(r, ignore_index)] for p, r in zip(predictions, references)]
        return {"pixel_accuracy": float(np.concatenate(right).mean())}
"""


def test_predictions_are_compared_at_the_size_of_each_label_map(tmp_path):
    """This is so with the built-in metric, which receives counts, and with one from a folder, which receives maps."""
    (tmp_path / "pixel_accuracy.py").write_text(PIXEL_ACCURACY)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, generator=generator)
    labels = [torch.randint(0, 3, size, generator=generator) for size in [(8, 12), (9, 7)]]
    labels[0][:3] = 255
    task, right, counted, pairs = Segmentation(), 0, 0, []
    for own, label in zip(logits, labels, strict=True):
        prediction = nn.functional.interpolate(own[None], size=label.shape, mode="bilinear")[0].argmax(0)
        pairs.append((prediction, label))
        right += ((prediction == label) & (label != 255)).sum().item()
        counted += (label != 255).sum().item()

    def found(**settings):
        options = SegmentationOptions(**settings)
        metric = load_metric(task.metric, options)
        task.add_batch(metric, Accelerator(cpu=True), logits, labels, options)
        return score(metric, options)

    assert found() == pytest.approx(mean_iou_by_sets(pairs, 3, 255), rel=1e-12)
    folder = {"metric": str(tmp_path / "pixel_accuracy.py"), "metric_options": ["ignore_index=255"]}
    assert found(**folder) == pytest.approx(right / counted, rel=1e-12)


def test_label_maps_of_every_kind():
    options = SegmentationOptions()
    values = np.array([[0, 1, 255], [3, 2, 0]], dtype=np.uint8)
    palette = Image.fromarray(values, mode="L").convert("P")
    palette.putdata(values.flatten().tolist())
    for mask in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16))):
        assert np.array_equal(np.array(label_map(mask, options)), values)
    reduced = label_map(Image.fromarray(values), SegmentationOptions(reduce_labels=True))
    assert np.array_equal(np.array(reduced), [[255, 0, 255], [2, 1, 255]])
    with pytest.raises(ValueError, match="one channel"):
        label_map(Image.new("RGB", (3, 2)), options)


@pytest.mark.parametrize("mirrored", [False, True])
def test_image_and_label_map_show_the_same_view(mirrored, tmp_path):
    """The image is a painting of the map, so both must show the same, except for the blur at the borders of classes."""
    ViTImageProcessor(size={"shortest_edge": 40}, image_mean=[0] * 3, image_std=[1] * 3).save_pretrained(tmp_path)
    values = np.zeros((60, 90), dtype=np.uint8)
    values[10:40, 20:60], values[30:55, 50:85] = 100, 200
    image = Image.fromarray(values)
    options = SegmentationOptions(model=str(tmp_path), image_size=[48, 96])
    preprocessor = Preprocessor(options, SegformerConfig(), whole_image=True)
    assert preprocessor.size == (48, 96)
    for view in (None, View((7.3, 4.1, 88.2, 57.0), mirrored)):
        pixels = preprocessor(image, view)[0] * 255
        assert pixels.shape == (48, 96)
        label = Segmentation().label(image, view or View((0, 0, 90, 60)), preprocessor.size, options)
        assert ((pixels - label).abs() < 30).float().mean() > 0.95
        assert ((pixels - label.flip(1)).abs() < 30).float().mean() < 0.9
    assert Segmentation().label(image, None, preprocessor.size, options).shape == (60, 90)  # tested as it was stored


def test_upernet_is_put_on_a_pretrained_backbone(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(**FLAT | {"num_hidden_layers": 8})
    backbone = Dinov2Model(config)
    backbone.save_pretrained(tmp_path)
    model = upernet(str(tmp_path), ["a", "b", "c"], seed=0)
    assert model.config.backbone_config.out_indices == [2, 4, 6, 8] and model.config.id2label[2] == "c"
    loaded, saved = model.backbone.state_dict(), backbone.state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded) and len(loaded) > 50
    assert model.eval()(torch.randn(1, 3, 16, 32)).logits.shape == (1, 3, 16, 32)
    assert model.decode_head.classifier.in_channels == 512
    narrow = upernet(str(tmp_path), ["a", "b", "c"], seed=0, channels=24)
    assert narrow.decode_head.classifier.in_channels == 24 and narrow.auxiliary_head.classifier.in_channels == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--head_channels", "64"], "needs --head"), (["--head", "upernet", "--head_channels", "1"], "at least 2")],
)
def test_channels_of_a_head_are_checked(flags, message):
    options = Parser(SegmentationOptions).options(flags)
    with pytest.raises(ValueError, match=message):
        options.check_together()


def test_the_program_with_a_model_and_a_folder_of_its_own(tmp_path):
    """The folder has wide images of unequal sizes, masks beside them, and pixels of no class."""
    pytest.importorskip("sklearn", reason="the scenes need scikit-learn")
    from common.scenes import EMBEDDED, scenes

    EMBEDDED.model().base_model.save_pretrained(tmp_path / "model")
    EMBEDDED.processor.save_pretrained(tmp_path / "model")
    source = scenes([5, 6], train=6, test=4)
    for split, part in {"train": source.train, "test": source.test}.items():
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        lines = ["file_name,mask_file_name"]
        for index, row in enumerate(part):
            width = 128 + 8 * index
            row["image"].resize((width, 64)).save(folder / f"{index}.png")
            mask = np.array(row["label"].resize((width, 64), Image.Resampling.NEAREST))
            mask[:4] = 255
            Image.fromarray(mask).save(folder / f"{index}_mask.png")
            lines.append(f"{index}.png,{index}_mask.png")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "out"
    command = [
        sys.executable, str(PROGRAM), "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data"),
        "--methods", "full", "lbp-wht", "--epochs", "2", "--batch_size", "3", "--timing_rounds", "1",
        "--learning_rate", "1e-3", "--output", str(output),
    ]  # fmt: skip
    here = {
        **environment_of(PROGRAM.parent.parent), "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "64 x 128 pixels, head: decode_head" in done.stdout and "4 test images of 3 classes" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert results["metric"] == "mean IoU" and len(results["results"]) == 2
    assert all(0 <= epoch["score"] <= 1 for row in results["results"] for epoch in row["histories"][0])
    table = (output / "table.txt").read_text()
    assert table.strip() in done.stdout and "mean IoU" in table
    assert (output / "plot.png").stat().st_size > 10_000 and (output / "predictions.png").stat().st_size > 10_000
    assert (output / "lbp-wht" / "seed-0" / "adapter" / "adapter_model.safetensors").exists()
