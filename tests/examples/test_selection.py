"""Which weights the example programs keep, stronger augmentation, and both in a run that is resumed."""

import copy
import importlib.util
import os
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import images, same_state, state_of, tiny_vit
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn", reason="the examples' own data need scikit-learn")
pytest.importorskip("datasets", reason="the examples need datasets")
pytest.importorskip("evaluate", reason="the examples need evaluate")

from common import augmentation, experiment, remaining, training
from common.checkpoints import save_checkpoint
from common.classification import Classification, ClassificationOptions
from common.digits import EMBEDDED, digits
from common.methods import chosen_methods
from common.metrics import Confusion, confusion_matrix, per_class_scores
from common.segmentation import Segmentation
from common.selection import Average, Best, is_over, kept_epoch, with_validation
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification

from lbp_peft.loading.datasources import Source

needs_kornia = pytest.mark.skipif(
    importlib.util.find_spec("kornia") is None, reason="mixup, CutMix and RandAugment are kornia's: not installed"
)


def history(*validation):
    return [{"loss": 1.0, "score": 0.5, "validation": value, "seconds": 1.0} for value in validation]


def options_for(folder, **changes):
    small = {
        "batch_size": 10,
        "epochs": 3,
        "min_crop": 0.8,
        "methods": ["lora:lora_r=2"],
        "model": str(folder / "model"),
    }
    return ClassificationOptions(output=str(folder / "out"), **(small | changes))


def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have used a GPU
    return Accelerator(cpu=True, step_scheduler_with_optimizer=False)


@pytest.fixture
def source():
    found = digits(range(5, 10))
    return Source(found.train.select(range(40)), found.test.select(range(20)), found.names)


@pytest.fixture
def model_folder(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=32, patch_size=8, hidden_dropout_prob=0.1, **sizes)  # so random numbers matter
    torch.manual_seed(0)
    EMBEDDED.save(ViTForImageClassification(config), tmp_path / "model")
    return tmp_path


# Which epoch


@pytest.mark.parametrize(
    "scores, epoch",
    [([0.1], 0), ([0.1, 0.3, 0.2], 1), ([0.2, 0.3, 0.3], 1), ([0.3, 0.3, 0.3], 0), ([0.1, 0.2, 0.3], 2)],
)
def test_the_first_of_the_best_epochs_is_kept(scores, epoch):
    assert kept_epoch(history(*scores)) == epoch


def test_without_validation_the_last_epoch_is_kept():
    assert kept_epoch([{"loss": 1, "score": 0.9, "seconds": 1}, {"loss": 1, "score": 0.1, "seconds": 1}]) == 1


@pytest.mark.parametrize(
    "scores, patience, over",
    [
        ([], 1, False), ([0.5], 1, False), ([0.5, 0.5], 1, True), ([0.5, 0.6], 1, False), ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.3], 2, True), ([0.5, 0.4, 0.6, 0.5], 2, False), ([0.5, 0.4, 0.6, 0.5], None, False),
        ([0.5] * 9, None, True), (list(np.arange(9)), 1, True),
    ],
)  # fmt: skip
def test_training_is_over(scores, patience, over):
    assert is_over(history(*scores), 9, patience) == over


def trained_with_scores(monkeypatch, folder, source, validation, **changes):
    """Train with these validation scores, whatever the model predicts; the model, its history, and its weights after
    each epoch."""
    options = options_for(folder, keep_best=True, epochs=len(validation), **changes)
    source, _ = with_validation(Classification(), source, options)
    run, weights, scores = experiment.Experiment(Classification(), options, accelerator(), source), [], iter(validation)
    real = training.test

    def scripted(one, task, model, loader, options, confusion=None):
        found = real(one, task, model, loader, options, confusion)
        if loader.dataset.dataset is source.validation:
            weights.append(copy.deepcopy(state_of(model)))
            return next(scores)
        return found

    monkeypatch.setattr(training, "test", scripted)
    (method,) = chosen_methods(options)
    torch.manual_seed(0)
    confusion = Confusion()
    trained = training.train(
        run.accelerator, run.task, method.adapt(run.base(0), options), run.loaders(0),
        training.Run("", folder / "run", options.epochs, 1e-2), options, confusion,
    )  # fmt: skip
    return *trained, weights, confusion


