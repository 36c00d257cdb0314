"""The data of the example programs: which images are drawn, what is read, and what is refused before training."""

import collections
import json
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the examples need datasets")
pytest.importorskip("evaluate", reason="the examples need evaluate")

import datasets
from accelerate import Accelerator
from common import experiment
from common.classification import Classification, ClassificationOptions
from common.experiment import Experiment, load, shrink
from common.methods import chosen_methods
from common.models import head_modules
from common.segmentation import Segmentation, SegmentationOptions
from datasets import ClassLabel, Dataset, Features, Image, Value
from models import tiny_vit
from PIL import Image as PILImage
from transformers import AutoConfig, AutoImageProcessor, BertConfig, BertModel, ViTConfig

from lbp_peft.loading.classification import classes_in, with_labels
from lbp_peft.loading.datasources import Source, draw, hold_out
from lbp_peft.loading.places import local_folder, looks_like_path
from lbp_peft.loading.preprocessing import Preprocessor
from lbp_peft.loading.storedimages import as_rgb
from lbp_peft.loading.views import View


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed=0, size=(12, 10)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(values)


def in_classes(folder, counts, split="train"):
    for name, count in counts.items():
        place = folder / split / name
        place.mkdir(parents=True)
        for index in range(count):
            picture(index).save(place / f"{index}.png")
    return folder


def in_pairs(folder, count=4, classes=3, ending="png"):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        picture(index).save(folder / "images" / f"{index}.{ending}")
        values = np.random.default_rng(index).integers(0, classes, (10, 12), dtype=np.uint8)
        PILImage.fromarray(values).save(folder / "masks" / f"{index}.png")
    return folder


def images_of(options, task=None):
    return load(Accelerator(cpu=True), task or Classification(), options)


def refusal(options, task=None):
    with pytest.raises(SystemExit) as stop:
        images_of(options, task)
    return " ".join(str(stop.value).split())


def options_for(folder, **more):
    return ClassificationOptions(model="m", dataset=str(folder), **more)


# Which images are drawn


@pytest.mark.parametrize("wanted", [3, 20, 31, 100])
def test_images_are_drawn_of_each_class_in_proportion(wanted):
    sizes = {0: 100, 1: 50, 2: 10}
    labels = np.repeat(list(sizes), list(sizes.values()))  # sorted by class, as a folder is
    rows = draw(len(labels), wanted, 0, labels)
    found = collections.Counter(labels[rows].tolist())
    assert len(rows) == len(set(rows)) == wanted and np.array_equal(rows, np.sort(rows))
    for label, size in sizes.items():
        assert found[label] >= 1 and abs(found[label] - wanted * size / len(labels)) <= 1.5


def test_the_seed_alone_says_which_images_are_drawn():
    labels = np.repeat(range(4), 25)
    assert np.array_equal(draw(100, 20, 1, labels), draw(100, 20, 1, labels.copy()))
    assert not np.array_equal(draw(100, 20, 1, labels), draw(100, 20, 2, labels))
    assert not np.array_equal(draw(100, 20, 1), draw(100, 20, 2)) and len(draw(100, 20, 1)) == 20
    assert np.array_equal(draw(5, 9, 0, [0, 0, 1, 1, 2]), range(5))
    assert len(draw(100, 2, 0, labels)) == 2  # fewer than there are classes
    assert draw(1000, 20, 0, np.repeat([0, 1], [990, 10])).max() >= 990  # a rare class is there


def test_few_test_and_training_images_of_every_class():
    part = Dataset.from_dict(
        {"image": [picture()] * 40, "label": [0] * 20 + [1] * 20},
        features=Features({"image": Image(), "label": ClassLabel(names=["a", "b"])}),
    )
    options = ClassificationOptions(test_images=10, train_images=6)
    found = shrink(Classification(), Source(part, part, ["a", "b"]), options)
    assert collections.Counter(found.test["label"]) == {0: 5, 1: 5}
    assert collections.Counter(found.train["label"]) == {0: 3, 1: 3}
    train, test = hold_out(part, ClassificationOptions(held_out=0.25), part["label"])
    assert collections.Counter(test["label"]) == {0: 5, 1: 5} and len(train) == 30


