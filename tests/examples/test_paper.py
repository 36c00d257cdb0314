"""The paper's experiments, offline: small stand-ins in the formats of the models and the data sets."""

import copy
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from models import vit_config
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTForImageClassification,
)

pytest.importorskip("datasets", reason="the experiments need datasets")
pytest.importorskip("evaluate", reason="the experiments need evaluate")

import datasets
from common import training
from paper import costs, pretrain, report, run
from paper.counting import LinearBackward, mean_counts, paper_flops
from paper.data import ImageData, keep_classes, load_source
from paper.features import features_of, without_frozen_part
from paper.methods import METHODS
from paper.models import BACKBONES, DERIVED_BUFFERS, AdaptedPart, Backbone, adapted_part, load_timm
from paper.pareto import Point, front
from paper.pretrain import SmallImageCollator, SmallImages
from paper.recipe import RECIPES, TABLES, recipe
from paper.search import Setting, Trial, best, next_setting

from lbp_peft.loading.datasources import Source
from lbp_peft.loading.options import as_size
from lbp_peft.loading.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from lbp_peft.ops.plan import ExactProduct
from lbp_peft.tuner.layers.linear import LBPWHTLinear

ROOT = Path(__file__).parents[2]


def image(shade, size=32):
    noise = np.random.default_rng(shade).integers(0, 40, (size, size, 3))
    return Image.fromarray((noise + shade).astype(np.uint8))


def parquet(path, count):
    """Write two classes, dark and light images, in the format of the hub's data sets."""
    labels = [index % 2 for index in range(count)]
    rows = {"image": [image(200 * label + index % 10) for index, label in enumerate(labels)], "label": labels}
    return table(path, rows, {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})


def table(path, rows, kinds):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(str(path))
    return str(path)


@pytest.fixture
def experiment(tmp_path):
    """Run the program on a tiny ViT and tiny images; return the folder of its records."""
    torch.manual_seed(0)
    ViTForImageClassification(vit_config()).save_pretrained(tmp_path / "vit")
    train = parquet(tmp_path / "train.parquet", 40)
    test = parquet(tmp_path / "test.parquet", 8)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("epochs: 1\nbatch_size: 8\nlearning_rate: 1.0e-3\nwarmup_steps: 0\nmin_crop: 1.0\n")

    def program(*arguments, output="records"):
        given = ["--model", str(tmp_path / "vit"), "--stage", r"layers\.1\.", "--dataset", str(recipe)]
        given += ["--train_files", train, "--test_files", test, "--train_images", "16", "--validation_images", "8"]
        run.main([*given, "--output", str(tmp_path / output), "--name", "tiny", *arguments])
        return tmp_path / output / "classification" / "tiny"

    return program


def test_runs_are_searched_recorded_and_resumed(experiment, tmp_path, capsys):
    methods = ["--methods", "full", "lora", "side-tuning", "--only-missing"]
    folder = experiment(*methods, "--trials", "1", "--seeds", "0", "1")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    assert len(files) == 3 * (1 + 2) and "full/trial-lr=0.001-rank=0.json" in files
    record = json.loads((folder / "lora" / "seed-1.json").read_text())
    assert record["config"]["learning_rate"] == 0.01 and record["config"]["scored"] == "test"
    assert record["environment"]["torch"] == torch.__version__ and len(record["curve"]) == 1
    assert 0 <= record["score"] <= 1 and record["backward_multiply_adds"] > 0 and record["paper_flops"] > 0

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    (folder / "full" / "seed-0.json").unlink()
    experiment(*methods, "--trials", "1", "--seeds", "0", "1")
    written = [path for path in times if path.stat().st_mtime_ns != times[path]]
    assert [path.name for path in written] == ["seed-0.json"] and written[0].parent.name == "full"
    with pytest.raises(SystemExit, match="--only-missing"):
        experiment("--methods", "full", "--seeds", "0")
    with pytest.raises(SystemExit, match="other options .*epochs"):
        experiment(*methods, "--epochs", "2", "--trials", "1")

    capsys.readouterr()
    measured = {"full": {"step_ms": [9, 10, 11], "peak_mib": 300}, "checkpointing": {"step_ms": [12, 13, 14]}}
    (folder / "costs.json").write_text(json.dumps({"methods": measured}))
    (tmp_path / "paper.md").write_text("before\n<!-- tiny -->\nold\n<!-- end -->\nafter\n")
    report.main(["--records", str(tmp_path / "records"), "--docs", str(tmp_path)])
    page = (tmp_path / "paper.md").read_text()
    assert "old" not in page and page.endswith("<!-- end -->\nafter\n")
    line = next(line for line in page.splitlines() if line.startswith("| exact backpropagation |"))
    assert line.split("|")[4:6] == [" 1 ", " 2 "] and line.endswith("| 10 | 1.00 | 300 |")
    # It computes the same gradients, so it was not trained: it has the scores, and only its own cost.
    same = next(line for line in page.splitlines() if line.startswith("| exact backpropagation, checkpointing |"))
    assert same.split("|")[2:9] == line.split("|")[2:9] and same.endswith("|  |  | 13 | 1.30 |  |")
    assert (tmp_path / "images" / "paper-tiny.png").stat().st_size > 10_000