def test_the_weights_of_the_best_epoch_are_kept(monkeypatch, model_folder, source):
    model, record, weights, confusion = trained_with_scores(monkeypatch, model_folder, source, [0.2, 0.7, 0.1])
    assert same_state(state_of(model), weights[1]) and not same_state(weights[1], weights[2])
    assert len(record) == 3 and [epoch["validation"] for epoch in record] == [0.2, 0.7, 0.1]
    assert confusion.counts.trace() / 20 == pytest.approx(record[1]["score"])  # of this epoch, not of the last


def test_training_stops_when_patience_is_out(monkeypatch, model_folder, source, capsys):
    scores = [0.2, 0.7, 0.1, 0.1, 0.9]
    model, record, weights, _ = trained_with_scores(monkeypatch, model_folder, source, scores, patience=2)
    assert len(record) == 4 and same_state(state_of(model), weights[1])
    assert "stopped after 4 of 5 epochs" in capsys.readouterr().out


# Validation images


def test_validation_images_are_held_out_by_class(tmp_path):
    found = digits(range(5, 10))
    labels = np.array(found.train["label"])
    chosen = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate([10, 20, 5, 1, 2])])
    few = Source(found.train.select(chosen), found.test, found.names)
    held, notice = with_validation(Classification(), few, options_for(tmp_path, keep_best=True, held_out=0.2))
    assert np.bincount(held.validation["label"]).tolist() == [2, 4, 1, 0, 1]
    assert np.bincount(held.train["label"]).tolist() == [8, 16, 4, 1, 1]
    assert "8 images held out of the training images, stratified by class; 30 are trained on" in notice
    pictures = [{image.tobytes() for image in part["image"]} for part in (held.train, held.validation)]
    assert not pictures[0] & pictures[1] and held.test is found.test
    again, _ = with_validation(Classification(), few, options_for(tmp_path, keep_best=True, held_out=0.2))
    assert [i.tobytes() for i in again.validation["image"]] == [i.tobytes() for i in held.validation["image"]]
    other, _ = with_validation(Classification(), few, options_for(tmp_path, keep_best=True, data_seed=1))
    assert {i.tobytes() for i in other.validation["image"]} != pictures[1]


def folder_of_images(folder, **splits):
    for split, count in splits.items():
        for index in range(count):
            place = folder / split / "ab"[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(np.full((8, 8, 3), index, np.uint8)).save(place / f"{split}{index}.png")
    return str(folder)


@pytest.mark.parametrize(
    "splits, changes, validated",
    [
        ({"train": 10, "test": 4, "validation": 6}, {}, "6 images of the split 'validation'"),
        ({"train": 10, "validation": 6}, {}, "2 images held out"),  # the split is tested on
        ({"train": 10, "test": 4}, {}, "2 images held out"),
        ({"train": 10, "test": 4, "validation": 6}, {"test_split": "validation"}, "2 images held out"),
        (
            {"train": 10, "test": 4, "validation": 6},
            {"test_split": "validation", "validation_split": "test"},
            "4 images of the split 'test'",
        ),
    ],
)
def test_the_split_to_validate_on(splits, changes, validated, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = folder_of_images(tmp_path / "data", **splits)
    options = options_for(tmp_path, keep_best=True, dataset=dataset, **changes)
    task = Classification()
    loaded = task.load(options)
    found, notice = with_validation(task, loaded, options)
    assert validated in notice and str(len(found.validation)) in notice
    assert len(found.test) == splits[options.test_split or ("test" if "test" in splits else "validation")]


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_split_in_other_use_is_not_validated_on(split, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = folder_of_images(tmp_path / "data", train=4, test=2)
    options = options_for(tmp_path, keep_best=True, dataset=dataset, validation_split=split)
    with pytest.raises(SystemExit, match=f"--validation_split {split}"):
        with_validation(Classification(), Classification().load(options), options)


def test_too_few_images_to_hold_some_out(tmp_path):
    found = digits(range(5, 10))
    few = Source(found.train.select([0]), found.test, found.names)
    with pytest.raises(SystemExit, match="none can be held out"):
        with_validation(Classification(), few, options_for(tmp_path, patience=1))


def test_maps_are_held_out_at_random(tmp_path):
    rows = {"image": [PILImage.new("RGB", (8, 8))] * 10, "label": [PILImage.new("L", (8, 8))] * 10}
    part = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Image()}))
    held, notice = with_validation(Segmentation(), Source(part, part, ["a"]), options_for(tmp_path, keep_best=True))
    assert (len(held.train), len(held.validation)) == (8, 2) and "stratified" not in notice