def test_one_image_of_each_class_is_trained_on_whatever_is_held_out():
    labels = [0] * 10 + [1] * 5 + [2]
    features = Features({"label": ClassLabel(names=["a", "b", "c"])})
    part = Dataset.from_dict({"label": labels}, features=features)
    for seed in range(5):
        train, test = hold_out(part, ClassificationOptions(held_out=0.9, data_seed=seed), labels)
        assert sorted(train["label"]) == [0, 1, 2] and len(test) == 13
    with pytest.raises(SystemExit, match="of 2 training images none can be held out to test on.*--test_split"):
        hold_out(part.select([0, 15]), ClassificationOptions(), [0, 2])
    assert [len(half) for half in hold_out(part.select([0, 1]), ClassificationOptions())] == [1, 1]


def test_few_label_maps_are_drawn_by_seed(tmp_path):
    in_pairs(tmp_path / "train", count=8)
    in_pairs(tmp_path / "test", count=8)
    sizes, paths = [], []
    for seed in (0, 0, 1):
        options = SegmentationOptions(
            model="m", dataset=str(tmp_path), train_images=4, test_images=3, data_seed=seed, eval_batch_size=2
        )
        source = images_of(options, Segmentation())
        sizes.append((len(source.train), len(source.test)))
        raw = source.test.cast_column("image", Image(decode=False))
        paths.append([row["path"] for row in raw["image"]])
    assert sizes == [(4, 3)] * 3 and paths[0] == paths[1] != paths[2]


# Folders of classes


def test_a_folder_of_classes(tmp_path):
    in_classes(tmp_path, {"cat": 4, "dog": 4})
    source = images_of(options_for(tmp_path))
    assert source.names == ["cat", "dog"] and len(source.train) == 6
    assert sorted(source.test["label"]) == [0, 1]  # held out, of each class


