"""What the example programs write for others to use: label names, image processors, model cards, stock checkpoints."""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from PIL import Image
from processes import shared_folder
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTForImageClassification,
    pipeline,
)

pytest.importorskip("sklearn", reason="the examples' own data need scikit-learn")
pytest.importorskip("datasets", reason="the examples need datasets")
pytest.importorskip("evaluate", reason="the examples need evaluate")

import predict
from accelerate import Accelerator
from common import digits, experiment, scenes
from common.adapters import MODEL_CONFIG, load, pixels
from common.classification import Classification, ClassificationOptions
from common.methods import chosen_methods
from common.segmentation import Segmentation, SegmentationOptions

ADAPTERS = [
    "full/seed-0/adapter",
    "lora/seed-0/adapter",
    "lbp-wht-r-3/seed-0/adapter",
    "lora-lbp-wht-r-3/seed-0/adapter",
]
STACK = "lora-lbp-wht-r-3/seed-0/stack"
METHODS = ["full", "lora", "lbp-wht:r=3", "lora+lbp-wht:r=3"]
MAPS = ["lbp-wht-r-3/seed-0/adapter", "lora-lbp-wht-r-3/seed-0/adapter", STACK]

restores_modules_to_save = pytest.mark.skipif(
    "AuxiliaryTrainingWrapper" not in inspect.getsource(ViTForImageClassification.load_adapter),
    reason="this transformers' own load_adapter does not restore modules_to_save",
)