@pytest.mark.parametrize("changes", [{"rand_augment": 9}, {"mixup": 0.5}, {"cutmix": 0.5}])
def test_a_missing_library_is_named(changes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(SystemExit, match=r"lbp-peft\[augmentation\]"):
        Classification().check(options_for(tmp_path, **changes))
    Classification().check(options_for(tmp_path))


# Averaged weights


def test_the_average_is_that_of_the_updates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad = False
    average, trained = Average(model, 0.9), [p for p in model.parameters() if p.requires_grad]
    expected = None
    for _ in range(5):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn_like(parameter))
        average.update()
        now = [parameter.detach().double().clone() for parameter in trained]
        expected = now if expected is None else [0.9 * e + 0.1 * n for e, n in zip(expected, now, strict=True)]
    own = copy.deepcopy(model.state_dict())
    with average.applied():
        for parameter, value in zip(trained, expected, strict=True):
            assert torch.allclose(parameter.double(), value, atol=1e-6)
        assert torch.equal(model[0].bias, own["0.bias"])
    assert same_state(model.state_dict(), own)
    average.apply()
    assert torch.allclose(trained[0].double(), expected[0], atol=1e-6)


def test_averaged_weights_are_tested_and_returned(model_folder, source):
    """Their scores are those of the returned model, and the weights that are trained are not changed by them."""
    task, weights = Classification(), {}
    for decay in (None, 0.5):
        options = options_for(model_folder, ema_decay=decay)
        run = experiment.Experiment(task, options, accelerator(), source)
        (method,) = chosen_methods(options)
        model, record = training.train(
            run.accelerator, task, method.adapt(run.base(0), options), run.loaders(0),
            training.Run("", model_folder / "run", 3, 1e-2), options,
        )  # fmt: skip
        loader = run.loaders(0)[1]
        assert training.test(accelerator(), task, model, loader, options) == pytest.approx(record[-1]["score"])
        weights[decay] = state_of(model), [epoch["loss"] for epoch in record]
    assert weights[None][1] == weights[0.5][1] and not same_state(weights[None][0], weights[0.5][0])


def test_the_first_updates_can_be_exact(model_folder, source):
    task, losses = Classification(), []
    for exact_steps in (0, 4, 12):  # of twelve, four in an epoch
        options = options_for(model_folder, methods=["lbp-wht:r=3"], exact_steps=exact_steps)
        run = experiment.Experiment(task, options, accelerator(), source)
        (method,) = chosen_methods(options)
        of_run = training.Run("", model_folder / "run", 3, 1e-2, exact_steps=options.exact_steps)
        model = method.adapt(run.base(0), options)
        _, record = training.train(run.accelerator, task, model, run.loaders(0), of_run, options)
        losses.append([epoch["loss"] for epoch in record])
    none, one_epoch, all_epochs = losses
    assert one_epoch[0] == all_epochs[0] != none[0]
    assert one_epoch[2] != all_epochs[2]