def test_cost_of_steps(experiment, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(costs, "peak_in_a_process", lambda *given: asked.append(given) or {"peak_mib": 7})
    folder = experiment("--methods", "full", "lora", "--cost-rounds", "2")
    found = json.loads((folder / "costs.json").read_text())["methods"]
    own = found["full"]
    assert own["step_ms"][0] <= own["step_ms"][2] and own["over_first"] == [1, 1, 1] and own["peak_mib"] == 7
    (given, name), _ = asked
    assert name == "full" and "--model" in given and not {"--methods", "lora", "--cost-rounds", "2"} & set(given)
    capsys.readouterr()
    autocast, original = [], costs.loss_of_output

    def noting(*given):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return original(*given)

    monkeypatch.setattr(costs, "loss_of_output", noting)
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = experiment("--methods", "full", "--cost-rounds", "1", "--mixed_precision", "bf16")
    assert json.loads((folder / "costs.json").read_text())["mixed_precision"] == "bf16"
    assert autocast and all(autocast)
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    experiment("--methods", "full", "--peak")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak_mib"] > 50


def test_segmentation_of_folders_of_images_and_maps(tmp_path):
    config = SegformerConfig(
        num_labels=2, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    for split, count in (("train", 8), ("val", 2)):
        for part in ("images", "masks"):
            (tmp_path / "data" / split / part).mkdir(parents=True)
        for index in range(count):
            image(20 * index, 64).save(tmp_path / "data" / split / "images" / f"{index}.png")
            mask = np.zeros((64, 64), dtype=np.uint8)
            mask[:, 32:] = 1
            mask[0] = 255  # of no class
            Image.fromarray(mask).save(tmp_path / "data" / split / "masks" / f"{index}.png")
    given = ["--table", "segmentation", "--model", "segformer_mit_b0", "--weights", str(tmp_path / "segformer")]
    given += ["--dataset", "cityscapes", "--methods", "lp_l1-2", "--seeds", "0", "--output", str(tmp_path / "records")]
    small = {
        "data": tmp_path / "data",
        "boundary": "orthogonal",
        "image_size": 64,
        "epochs": 1,
        "batch_size": 2,
        "validation_images": 2,
    }
    run.main([*given, *(f"--{name}={value}" for name, value in small.items()), "--class_names", "left", "right"])
    (file,) = (tmp_path / "records").rglob("seed-0.json")
    record = json.loads(file.read_text())
    assert record["metric"] == "mean IoU" and 0 < record["score"] <= 1
    assert file.parts[-3:-1] == ("segformer_mit_b0-partial-cityscapes", "lp_l1-2")


# The data sets that the recipes name, small: the same files, columns, splits, classes and kinds of images

# The folder of the Parquet files on the hub (None: folders of classes), the column of images, the others with their
# number of classes, the splits besides train, and the modes and formats of the images.
FORMATS = {
    "uoft-cs/cifar10": ("plain_text", "img", {"label": 10}, ["test"], [("RGB", "PNG")]),
    "uoft-cs/cifar100": ("cifar100", "img", {"fine_label": 100, "coarse_label": 20}, ["test"], [("RGB", "PNG")]),
    "tanganke/stanford_cars": ("data", "image", {"label": 196}, ["test", "contrast"], [("RGB", "JPEG"), ("L", "JPEG")]),
    "nelorth/oxford-flowers": ("data", "image", {"label": 102}, ["test"], [("RGB", "JPEG")]),
    "ethz/food101": ("data", "image", {"label": 101}, ["validation"], [("RGB", "JPEG")]),
    "timm/oxford-iiit-pet": (
        "data", "image", {"label": 37, "image_id": None, "label_cat_dog": 2}, ["test"], [("RGB", "JPEG"), ("P", "GIF")],
    ),
    "data/scenes": (None, "image", {"label": 6}, ["test"], [("RGB", "JPEG")]),
}  # fmt: skip
# The data set of a recipe, its column of classes and which of them it keeps, how many images are written to train and
# test on, and how many the recipe then trains, validates and tests on.
CLASSIFICATION = {
    "cars": ("tanganke/stanford_cars", "label", range(196), (1300, 50), (300, 1000, 50)),
    "cifar10": ("uoft-cs/cifar10", "label", range(10), (1300, 50), (300, 1000, 50)),
    "cifar100": ("uoft-cs/cifar100", "fine_label", range(100), (1300, 50), (300, 1000, 50)),
    "cifar100-1000": ("uoft-cs/cifar100", "fine_label", range(100), (1600, 2100), (1000, 500, 2000)),
    "cifar100-5000": ("uoft-cs/cifar100", "fine_label", range(100), (1700, 200), (700, 1000, 200)),
    "cifar100-first-half": ("uoft-cs/cifar100", "fine_label", range(50), (400, 200), (200, 0, 100)),
    "cifar100-second-half": ("uoft-cs/cifar100", "fine_label", range(50, 100), (2400, 200), (700, 500, 100)),
    "flowers102": ("nelorth/oxford-flowers", "label", range(102), (1300, 50), (300, 1000, 50)),
    "food101": ("ethz/food101", "label", range(101), (1300, 50), (300, 1000, 50)),
    "pets": ("timm/oxford-iiit-pet", "label", range(37), (1300, 50), (300, 1000, 50)),
    "scenes": ("data/scenes", "label", range(6), (540, 60), (40, 500, 60)),
}
# The folder of a recipe (None: Parquet files), its split for testing, the number of classes and that of some of them,
# the mark of no class, the format of the images, the mode of the maps, and how many images the recipe validates on.
SEGMENTATION = {
    "camvid": ("data/camvid", "test", 11, {"sky": 0, "car": 8, "cyclist": 10}, 11, "PNG", "L", 60),
    "camvid-small": (None, "test", 11, {"sky": 0, "car": 8, "cyclist": 10}, 11, "PNG", "L", 60),
    "cityscapes": ("data/cityscapes", "val", 19, {"road": 0, "car": 13, "bicycle": 18}, 255, "PNG", "L", 100),
    "voc12": ("data/voc12", "val", 21, {"background": 0, "car": 7, "tvmonitor": 20}, 255, "JPEG", "P", 100),
}


def grey(shade, mode="RGB"):
    return Image.new("L", (12, 10), shade).convert(mode)


def map_of(index, classes, ignored):
    """A map of every class and of pixels of none, which begins with another class for each index up to their number."""
    numbers = (index + np.arange(120).reshape(10, 12)) % (classes + 1)
    return np.where(numbers == classes, ignored, numbers).astype(np.uint8)


def stored(picture, form):
    """The bytes of an image. JPEG keeps the mean of each block, and so an image of one shade."""
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def shades(batch):
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (255 * (batch["pixel_values"] * std + mean)).mean((1, 2, 3)).round().int().tolist()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the images of a recipe as the program does, in a folder where its data set is, and a batch of each part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def program(kind, name, *flags):
        flags = ["--model", str(tmp_path), "--batch_size", "4", "--eval_batch_size", "3", *flags]
        options, task = recipe(kind, name, flags), TABLES[kind]()
        source = load_source(task, options)
        data = ImageData(ViTForImageClassification(vit_config()), task, source, options)
        loaders = [*data.loaders(0, "validation"), data.loaders(0, "test")[1]]
        batches = [batch for part in loaders for batch in itertools.islice(part, 1)]
        for batch, count in zip(batches, (4, 3, 3), strict=False):  # there may be no images to validate on
            assert batch["pixel_values"].shape == (count, 3, *as_size(options.image_size))
            assert batch["pixel_values"].dtype == torch.float32
        return options, source, batches

    return program


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_images_and_classes_of_a_recipe(name, load):
    dataset, label, kept, written, expected = CLASSIFICATION[name]
    folder, column, others, splits, forms = FORMATS[dataset]
    for split, count in zip(("train", *splits), (*written, 7), strict=False):
        numbers = [index % others[label] for index in range(count)]  # which are the shades, too
        pairs = zip(sorted(set(numbers)), itertools.cycle(forms), strict=False)
        images = {number: stored(grey(number, mode), form) for number, (mode, form) in pairs}
        rows, kinds = {column: [{"bytes": images[number]} for number in numbers]}, {column: datasets.Image()}
        for other, classes in others.items():
            rows[other] = [number % classes if classes else str(number) for number in numbers]
            names = [f"{other} {number}" for number in range(classes or 0)]
            kinds[other] = datasets.ClassLabel(names=names) if names else datasets.Value("string")
        if folder:
            table(Path(dataset, folder, f"{split}-00000-of-00001.parquet"), rows, kinds)
        else:
            for index, number in enumerate(numbers):
                write(Path(dataset, split, f"label {number}", f"{index}.jpg"), images[number])
    _, source, batches = load("classification", name)
    assert source.names == [f"{label} {number}" for number in kept]
    assert (len(source.train), len(source.validation), len(source.test)) == expected
    assert len(batches) == np.count_nonzero(expected)
    for batch in batches:
        assert batch["labels"].dtype == torch.int64 and [kept[place] for place in batch["labels"]] == shades(batch)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_images_and_label_maps_of_a_recipe(name, load):
    place, test, classes, some, ignored, form, mode, validation = SEGMENTATION[name]
    for split, count in (("train", validation + 5), (test, 4)):
        images = [stored(grey(index), form) for index in range(count)]
        maps = [Image.fromarray(map_of(index, classes, ignored)) for index in range(count)]
        if mode == "P":
            for one in maps:
                one.putpalette([*range(255, -1, -1)] * 3)  # colours that are not the numbers
        columns = {"image": images, "label": [stored(one, "PNG") for one in maps]}
        if place is None:
            rows = {column: [{"bytes": data} for data in files] for column, files in columns.items()}
            table(f"{split}.parquet", rows, dict.fromkeys(rows, datasets.Image()))
        else:
            for index in range(count):  # in a folder for each city, as Cityscapes has them
                write(Path(place, split, "images", "city", f"{index}.{form.lower()}"), images[index])
                write(Path(place, split, "masks", "city", f"{index}.png"), columns["label"][index])
    flags = [] if place else ["--train_files", "train.parquet", "--test_files", "test.parquet"]
    options, source, (trained, *scored) = load("segmentation", name, *flags)
    assert len(source.names) == classes and {name: source.names.index(name) for name in some} == some
    assert (len(source.train), len(source.validation), len(source.test)) == (5, validation, 4)
    assert trained["labels"].shape == (4, *as_size(options.image_size)) and trained["labels"].dtype == torch.int64
    assert set(trained["labels"].unique().tolist()) == {*range(classes), options.ignore_index}
    for batch in scored:
        for index, label in zip(shades(batch), batch["labels"], strict=True):
            assert label.dtype == torch.int64 and label.tolist() == map_of(index, classes, ignored).tolist()


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_can_be_read(file):
    kind = "segmentation" if file.stem in SEGMENTATION else "classification"
    assert file.stem in SEGMENTATION | CLASSIFICATION  # each recipe is tested on images
    options = recipe(kind, file.stem, [])
    assert options.scheduler == "cosine" and options.dataset
    assert options.weight_decay == (0.05 if file.stem == "cifar100-first-half" else 1e-5)
    not_of_the_paper = ("cifar100-1000", "cifar100-5000", "cifar100-first-half", "cifar100-second-half", "scenes")
    if kind == "classification" and file.stem not in not_of_the_paper:
        rate = {"flowers102": 2e-4, "food101": 2e-4, "cars": 5e-4}.get(file.stem, 1e-4)
        clipped = None if file.stem == "cifar100" else 5.0
        assert (options.learning_rate, options.max_grad_norm) == (rate, clipped)
        assert (options.epochs, options.batch_size, options.warmup_steps, options.image_size) == (50, 64, 1000, [224])


def test_files_of_the_user_take_the_place_of_the_recipes_data(tmp_path):
    with pytest.raises(SystemExit, match="unknown flag"):
        recipe("classification", "cifar100", ["--epoch", "1"])
    options = recipe("classification", "cifar100", ["--train_files", "a.parquet", "--epochs", "3"])
    assert (options.dataset, options.label_column, options.epochs) == (None, None, 3)


def test_search_goes_beyond_the_best_end_then_tries_ranks():
    def score(setting):  # the best rate is 3e-3, and rank 16 is better
        return -abs(np.log(setting.learning_rate / 3e-3)) + 0.01 * (setting.rank == 16)

    trials = []
    for _ in range(6):
        setting = next_setting(trials, 3e-4, (8, 16))
        trials.append(Trial(setting, score(setting)))
    settings = [(trial.setting.learning_rate, trial.setting.rank) for trial in trials]
    assert settings[:5] == [(3e-4, 8), (9e-4, 8), (2.7e-3, 8), (8.1e-3, 8), (2.7e-3, 16)]
    assert settings[5] == (1.6e-3, 8) and best(trials) == Setting(2.7e-3, 16)
    falling = [Trial(Setting(1e-3), 1.0), Trial(Setting(3e-3), 0.5)]
    assert next_setting(falling, 1e-3, ()) == Setting(3.3e-4)


def test_the_front_leaves_out_what_is_beaten():
    points = [Point("a", 2, 5, 0), Point("b", 1, 3, 0), Point("c", 3, 4, 0), Point("d", 2, 4, 0)]
    assert [point.label for point in front(points)] == ["b", "a"]


# The paper's way of counting


def test_flops_of_one_layer_by_hand():
    """The layer is fc1 of EfficientFormer-L1's last stage, 448 -> 1792 on 7 x 7 patches."""
    product = 448 * 1792
    assert LinearBackward(49, 448, 1792).flops == 2 * 2 * 49 * product
    low_rank = LinearBackward(49, 448, 1792, grad_weight_rows=3, grad_input_rows=3)
    assert low_rank.multiply_adds == 2 * 3 * product
    assert low_rank.additions == 49 * 3 * (448 + 1792 + 448)  # x and g projected, dx lifted
    only_weight = LinearBackward(49, 448, 1792, grad_weight_rows=3)
    assert only_weight.flops == 2 * (3 + 49) * product + 49 * 3 * (448 + 1792)
    lora = LinearBackward(49, 448, 1792, weight=False, lora_rank=8)
    assert lora.multiply_adds == 49 * product + 2 * 49 * 8 * (448 + 1792)


def test_flops_are_counted_on_the_model():
    model = ViTForImageClassification(vit_config())
    part = adapted_part(model, r"layers\.1\.")
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    attention, mlp = 32 * 32, 32 * 64
    products = 65 * (4 * attention + 2 * mlp)  # for each gradient
    of_input = (
        products - 3 * 65 * attention
    )  # nothing before query, key and value of the first adapted block is trained
    assert paper_flops(METHODS["full"].build(model, part, None).train(), part, batch) == 2 * (products + of_input)

    model = METHODS["lp_l1-2"].build(ViTForImageClassification(vit_config()), part, None).train()
    kept = 4  # 3 bases and [CLS]
    of_products = 2 * kept * (products + of_input) // 65
    channels = 3 * (32 + 32) + (32 + 32 + 32) + (32 + 64 + 32) + (64 + 32 + 64)
    assert paper_flops(model, part, batch) == of_products + 65 * kept * channels


def test_flops_of_efficientformers_last_stage():
    """INSTANT (ICLR 2026) gives 1484 MFLOPs for exact backpropagation, the input gradient of the first layer included.

    That is needed only if the convolution before it is trained too.
    """
    pytest.importorskip("timm", reason="timm is not installed")
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    config = TimmWrapperConfig(architecture="efficientformer_l1", num_labels=10)
    model = AutoModelForImageClassification.from_config(config)
    part = adapted_part(model, r"stages\.3\.")
    batch = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 1])}
    model = METHODS["full"].build(model, part, None).train()
    assert round(paper_flops(model, part, batch) / 1e6) == 1405
    model.timm_model.stages[3].downsample.conv.weight.requires_grad = True
    assert round(paper_flops(model, part, batch) / 1e6) == 1484