def test_folders_that_make_no_data(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "the folder is empty" in refusal(options_for(tmp_path / "empty"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    assert "there are no images" in refusal(options_for(tmp_path / "text"))
    (tmp_path / "flat").mkdir()
    for index in range(3):
        picture(index).save(tmp_path / "flat" / f"{index}.png")
    assert "there are no labels" in refusal(options_for(tmp_path / "flat"))
    in_classes(tmp_path / "one", {"cat": 3})
    assert "two or more classes" in refusal(options_for(tmp_path / "one"))
    for split in ("train", "test"):  # `datasets` would take the splits for classes
        in_classes(tmp_path / "splits", {split: 3}, ".")
    assert "named after its class" in refusal(options_for(tmp_path / "splits"))
    assert "this is a file" in refusal(options_for(tmp_path / "flat" / "0.png"))


def test_names_of_splits_and_columns(tmp_path):
    in_classes(tmp_path, {"cat": 3, "dog": 3})
    assert "no such split; there are: train" in refusal(options_for(tmp_path, train_split="trian"))
    assert "--test_split val: there is no such split" in refusal(options_for(tmp_path, test_split="val"))
    assert "no column 'img'; there are: image, label" in refusal(options_for(tmp_path, image_column="img"))
    assert "no column 'class'" in refusal(options_for(tmp_path, label_column="class"))
    assert "not one class for each image" in refusal(options_for(tmp_path, label_column="image"))
    assert "cannot both come" in refusal(options_for(tmp_path, image_column="label"))
    numbers = {"image": [1, 2], "label": ["a", "b"]}
    Dataset.from_dict(numbers).to_parquet(tmp_path / "a.parquet")
    options = ClassificationOptions(model="m", train_files=[str(tmp_path / "a.parquet")])
    assert "the column 'image' holds no images" in refusal(options)


@pytest.mark.parametrize("labels, kind, expected", [
    ([0.5, 1.5, 0.5, 1.5], Value("float64"), "holds float64, not one class"),
    ([[0], [1], [0], [1]], datasets.List(Value("int64")), "not one class"),
    (["a", None, "b", "a"], Value("string"), "without a label"),
    ([0, 1, -1, 1], ClassLabel(names=["a", "b"]), "without a label"),
    (["a", "a", "a", "a"], Value("string"), "are of the class 'a'"),
])  # fmt: skip
def test_labels_that_are_no_classes(labels, kind, expected, tmp_path):
    features = Features({"image": Image(), "label": kind})
    Dataset.from_dict({"image": [picture()] * 4, "label": labels}, features=features).to_parquet(tmp_path / "a.parquet")
    options = ClassificationOptions(model="m", train_files=[str(tmp_path / "a.parquet")])
    assert expected in refusal(options)


def test_classes_are_told_by_name_across_files(tmp_path):
    """The numbers of classes in one file need not be those of the other."""
    for name, names, labels in [("train", ["a", "b", "c"], [0, 1, 2]), ("test", ["c", "a"], [0, 1, 1])]:
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        rows = {"image": [picture()] * 3, "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    files = [str(tmp_path / f"{name}.parquet") for name in ("train", "test")]
    train, test = (Dataset.from_parquet(file) for file in files)
    assert with_labels(test, classes_in(train, "label"))["label"] == [2, 0, 0]
    with pytest.raises(SystemExit, match="of the class 'b', which is not trained on"):
        with_labels(train, classes_in(test, "label"))


def test_files_that_are_not_there_or_not_parquet(tmp_path):
    def options(name):
        return ClassificationOptions(model="m", train_files=[str(tmp_path / name)])

    assert "there is no such file" in refusal(options("a.parquet"))
    assert "this is a folder" in refusal(options("."))
    (tmp_path / "b.parquet").write_text("no")
    assert "cannot load" in refusal(options("b.parquet")) and "b.parquet" in refusal(options("b.parquet"))


# Names


@pytest.mark.parametrize("name, expected", [
    ("./images", True), ("../images", True), ("~/images", True), ("/data/images", True), ("a/b/c", True),
    ("images.zip", True), ("my images", True), ("C:\\images", True), ("inside/imagse", True),
    ("beans", False), ("google/vit-base-patch16-224", False), ("ILSVRC/imagenet-1k", False),
])  # fmt: skip
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside" / "images").mkdir(parents=True)
    assert looks_like_path(name) == expected
    if expected:
        with pytest.raises(SystemExit, match="there is no such folder"):
            local_folder(name, "--dataset")
    else:
        assert local_folder(name, "--dataset") is None
    assert local_folder("inside/images", "--dataset") is not None


def test_a_mistyped_folder_is_named_beside_the_one_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_images").mkdir()
    assert "Did you mean" in refusal(options_for(tmp_path / "my_image"))
    message = refusal(options_for("my_image"))  # offline, as the tests are
    assert "neither a local folder nor a data set" in message and "HF_HUB_OFFLINE" in message
    assert "Did you mean my_images?" in capsys.readouterr().out


def test_data_that_is_not_from_the_hub_is_never_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_classes(tmp_path / "elsewhere" / "shapes", {"cat": 4, "dog": 4})
    images_of(options_for(tmp_path / "elsewhere" / "shapes"))  # it is in the cache from now on, by the name "shapes"
    assert "whole path" in refusal(options_for("shapes"))
    assert "whole path" in refusal(options_for("imagefolder"))  # a loader's name, which finds elsewhere/shapes


# Images


def test_broken_images_are_named_before_training(tmp_path, capsys):
    in_classes(tmp_path, {"cat": 4, "dog": 4})
    in_classes(tmp_path, {"cat": 2, "dog": 2}, "test")
    cut, text = tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "dog" / "0.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    text.write_text("no image")
    message = refusal(options_for(tmp_path))
    assert "2 of 12 images cannot be used" in message and "--skip_broken" in message
    assert str(cut) in message and f"{text} (not an image that Pillow can read)" in message
    source = images_of(options_for(tmp_path, skip_broken=True))
    assert (len(source.train), len(source.test)) == (7, 3) and "Left out 2 of 12" in capsys.readouterr().out
    assert all(image.size == (12, 10) for part in (source.train, source.test) for image in part["image"])


def test_images_to_validate_on_are_checked_as_the_others(tmp_path):
    for split, count in (("train", 5), ("test", 1), ("val", 2)):
        in_classes(tmp_path, {"cat": count, "dog": count}, split)
    options = options_for(tmp_path, keep_best=True)
    assert len(images_of(options).validation) == 4 and images_of(options_for(tmp_path)).validation is None
    message = refusal(options_for(tmp_path, keep_best=True, validation_split="val"))
    assert message == "--validation_split val: there is no such split; there are: train, validation, test"
    broken = tmp_path / "val" / "cat" / "1.png"
    broken.write_text("no image")
    assert f"1 of 16 images cannot be used: {broken}" in refusal(options)
    assert len(images_of(options_for(tmp_path, keep_best=True, skip_broken=True)).validation) == 3
    picture().save(broken)
    few = images_of(options_for(tmp_path, keep_best=True, test_split="validation", train_images=4, test_images=2))
    assert (len(few.train), len(few.validation), len(few.test)) == (3, 1, 2)


def test_label_maps_to_validate_on(tmp_path):
    for split, count in (("train", 5), ("test", 1), ("val", 2)):
        in_pairs(tmp_path / split, count)
    options = SegmentationOptions(model="m", dataset=str(tmp_path), patience=1)
    source = images_of(options, Segmentation())
    assert (len(source.train), len(source.test), len(source.validation)) == (5, 1, 2)
    (tmp_path / "val" / "masks" / "1.png").write_text("no")
    assert "masks/1.png (not an image" in refusal(options, Segmentation())


def test_broken_jpegs_and_images_in_parquet_files(tmp_path):
    file = tmp_path / "a.jpg"
    picture(size=(200, 200)).save(file)
    whole = file.read_bytes()
    stored = [{"bytes": data, "path": None} for data in (whole, whole[: len(whole) // 2], None, whole)]
    features = Features({"image": Image(), "label": Value("string")})
    rows = {"image": [*stored[:2], None, stored[3]], "label": ["a", "b", "a", "b"]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"image": [picture()] * 2, "label": ["a", "b"]}, features=features).to_parquet(
        tmp_path / "test.parquet"
    )
    options = ClassificationOptions(
        model="m", train_files=[str(tmp_path / "train.parquet")], test_files=[str(tmp_path / "test.parquet")]
    )
    message = refusal(options)
    assert "2 of 6 images" in message and "image of row 1" in message and "row 2 (there is no image)" in message


def test_images_of_every_mode_and_size_become_pixels(tmp_path):
    preprocessor = Preprocessor(
        ClassificationOptions(model=str(tmp_path), image_size=[16]), ViTConfig(image_size=16, patch_size=8)
    )
    images = [picture().convert(mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK")]
    images += [picture(size=size) for size in ((1, 1), (3, 3), (1, 40), (40, 2), (4, 1))]
    images.append(PILImage.fromarray(np.full((9, 9), 40000, dtype=np.uint16)))
    for image in images:
        assert preprocessor(image).shape == (3, 16, 16)
    grey = np.asarray(as_rgb(images[-1]))
    assert grey.shape == (9, 9, 3) and (grey == round(40000 / 257)).all()  # Pillow alone would make it white


def test_a_model_of_timm_on_the_hub_is_preprocessed_as_timm_does_at_any_size(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    whole = timm.create_model("tf_efficientnet_lite0").pretrained_cfg
    data = {key: whole[key] for key in ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes")}
    config = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "num_classes": 1000}
    config["pretrained_cfg"] = data
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoConfig.from_pretrained(tmp_path)
    image = picture(size=(640, 512))  # 320 x 256 after resizing: both round the margins of other sizes differently
    by_timm = AutoImageProcessor.from_pretrained(tmp_path).preprocess(image)["pixel_values"][0]
    step = 1 / 255 / min(data["std"])  # images are rounded to 8 bits after resizing
    assert (Preprocessor(ClassificationOptions(model=str(tmp_path)), model)(image) - by_timm).abs().max() <= step
    smaller = Preprocessor(ClassificationOptions(model=str(tmp_path), image_size=[64]), model)
    assert smaller(image).shape == (3, 64, 64) and smaller(image, View((20, 30, 200, 210))).shape == (3, 64, 64)


# Images and label maps of the same names


@pytest.mark.parametrize("layout", ["none", "outside", "inside"])
def test_images_and_masks_are_matched_by_name(layout, tmp_path):
    if layout == "none":
        in_pairs(tmp_path, count=5, ending="bmp")
    elif layout == "outside":
        in_pairs(tmp_path / "train")
        in_pairs(tmp_path / "val", count=1)
    else:
        for split, count in (("training", 4), ("validation", 1)):
            in_pairs(tmp_path / "parts" / split, count)
            for kind in ("images", "masks"):
                (tmp_path / kind).mkdir(exist_ok=True)
                shutil.move(tmp_path / "parts" / split / kind, tmp_path / kind / split)
    source = images_of(SegmentationOptions(model="m", dataset=str(tmp_path)), Segmentation())
    assert source.names == ["0", "1", "2"] and (len(source.train), len(source.test)) == (4, 1)
    for row in source.train:
        assert row["image"].size == row["label"].size == (12, 10)


def changed(tmp_path, change, **more):
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    in_pairs(folder)
    change(folder)
    return SegmentationOptions(model="m", dataset=str(folder), **more)


@pytest.mark.parametrize("change, more, expected", [
    (lambda f: (f / "masks" / "2.png").unlink(), {}, "images/2.png has no partner of the same name in"),
    (lambda f: (f / "images" / "2.png").unlink(), {}, "masks/2.png has no partner of the same name in"),
    (lambda f: picture().save(f / "images" / "2.bmp"), {}, "have the same name"),
    (lambda f: (f / "masks" / "2.png").write_text("no"), {}, "masks/2.png (not an image"),
    (lambda f: picture().save(f / "masks" / "2.png"), {}, "must have one channel"),
    (lambda f: picture(size=(10, 12)).convert("L").save(f / "masks" / "2.png"), {"class_names": ["x"] * 256},
     "the label map has 10 x 12 pixels, its image 12 x 10"),
    (lambda f: None, {"class_names": ["a", "b"]}, "values from 0 to 2, but there are 2 classes"),
    (lambda f: None, {"mask_column": "maps"}, "there is no column 'maps'"),
])  # fmt: skip
def test_pairs_that_do_not_fit(change, more, expected, tmp_path):
    assert expected in refusal(changed(tmp_path, change, **more), Segmentation())


def test_label_maps_of_one_class(tmp_path):
    def binary(folder):
        for file in (folder / "masks").iterdir():
            PILImage.fromarray((np.asarray(PILImage.open(file)) > 0).astype(np.uint8) * 255).save(file)

    message = refusal(changed(tmp_path, binary), Segmentation())
    assert "hold the class 0 and nothing else" in message and "--ignore_index" in message
    source = images_of(changed(tmp_path, binary, ignore_index=-1), Segmentation())
    assert len(source.names) == 256


def test_pairs_without_partners_are_left_out_on_demand(tmp_path, capsys):
    options = changed(tmp_path, lambda f: (f / "masks" / "2.png").unlink(), skip_broken=True)
    source = images_of(options, Segmentation())
    assert len(source.train) + len(source.test) == 3 and "Left out 1 files" in capsys.readouterr().out


# Models


def an_experiment(path, **more):
    part = Dataset.from_dict(
        {"image": [picture()] * 4, "label": [0, 1, 0, 1]},
        features=Features({"image": Image(), "label": ClassLabel(names=["a", "b"])}),
    )
    options = ClassificationOptions(model=str(path), **more)
    return Experiment(Classification(), options, Accelerator(cpu=True), Source(part, part, ["a", "b"]))


def test_models_that_cannot_be_loaded(tmp_path):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    tiny_vit().save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    for name, expected in {
        "bert": "no Bert model for this task",
        "broken": "this checkpoint cannot be loaded",
        "empty": "this checkpoint cannot be loaded",
        "brokn": "there is no such folder. Did you mean",
    }.items():
        with pytest.raises(SystemExit, match=expected):
            an_experiment(tmp_path / name)
    with pytest.raises(SystemExit, match="neither a local folder nor a model"):
        an_experiment("nobody/nothing")


def test_what_a_model_or_a_method_cannot_do_comes_out_before_training(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="cannot take images of 2 x 2 pixels"):
        an_experiment(tmp_path, image_size=[2])
    with pytest.raises(SystemExit, match="--head_modules head: the model has no such module"):
        head_modules(tiny_vit(), ClassificationOptions(head_modules=["head"]))
    with pytest.raises(SystemExit, match=r"Did you mean classifier\?"):
        head_modules(tiny_vit(), ClassificationOptions(head_modules=["clasifier"]))
    found = an_experiment(tmp_path, methods=["lora"], lora_target_modules=["nothing"])
    with pytest.raises(SystemExit, match=r"LoRA r=8: .*\. Check --lora_target_modules nothing"):
        found.rehearse(chosen_methods(found.options))
    found = an_experiment(tmp_path, methods=["full", "lora"], checkpoint_every=5)
    needed = found.rehearse(chosen_methods(found.options))
    assert needed > 4 * tiny_vit().num_parameters()
    experiment.check_space(tmp_path, 1)
    with pytest.raises(SystemExit, match="are free there"):
        experiment.check_space(tmp_path, 10**18)


def test_an_adapter_that_cannot_be_written_to_its_folder_is_not_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiny_vit().save_pretrained(tmp_path / "model")
    found = an_experiment(
        tmp_path / "model", output=str(tmp_path / "out"), methods=["lora"], epochs=1, image_size=[16], min_crop=1.0
    )
    (method,) = chosen_methods(found.options)
    intended = found.folder(method, 0)
    intended.parent.mkdir(parents=True)
    intended.write_text("in the way")
    assert len(found.adapt(method, 0)) == 1
    assert found.folder(method, 0) != intended and str(found.folder(method, 0)) in capsys.readouterr().err
    assert (found.folder(method, 0) / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags, expected", [
    (["--scheduler", "foo"], "--scheduler: foo is not a valid"),
    (["--metric", "foo"], "--metric: "),
    (["--report_to", "foo"], "--mixed_precision or --report_to: "),
    (["--dataset", "./nowhere"], "--dataset ./nowhere: there is no such folder"),
    (["--output", "data"], "--output data is not empty: give --resume"),
    (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
])  # fmt: skip
def test_the_program_leaves_no_folder_after_a_mistake(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vit().save_pretrained("model")
    in_classes(tmp_path / "data", {"cat": 2, "dog": 2})
    monkeypatch.setattr(sys, "argv", ["program.py", "--model", "model", "--dataset", "data", "--output", "out", *flags])
    with pytest.raises(SystemExit, match=expected):
        experiment.main(Classification(), "")
    assert not (tmp_path / "out").exists()