def test_the_best_weights_come_with_the_statistics_of_batch_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    best = Best(model)
    model(torch.randn(8, 3))
    best.keep()
    kept = copy.deepcopy(model.state_dict())
    model(torch.randn(8, 3))
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not same_state(model.state_dict(), kept)
    best.restore()
    assert same_state(model.state_dict(), kept)


# Resuming

ALL_KEPT = {"keep_best": True, "patience": 5, "ema_decay": 0.9, "epochs": 4}
AUGMENTED = {"rand_augment": 9, "mixup": 0.4, "cutmix": 0.4, "epochs": 2}


@pytest.mark.parametrize(
    "changes, killed",
    [(ALL_KEPT, 10), pytest.param(AUGMENTED | ALL_KEPT | {"epochs": 2}, 6, marks=needs_kornia)],
)
def test_a_killed_run_keeps_the_same_weights(changes, killed, model_folder, source, monkeypatch):
    """The best epoch before the kill, the average and what augmentation draws are those of the unbroken run."""
    task = Classification()

    def adapt(name, **more):
        options = options_for(model_folder, checkpoint_every=2, **changes, **more)
        options.output = str(model_folder / name)
        found, _ = with_validation(task, source, options)
        run = experiment.Experiment(task, options, accelerator(), found)
        (method,) = chosen_methods(options)
        record = run.adapt(method, 0)
        folder = run.folder(method, 0)
        files = {name: (folder / name).read_bytes() for name in ("confusion.json", "adapter/adapter_model.safetensors")}
        return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in record], files

    # Validation scores that make the first epoch the best, so that it must come from the checkpoint.
    real = training.test
    monkeypatch.setattr(
        training, "test",
        lambda one, task, model, loader, options, confusion=None: (
            real(one, task, model, loader, options, confusion) / (1 + 100 * (loader.dataset.dataset is not source.test))
            if confusion is not None else 1.0
        ),
    )  # fmt: skip
    whole = adapt("whole")
    updates = []

    def die(*values):
        save_checkpoint(*values)
        updates.append(values[2])
        if values[2] == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", die)
        adapt("killed")
    assert updates[-1] == killed
    resumed = adapt("killed", resume=True)
    assert resumed == whole
    assert kept_epoch(history(*(epoch["validation"] for epoch in whole[0]))) == 0
    assert not [path for path in os.listdir(model_folder / "killed") if path.startswith("checkpoint")]


# Augmentation