def test_weights_of_timm_in_a_file(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from safetensors.torch import save_file

    stored = timm.create_model("tf_efficientnet_lite0", num_classes=3).state_dict()
    save_file(stored, tmp_path / "lite0.safetensors")
    model = load_timm("tf_efficientnet_lite0", str(tmp_path / "lite0.safetensors"), ["a", "b"], seed=0)
    torch.testing.assert_close(model.timm_model.conv_stem.weight, stored["conv_stem.weight"])
    assert model.timm_model.classifier.weight.shape[0] == 2
    part = adapted_part(model, BACKBONES["tf_efficientnet_lite0"].stages["partial"])
    assert len(part.targets) == 10 and part.heads == ["timm_model.classifier"]
    features = features_of(model, BACKBONES["tf_efficientnet_lite0"], {"pixel_values": torch.randn(2, 3, 64, 64)})
    with torch.no_grad():
        whole = model(torch.zeros(2, 3, 64, 64)).logits
    assert features.shape == (2, 112, 4, 4) and whole.shape == (2, 2)
    save_file({name: value for name, value in stored.items() if "blocks.0" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(SystemExit, match="has no values for blocks.0"):
        load_timm("tf_efficientnet_lite0", str(tmp_path / "part.safetensors"), ["a", "b"], seed=0)


def test_an_efficientformer_takes_smaller_images_with_a_part_of_its_attention_biases():
    pytest.importorskip("timm", reason="timm is not installed")
    model = load_timm("efficientformer_l1", None, ["a", "b"], seed=0, size=(96, 64)).eval()
    (attention,) = (module for module in model.modules() if hasattr(module, "attention_bias_idxs"))
    with torch.no_grad():
        attention.attention_biases.copy_(torch.arange(49.0).expand(8, 49))
        biases = attention.get_attention_biases(torch.device("cpu"))
        assert model(torch.zeros(1, 3, 96, 64)).logits.shape == (1, 2)
    # Two columns: the token at row 2, column 1 and the one at row 0, column 0 are 2 rows and 1 column apart.
    assert biases.shape == (8, 6, 6) and biases[0, 5, 0] == 2 * 7 + 1
    with pytest.raises(SystemExit, match="at most 224 pixels, not 256"):
        load_timm("efficientformer_l1", None, ["a", "b"], seed=0, size=(256, 256))


# Pre-training


def test_keep_classes_numbers_the_kept_classes_from_zero():
    def rows(labels):
        kinds = {"label": datasets.ClassLabel(names=["a", "b", "c", "d"]), "row": datasets.Value("int64")}
        columns = {"label": labels, "row": list(range(len(labels)))}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    source = keep_classes(Source(rows([0, 2, 3, 1, 2]), rows([3, 0]), ["a", "b", "c", "d"]), 2, 3)
    assert source.names == ["c", "d"] and source.validation is None
    assert list(source.train["label"]) == [0, 1, 0] and list(source.train["row"]) == [1, 2, 4]
    assert list(source.test["label"]) == [1] and list(source.test["row"]) == [0]
    with pytest.raises(SystemExit, match="there are 2 classes, 0 to 1"):
        keep_classes(source, 0, 2)
    with pytest.raises(SystemExit, match="the first and the last of several classes"):
        recipe("classification", "cifar100", ["--classes", "5"])
    with pytest.raises(SystemExit, match="--classes"):
        recipe("segmentation", "camvid", ["--classes", "0", "5"])
    with pytest.raises(SystemExit, match="there is no image of these"):
        keep_classes(Source(rows([0, 1]), None, ["a", "b", "c", "d"]), 2, 3)


def test_small_images_are_mirrored_and_shifted_in_training_only():
    def rows():
        return datasets.Dataset.from_dict(
            {"image": [image(60), image(120)], "label": [0, 1]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )

    plain, train = SmallImages(rows(), train=False), SmallImages(rows(), train=True, seed=3)
    whole = torch.from_numpy(np.array(image(60))).permute(2, 0, 1)
    assert torch.equal(plain[0]["pixel_values"], whole)
    views = []
    for train.epoch in range(20):
        assert torch.equal(train[0]["pixel_values"], train[0]["pixel_values"])
        views.append(train[0]["pixel_values"])
    assert all(view.shape == whole.shape and view.dtype == torch.uint8 for view in views)
    padded = torch.nn.functional.pad(whole[None].float(), (4,) * 4, mode="reflect")[0].byte()
    windows = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    plain_at = [[torch.equal(view, window) for window in windows] for view in views]
    mirrored_at = [[torch.equal(view, window.flip(-1)) for window in windows] for view in views]
    assert all(any(at) or any(mirrored) for at, mirrored in zip(plain_at, mirrored_at, strict=True))
    assert 5 <= sum(map(any, plain_at)) <= 15
    assert len({at.index(True) for at in plain_at if any(at)}) > 4
    with pytest.raises(SystemExit, match="images of one size"):
        mixed = {"image": [image(60), image(60, 16)], "label": [0, 1]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        SmallImages(datasets.Dataset.from_dict(mixed, features=features), train=False)
    batch = SmallImageCollator({"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 8, 8)}, (64, 64))(
        [plain[0], plain[1]]
    )
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["labels"].tolist() == [0, 1]
    shades = batch["pixel_values"].mean((2, 3)) * 0.25 + 0.5
    torch.testing.assert_close(shades, plain.pixels.float().mean((2, 3)) / 255, atol=0.01, rtol=0)


def test_pretraining_writes_weights_that_a_run_adapts(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    train, test = parquet(tmp_path / "train.parquet", 8), parquet(tmp_path / "test.parquet", 4)
    (tmp_path / "tiny.yaml").write_text(
        "batch_size: 4\nepochs: 2\nvalidation_images: 2\nimage_size: [64]\nmin_crop: 1.0\nseeds: [0]\n"
    )
    files = ["--dataset", str(tmp_path / "tiny.yaml"), "--train_files", train, "--test_files", test]
    flags = ["--model", "efficientformer_l1", *files, "--learning_rate", "1e-3"]
    pretrain.main([*flags, "--output", str(tmp_path / "whole")])
    file = tmp_path / "whole" / "efficientformer_l1.safetensors"
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["config"]["image_size"] == [64] and len(record["losses"]) == 2
    stored = load_file(file)
    assert not any(name.endswith(DERIVED_BUFFERS) for name in stored)
    drawn = load_timm("efficientformer_l1", None, ["dark", "light"], seed=0, size=(64, 64)).timm_model.state_dict()
    for name in ("stages.3.blocks.0.mlp.fc1.weight", "stem.norm1.running_mean", "head.weight"):
        assert not torch.equal(stored[name], drawn[name])

    # A run that stops after its first epoch goes on to the same weights.
    def stop(*given):
        raise KeyboardInterrupt

    again = [*flags, "--output", str(tmp_path / "again"), "--checkpoint_every", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        original = training.Progress.next_epoch
        patch.setattr(training.Progress, "next_epoch", lambda *given: (original(*given), stop()))
        pretrain.main(again)
    assert list((tmp_path / "again" / "efficientformer_l1").glob("checkpoint-*"))
    with pytest.raises(SystemExit, match="it ran with another weight_decay"):
        pretrain.main([*again, "--resume", "--weight_decay", "0.3"])
    pretrain.main([*again, "--resume"])
    resumed = load_file(tmp_path / "again" / file.name)
    assert stored.keys() == resumed.keys() and all(torch.equal(stored[name], resumed[name]) for name in stored)
    assert not list((tmp_path / "again" / "efficientformer_l1").glob("checkpoint-*"))

    adapt = ["--weights", str(file), "--output", str(tmp_path / "records"), "--methods", "lp_l1-2"]
    run.main(["--model", "efficientformer_l1", *files, *adapt, "--cache", str(tmp_path / "features")])
    (of_run,) = (tmp_path / "records").rglob("seed-0.json")
    assert 0 <= json.loads(of_run.read_text())["score"] <= 1
    with pytest.raises(SystemExit, match="give one seed, not 2"):
        pretrain.main([*flags, "--seeds", "0", "1"])


# Features of the frozen part


@pytest.mark.parametrize(
    "name", ["full", "lbp-wht", "lp_l1-4-late-exact", "lp_l1-6-4-2", "lp_l1-2+norms", "full+norms"]
)
def test_the_head_has_a_learning_rate_of_its_own_and_scores_do_not_depend_on_the_processor(name):
    model = ViTForImageClassification(vit_config())
    part = adapted_part(model, r"layers\.1\.")
    method = METHODS[name].build(model, part, next(iter(METHODS[name].ranks), None))
    run = training.Run("", Path(), 1, 1e-4, heads=part.heads, head_learning_rate=1e-2)
    body, head = training.parameter_groups(method, run)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    assert "lr" not in body and head["lr"] == 1e-2
    assert all("classifier" in names[id(parameter)] for parameter in head["params"])
    assert not any("classifier" in names[id(parameter)] for parameter in body["params"])
    assert any("layernorm" in names[id(parameter)] for parameter in body["params"]) == ("norms" in name)
    configs = getattr(method, "peft_config", {})
    assert all(config.grad_input_dtype == "full" for config in configs.values())
    if "late" in name:
        layers = [layer for layer in method.modules() if isinstance(layer, LBPWHTLinear)]
        exact = [isinstance(layer.lbpwht_rule["default"].input_gradient, ExactProduct) for layer in layers]
        assert exact == [False] * 3 + [True] * 3
    if name == "lp_l1-6-4-2":
        ranks = [config.rank_pattern[re.escape(name)] for config in configs.values() for name in part.targets]
        assert ranks == [21, 21, 10, 10, 3, 3]
        assert all(config.grad_input_rank_pattern == config.rank_pattern for config in configs.values())


def test_the_computation_of_a_run_with_a_warm_up_is_the_mean_over_its_steps():
    model = ViTForImageClassification(vit_config())
    part = adapted_part(model, r"layers\.1\.")
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    exact = mean_counts(METHODS["full"].build(copy.deepcopy(model), part, None), part, batch)
    warm = METHODS["lp_l1-4-warm-up"].build(model, part, None)
    low_rank = mean_counts(warm, part, batch)
    assert all(low_rank[name] < exact[name] for name in exact)
    assert mean_counts(warm, part, batch, exact_share=1.0) == exact
    assert mean_counts(warm, part, batch, exact_share=0.25) == {
        name: 0.75 * low_rank[name] + 0.25 * exact[name] for name in exact
    }


def test_a_head_alone_takes_the_learning_rate_of_the_run():
    model = METHODS["head"].build(ViTForImageClassification(vit_config()), AdaptedPart([], ["classifier"]), None)
    run = training.Run("", Path(), 1, 1e-4, heads=["classifier"], head_learning_rate=1e-2)
    (group,) = training.parameter_groups(model, run)
    assert "lr" not in group and len(group["params"]) == 2


@pytest.mark.parametrize("method", ["full", "lp_l1-2"])
def test_gradients_from_features_are_those_from_images(method):
    config = Dinov2Config(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_labels=5
    )
    backbone = Backbone(
        "", {"partial": ""}, entry="dinov2.encoder.layer.2", before=r"^dinov2\.(embeddings|encoder\.layer\.[01])$"
    )
    images = {"pixel_values": torch.randn(2, 3, 28, 28), "labels": torch.tensor([0, 1])}
    gradients = []
    for cut in (False, True):
        torch.manual_seed(0)
        model = Dinov2ForImageClassification(config)
        batch = images
        if cut:
            batch = images | {"pixel_values": features_of(model, backbone, {"pixel_values": images["pixel_values"]})}
            model = without_frozen_part(model, backbone)
        part = adapted_part(model, r"layer\.2\.", {"grid_size": (2, 2), "num_prefix_tokens": 1} if cut else {})
        model = METHODS[method].build(model, part, None).train()
        model(**batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_runs_begin_with_stored_features(tmp_path):
    config = Dinov2Config(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=1
    )
    Dinov2ForImageClassification(config).save_pretrained(tmp_path / "dinov2")
    train = parquet(tmp_path / "train.parquet", 24)
    given = ["--model", "dinov2_small", "--weights", str(tmp_path / "dinov2"), "--dataset", "cifar100-1000"]
    given += ["--train_files", train, "--image_size", "28", "--epochs", "1", "--train_images", "8", "--batch_size", "4"]
    given += ["--validation_images", "4", "--output", str(tmp_path / "records"), "--methods", "lp_l1-2", "--seeds", "0"]
    run.main([*given, "--cache", str(tmp_path / "cache")])
    stored = sorted(path.name.rsplit("-", 1)[-1] for path in (tmp_path / "cache").iterdir())
    assert stored == ["test.pt", "train.pt", "validation.pt"]
    assert torch.load(next((tmp_path / "cache").glob("*train.pt")))["features"].shape == (2, 8, 5, 32)
    with pytest.raises(SystemExit, match="min_crop"):
        run.main([*given, "--cache", str(tmp_path / "cache"), "--min_crop", "0.5", "--again"])


# The recipe of the documentation


def test_a_method_of_ones_own(experiment):
    page = (ROOT / "docs" / "paper.md").read_text()
    code = re.search(r"## Add your method.*?```python\n(.*?)```", page, re.DOTALL)[1]
    before = dict(METHODS)
    try:
        exec(code, {})
        (name,) = METHODS.keys() - before.keys()
        folder = experiment("--methods", name, "--seeds", "0")
        assert json.loads((folder / name / "seed-0.json").read_text())["label"] == METHODS[name].label
    finally:
        METHODS.clear()
        METHODS.update(before)


def test_the_cost_of_a_warm_up_is_the_mean_over_its_steps():
    config = {"epochs": 10, "train_images": 990, "batch_size": 50}  # 200 steps, of which 40 are exact
    measured = {
        "full": {"step_ms": [100.0, 200.0, 300.0], "peak_mib": 9.0},
        "lp_l1-4-warm-up": {"step_ms": [50.0, 100.0, 150.0], "peak_mib": 7.0},
        "lp_l1-4": {"step_ms": [50.0, 100.0, 150.0], "peak_mib": 7.0},
    }
    assert report._mean_cost("lp_l1-4-warm-up", config, measured) == {"step_ms": [60.0, 120.0, 180.0], "peak_mib": 9.0}
    assert report._mean_cost("lp_l1-4", config, measured) == measured["lp_l1-4"]
    assert report._mean_cost("lp_l1-4-warm-up", config, {"lp_l1-4-warm-up": {"peak_mib": 7.0}}) == {"peak_mib": 7.0}