@contextlib.contextmanager
def working_in(folder):
    """Have relative paths start from a folder within the block (contextlib.chdir came with Python 3.11)."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_example(folder, task, *flags):
    """Run an example program on a small part of its own data, in this process and in a given folder."""
    small = {
        Classification: (digits, lambda: digits.digits(range(5)), 40, 10),
        Segmentation: (scenes, lambda: scenes.scenes(range(5), 6, 2), 6, 2),
    }
    module, whole, train, test = small[type(task)]
    known = whole()
    known.train, known.test = known.train.select(range(train)), known.test.select(range(test))
    example = dataclasses.replace(module.EMBEDDED, known=lambda: known, epochs=1)
    with pytest.MonkeyPatch.context() as patch, working_in(folder):
        patch.setattr(type(task), "embedded", lambda self: example)
        patch.setattr(sys, "argv", ["example.py", "--output", "out", "--timing_rounds", "1", *flags])
        for name in ("set_verbosity_error", "disable_progress_bar"):  # for the whole process
            patch.setattr(f"transformers.logging.{name}", lambda: None)
        experiment.main(task, "")


def once(tmp_path_factory, name, make):
    """A folder that one of pytest's workers fills and all workers use."""
    folder = shared_folder(tmp_path_factory, name)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            make(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """The folder in which the classification example ran, with its results in out/ and an image, image.png."""

    def make(folder):
        flags = ["--epochs", "1", "--train_images_per_class", "4", "--test_images", "20", "--batch_size", "10"]
        run_example(folder, Classification(), *flags, "--methods", *METHODS)
        digits.digits(range(5, 10)).test[0]["image"].save(folder / "image.png")

    return once(tmp_path_factory, "classified", make)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    def make(folder):
        flags = ["--epochs", "1", "--train_images", "5", "--test_images", "2", "--batch_size", "5"]
        run_example(folder, Segmentation(), *flags, "--methods", *METHODS[2:])
        scenes.scenes(range(5, 10), 1, 1).test[0]["image"].resize((150, 70)).save(folder / "image.png")

    return once(tmp_path_factory, "segmented", make)


def run_card(folder, at):
    """Run the code of a model card where the program ran; return what it printed and its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", (at / folder / "README.md").read_text(), flags=re.DOTALL)
    found, printed = {}, io.StringIO()
    with working_in(at), contextlib.redirect_stdout(printed):
        exec(code, found)
    return printed.getvalue(), found, code


def predictions(folder, at):
    with working_in(at):
        predictor = load(Path(folder))
        image = pixels(predictor.processor, Image.open("image.png"))
        with torch.no_grad():
            return predictor, predictor.model(pixel_values=image, **predictor.arguments).logits


@pytest.mark.parametrize("name", [*ADAPTERS, STACK])
def test_a_folder_has_label_names_image_processor_and_a_filled_card(name, classified):
    folder = classified / "out" / name
    config = AutoConfig.from_pretrained(folder if name.startswith("full") else folder / MODEL_CONFIG)
    assert config.id2label == {0: "5", 1: "6", 2: "7", 3: "8", 4: "9"} and config.label2id["9"] == 4
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 32, "width": 32}
    card = (folder / "README.md").read_text()
    assert "More Information Needed" not in card
    results = json.loads((classified / "out" / "results.json").read_text())["results"]
    score = results[[*ADAPTERS[:3], STACK].index(name) if name in [*ADAPTERS[:3], STACK] else 3]["histories"][0][-1]
    for part in ("out/pretrained", "20 training, 20 test images of 5 classes: 5, 6, 7, 8, 9", "peak learning rate"):
        assert part in card
    assert f"| test | {100 * score['score']:.1f} % |" in card and f"value: {round(score['score'], 4)}" in card
    assert ("import lbp_peft" in card) == (name in (ADAPTERS[2], STACK))


@pytest.mark.parametrize("name", [*ADAPTERS, STACK])
def test_the_code_of_a_card_predicts(name, classified):
    printed, _, _ = run_card(f"out/{name}", classified)
    found = {answer["label"]: answer["score"] for answer in eval(printed)}
    predictor, logits = predictions(f"out/{name}", classified)
    expected = dict(zip(predictor.names, logits.softmax(-1)[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 5


@restores_modules_to_save
@pytest.mark.parametrize("name", ADAPTERS)
def test_transformers_loads_an_adapter_with_its_base(name, classified):
    predictor, expected = predictions(f"out/{name}", classified)
    with working_in(classified):
        model = AutoModelForImageClassification.from_pretrained(f"out/{name}")
        assert model.config.id2label[4] == "9"
        image = pixels(predictor.processor, Image.open("image.png"))
        assert torch.allclose(model.eval()(image).logits, expected, atol=1e-5)
        answers = pipeline("image-classification", model=f"out/{name}")("image.png")
    assert answers[0]["label"] == predictor.names[expected.argmax()]


@restores_modules_to_save
@pytest.mark.parametrize("name", ADAPTERS[1:])
def test_transformers_loads_an_adapter_whose_base_has_another_head(name, classified, tmp_path):
    """The configuration beside the adapter is given, as for a base model from the hub."""
    _, expected = predictions(f"out/{name}", classified)
    with working_in(classified):
        other = AutoModelForImageClassification.from_pretrained("out/pretrained", num_labels=7)
        other.save_pretrained(tmp_path / "base")
        folder = tmp_path / "adapter"
        PeftModel.from_pretrained(
            AutoModelForImageClassification.from_pretrained("out/pretrained"), f"out/{name}"
        ).save_pretrained(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
        config = AutoConfig.from_pretrained(f"out/{name}", subfolder=MODEL_CONFIG)
        model = AutoModelForImageClassification.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
        loaded = pipeline("image-classification", model=model, image_processor=f"out/{name}")
        answers = {answer["label"]: answer["score"] for answer in loaded("image.png")}
    expected = dict(zip("56789", expected.softmax(-1)[0].tolist(), strict=True))
    assert answers == pytest.approx(expected, abs=1e-5)


def test_transformers_says_how_to_load_a_stack(classified):
    with working_in(classified), pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(base_model"):
        AutoModelForImageClassification.from_pretrained(f"out/{STACK}")


WITHOUT_LBP_PEFT = """
import sys

sys.modules["lbp_peft"] = None
{code}
"""


def test_beside_a_stack_is_a_checkpoint_for_those_without_lbp_peft(classified):
    """It is loaded by plain PEFT and by the code of the card, in a process that cannot import the package."""
    name = "out/lora-lbp-wht-r-3/seed-0/adapter"
    config = json.loads((classified / name / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not [key for key in config if "lbp" in key.lower() or "stack" in key]
    printed, _, code = run_card(name, classified)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LBP_PEFT.format(code=code)],
        capture_output=True, text=True, cwd=classified, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [{answer["label"]: answer["score"] for answer in eval(text)} for text in (done.stdout, printed)]
    assert answers[0] == pytest.approx(answers[1], abs=1e-6)


def test_a_stack_goes_on_with_training(classified):
    base = ViTForImageClassification.from_pretrained(classified / "out" / "pretrained", num_labels=5)
    model = PeftModel.from_pretrained(base, classified / "out" / STACK, is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert model.active_peft_config.peft_type == "LBPWHT" and any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained) and "lora" in str(model.stacked_on.peft_config).lower()


def test_confusion_matrices_and_scores_of_classes(classified):
    record = json.loads((classified / "out" / "classes.json").read_text())
    results = json.loads((classified / "out" / "results.json").read_text())["results"]
    assert record["classes"] == list("56789") and len(record["methods"]) == len(METHODS)
    for row in results:
        counts = np.array(record["methods"][row["method"]]["confusion"])
        assert counts.sum() == 20 and counts.trace() / 20 == pytest.approx(row["histories"][0][-1]["score"])
        assert record["methods"][row["method"]]["scores"]["count"] == counts.sum(1).tolist()
    assert (classified / "out" / "confusion.png").stat().st_size > 10_000


def test_predicting_from_the_command_line(classified, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either, and not taken for one")
    Image.open(classified / "image.png").save(folder / "sound.png")
    with working_in(classified):
        status = predict.main([f"out/{STACK}", str(folder), "image.png", "--top", "2", "--json", str(tmp_path / "j")])
    said = capsys.readouterr()
    assert status == 1 and re.fullmatch(
        r".*broken\.png cannot be used: not an image that Pillow can read\n", said.err.splitlines(True)[-1]
    )
    found = json.loads((tmp_path / "j").read_text())
    _, logits = predictions(f"out/{STACK}", classified)
    assert found["image.png"] == found[str(folder / "sound.png")] and len(found) == 2
    expected = logits.softmax(-1)[0].topk(2)
    assert list(found["image.png"]) == ["56789"[k] for k in expected.indices]
    assert "image.png: " in said.out and "%" in said.out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere", "image.png"], "nowhere is not a folder"),
        (["out", "image.png"], "out holds no model itself. Name a folder in it, such as out/"),
        (
            [f"out/{STACK}", "image.png", "--json", "nowhere/j.json"],
            "--json .*: there is no folder nowhere",
        ),
        ([f"out/{STACK}", "nowhere.png"], "there is no nowhere.png"),
        ([f"out/{STACK}", "image.png", "--base", "out/nowhere"], "out/nowhere, the base model of .*--base"),
        ([f"out/{STACK}", "image.png", "--top", "0"], "--top"),
        ([f"out/{STACK}", "image.png", "--js", "file"], "unrecognized arguments"),
    ],
)
def test_mistakes_in_predicting_are_named(arguments, said, classified, capsys):
    with working_in(classified), pytest.raises(SystemExit) as stopped:
        predict.main(arguments)
    printed = capsys.readouterr()
    assert re.search(said, f"{stopped.value} {printed.err}") and not printed.out
    assert printed.err.count("\n") == (1 if stopped.value.code == 2 else 0)  # one line, of argparse or of the caller


def test_a_folder_without_an_image_processor_is_named(classified, tmp_path):
    with pytest.raises(SystemExit, match="has no image processor"):
        predict.main([str(tmp_path), str(classified / "image.png")])


@pytest.mark.parametrize("name", MAPS)
def test_the_card_of_a_segmentation_model(name, segmented):
    _, found, code = run_card(f"out/{name}", segmented)
    predictor, logits = predictions(f"out/{name}", segmented)
    classes = nn.functional.interpolate(logits, size=(70, 150), mode="bilinear").argmax(1)[0]
    names = {predictor.names[k] for k in classes.unique().tolist()}
    assert "image-segmentation" in code
    answers = found["predict"](str(segmented / "image.png"))
    assert {answer["label"] for answer in answers} == names
    shares = {answer["label"]: np.array(answer["mask"]).astype(bool).mean() for answer in answers}
    labels = predictor.model.config.label2id
    expected = {label: (classes == labels[label]).float().mean().item() for label in names}
    assert shares == pytest.approx(expected, abs=1e-3)
    assert "More Information Needed" not in (segmented / "out" / name / "README.md").read_text()


def test_predicting_maps(segmented, tmp_path, capsys):
    with working_in(segmented):
        Image.open("image.png").save("image.bmp")
        assert predict.main([f"out/{MAPS[0]}", "image.png", "image.bmp", "--maps", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["image.bmp.png", "image.png"]
    _, logits = predictions(f"out/{MAPS[0]}", segmented)
    expected = nn.functional.interpolate(logits, size=(70, 150), mode="bilinear").argmax(1)[0]
    assert np.array_equal(np.array(Image.open(tmp_path / "image.png")), expected.numpy())
    record = json.loads((segmented / "out" / "classes.json").read_text())
    assert record["classes"] == ["background", *"56789"] and (segmented / "out" / "confusion.png").exists()
    counts = np.array(record["methods"]["LBP-WHT r=3"]["confusion"])
    assert counts.sum() == 2 * 64 * 128


def test_prediction_reads_images_as_training_does(classified):
    """Pillow alone would make grey images of 16 bits white."""
    with working_in(classified):
        predictor = load(Path(f"out/{ADAPTERS[0]}"))
    grey = [
        Image.fromarray(np.full((32, 32), value, kind)) for value, kind in ((128 * 257, np.uint16), (128, np.uint8))
    ]
    assert torch.equal(*(pixels(predictor.processor, image) for image in grey))


def adapt(folder, task, options, source):
    """Train one LBP-WHT adapter with the example's own code; return the adapter's folder."""
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    (method,) = chosen_methods(options)
    run = experiment.Experiment(task, options, accelerator, source)
    run.adapt(method, 0)
    return run.folder(method, 0) / "adapter"


def test_another_size_of_images_is_known_to_the_folder(tmp_path):
    """The model must be told to interpolate its positions; the processor has the size that was trained on."""
    digits.EMBEDDED.save(digits.tiny_vit(), tmp_path / "model")
    source = digits.digits(range(5, 10))
    source.train, source.test = source.train.select(range(4)), source.test.select(range(2))
    options = ClassificationOptions(
        model=str(tmp_path / "model"), output=str(tmp_path / "out"), methods=["lbp-wht:r=3"], image_size=[48, 64],
        epochs=1, batch_size=4,
    )  # fmt: skip
    folder = adapt(tmp_path, Classification(), options, source)
    source.test[0]["image"].save(tmp_path / "image.png")
    printed, _, code = run_card(folder, tmp_path)
    predictor, logits = predictions(folder, tmp_path)
    assert pixels(predictor.processor, source.test[0]["image"]).shape == (1, 3, 48, 64)
    assert predictor.arguments == {"interpolate_pos_encoding": True} and "interpolate_pos_encoding" in code
    assert eval(printed)[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


def test_a_new_head_on_a_backbone_is_loaded_with_its_backbone(tmp_path, monkeypatch):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(num_hidden_layers=4, mlp_ratio=2, **size)).save_pretrained(tmp_path / "model")
    source = scenes.scenes(range(5, 10), 2, 1)
    options = SegmentationOptions(
        model=str(tmp_path / "model"), head="upernet", output=str(tmp_path / "out"), methods=["lbp-wht:r=3"], epochs=1,
        batch_size=2, image_size=[32, 64], head_channels=16,
    )  # fmt: skip
    assert Segmentation().model(options.model, source.names, 0, options).config.hidden_size == 16
    folder = adapt(tmp_path, Segmentation(), options, source)
    source.test[0]["image"].save(tmp_path / "image.png")
    printed, found, _ = run_card(folder, tmp_path)
    predictor, logits = predictions(folder, tmp_path)
    assert torch.allclose(found["logits"], logits, atol=1e-4)
    assert {line.split()[0] for line in printed.splitlines()} <= set(predictor.names)