@needs_kornia
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_batches_are_mixed_in_pairs(kind):
    batch = {"pixel_values": images(6), "labels": torch.arange(6)}
    state = torch.get_rng_state()
    mixed = augmentation.mix(batch, **{"mixup": 0.0, "cutmix": 0.0} | {kind: 1.0}, seed=(0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    first, second, share = mixed["labels"].unbind(1)
    assert first.tolist() == list(range(6)) and ((share >= 0) & (share <= 1)).all() and len(set(second.tolist())) > 1
    for own, other, part, image in zip(first.long(), second.long(), share, mixed["pixel_values"], strict=True):
        a, b = batch["pixel_values"][own], batch["pixel_values"][other]
        if kind == "mixup":
            assert torch.allclose(image, (1 - part) * a + part * b, atol=1e-6)
        else:
            of_other = (image == b).all(0)
            assert torch.equal(image, torch.where(of_other, b, a))
            assert own == other or of_other.float().mean() == pytest.approx(part.item(), abs=1e-6)
    again = augmentation.mix(batch, **{"mixup": 0.0, "cutmix": 0.0} | {kind: 1.0}, seed=(0, 1, 2))
    assert torch.equal(again["pixel_values"], mixed["pixel_values"])
    other = augmentation.mix(batch, **{"mixup": 0.0, "cutmix": 0.0} | {kind: 1.0}, seed=(0, 1, 3))
    assert not torch.equal(other["pixel_values"], mixed["pixel_values"])


def test_the_loss_of_mixed_images_is_that_of_both_classes():
    model = tiny_vit().eval()
    labels = torch.tensor([[0.0, 3.0, 0.25], [4.0, 1.0, 0.5]])
    found = augmentation.loss_of(model, {"pixel_values": images(2), "labels": labels})
    logits = model(pixel_values=images(2)).logits
    targets = torch.zeros(2, logits.shape[1])
    targets[0, 0], targets[0, 3], targets[1, 4], targets[1, 1] = 0.75, 0.25, 0.5, 0.5
    assert torch.allclose(found, F.cross_entropy(logits, targets))
    plain = {"pixel_values": images(2), "labels": torch.tensor([0, 4])}
    assert torch.equal(augmentation.loss_of(model, plain), model(**plain).loss)


@needs_kornia
def test_the_shares_of_mixed_batches():
    batch = {"pixel_values": images(2), "labels": torch.arange(2)}
    kinds = [augmentation.mix(batch, 0.3, 0.3, (step,))["labels"].dim() for step in range(60)]
    assert 20 < kinds.count(2) < 50 and kinds.count(1) > 10


@needs_kornia
def test_images_are_augmented_in_training_alone(model_folder, source):
    plain, strong = (
        experiment.Experiment(Classification(), options_for(model_folder, rand_augment=m), accelerator(), source)
        for m in (None, 9)
    )
    state = torch.get_rng_state()
    pairs = [[next(iter(run.loaders(0)[k]))["pixel_values"] for run in (plain, strong)] for k in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert pairs[0][0].shape == pairs[0][1].shape and not torch.equal(*pairs[0]) and torch.equal(*pairs[1])
    assert torch.equal(next(iter(strong.loaders(0)[0]))["pixel_values"], pairs[0][1])


def test_segmentation_has_no_flags_for_what_it_cannot_do():
    from lbp_peft.loading.options import parse

    with pytest.raises(SystemExit):
        parse(Segmentation.options, Segmentation.defaults, "", ["--mixup", "0.5"])


# Scores of classes and the remaining time


def test_scores_of_classes_against_counts_by_hand():
    predictions, labels = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 0, -100])
    counts = confusion_matrix(predictions, labels, 3)
    assert counts.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    scores = per_class_scores(counts)
    assert scores["recall"] == pytest.approx([1 / 2, 2 / 3, 0]) and scores["precision"] == pytest.approx(
        [1 / 2, 2 / 3, 0]
    )
    assert scores["f1"] == pytest.approx([1 / 2, 2 / 3, 0]) and scores["iou"] == pytest.approx([1 / 3, 2 / 4, 0])
    assert scores["count"] == [2, 3, 0]


def test_the_remaining_time_of_all_runs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(remaining.time, "monotonic", lambda: clock[0])
    left = remaining.Remaining(runs=4)
    left.skip()  # another process has finished it
    left.begin(0.5)  # and half of this one
    assert left.seconds() is None and left.shown() == []
    clock[0] = 10.0
    left.at(0.75)  # a quarter of a run in 10 s; 2.25 runs to come
    assert left.seconds() == pytest.approx(90) and left.shown() == ["run 2/4, 01:30 left in all"]
    left.end()
    left.begin(0.0)
    clock[0] = 20.0
    assert left.seconds() == pytest.approx(80)
    assert remaining.Remaining(runs=1).shown() == []


def test_the_progress_bar_shows_loss_scores_and_remaining_time():
    run = training.Run("", None, 4, 1e-3)
    run.remaining.runs = 2
    progress = training.Progress(epoch=1, batch=2, loss=3.0, history=history(0.25))
    run.remaining.at(0.5)
    text = training.shown(progress, run)
    assert text.startswith("loss=1.500, val=25.0 %, test=50.0 %, run 1/2, ") and text.endswith("left in all")
