"""The options of the example programs: what a user may mistype, and where the results go."""

import dataclasses
import re
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the examples need datasets")
pytest.importorskip("evaluate", reason="the examples need evaluate")

from benchmarks import gradient_fidelity
from common.classification import Classification, ClassificationOptions
from common.experiment import prepare_output
from common.methods import chosen_methods
from common.options import Options
from common.outputs import default_output, output_folder, write_somewhere
from common.segmentation import Segmentation, SegmentationOptions
from common.tables import aligned

from lbp_peft.loading.options import Parser, parse
from lbp_peft.loading.terminal import plain_messages

KINDS = [ClassificationOptions, SegmentationOptions, gradient_fidelity.FidelityOptions]
OWN = ["--model", "m", "--dataset", "d"]


def read(*flags):
    return parse(ClassificationOptions, Classification.defaults, "", [*OWN, *flags])


def refusal(capsys, *flags):
    """The line that says what is wrong with the flags."""
    with pytest.raises(SystemExit) as stop:
        read(*flags)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("name", [
    "epochs", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "r", "lora_r", "lora_alpha", "block_size",
    "learning_rate", "lora_learning_rate", "held_out", "min_crop", "image_size", "test_images", "train_images",
    "train_images_per_class", "timing_rounds", "checkpoint_every", "max_grad_norm", "patience", "ema_decay",
    "rand_augment",
])  # fmt: skip
def test_zero_is_refused_where_it_makes_no_sense(name, capsys):
    assert f"--{name} must be" in refusal(capsys, f"--{name}", "0")


@pytest.mark.parametrize("flags, expected", [
    (["--epochs", "-3"], "--epochs must be at least 1, not -3"),
    (["--workers", "-1"], "--workers must be at least 0"),
    (["--seeds", "0", "-1"], "--seeds must be from 0"),
    (["--seeds", "1", "1"], "--seeds must differ"),
    (["--learning_rate", "nan"], "--learning_rate must be a number above 0"),
    (["--weight_decay", "inf"], "--weight_decay must be"),
    (["--warmup_ratio", "1.5"], "--warmup_ratio must be from 0 to 1"),
    (["--image_size", "1", "2", "3"], "one side or two"),
    (["--epochs", "many"], "invalid int value: 'many'"),
    (["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
    (["--resume", "--overwrite"], "give one of the two"),
    (["--metric_options", "macro"], "NAME=VALUE"),
    (["--methods", "full", "full"], "--methods must differ"),
    (["--test_files", "x.parquet"], "--test_files needs --train_files"),
    (["--test_split", "train"], "would test on the training images"),
    (["--train_images", "5", "--train_images_per_class", "5"], "not both"),
    (["--ema_decay", "2"], "--ema_decay must be above 0 and below 1, not 2"),
    (["--ema_decay", "nan"], "--ema_decay must be above 0 and below 1"),
    (["--patience", "1.5"], "invalid int value: '1.5'"),
    (["--rand_augment", "30"], "--rand_augment must be from 1 to 29, not 30"),
    (["--mixup", "-1"], "--mixup must be from 0 to 1, not -1"),
    (["--cutmix", "1.5"], "--cutmix must be from 0 to 1, not 1.5"),
    (["--mixup", "0.6", "--cutmix", "0.6"], "--mixup and --cutmix are shares of the same batches"),
    (["--validation_split", "val"], "only with --keep_best or --patience"),
    (["--validation_spilt", "val"], "did you mean --validation_split?"),
    (["stray"], "unexpected argument 'stray'"),
    (["--learning-rat", "1"], "unknown flag --learning-rat: did you mean --learning_rate?"),
])  # fmt: skip
def test_mistakes_in_flags(flags, expected, capsys):
    assert expected in refusal(capsys, *flags)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_flag_is_abbreviated(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    for name in names:
        if name[:-1] not in names:
            with pytest.raises(ValueError, match="unknown flag"):
                Parser(kind).options([f"--{name[:-1]}", "1"])


def test_benchmarks_take_no_abbreviated_flags_either():
    for program in (Path(__file__).parents[2] / "examples").rglob("*.py"):
        for call in re.findall(r"ArgumentParser\(.*?\)", program.read_text(), re.DOTALL):
            if not call.startswith("ArgumentParser):"):
                assert "allow_abbrev=False" in call, program


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_help_says_one_default_for_each_flag(kind):
    text = Parser(kind, prog="program").format_help()
    parts = re.split(r"\n  (?=--)", text[text.index("\noptions:") :])[1:]
    assert len(parts) >= len(dataclasses.fields(kind))
    for part in parts:
        expected = 0 if part.startswith("--no_") else 1
        assert len(re.findall(r"\(\s*default:", part)) == expected, part
    assert "None)" not in text and not re.search(r"default:\s+\)", text)


@pytest.mark.parametrize("content, expected", [
    ("- epochs\n", "must hold options as `name: value`, one a line, not a list"),
    ("epochs\n", "not a str"),
    ("epochs: 3\n  batch_size: 2\n", "line 2: not valid YAML"),
    ("epoch: 3\n", "unknown option epoch: did you mean epochs?"),
    ("3: 4\n", "unknown option 3"),
    ("batch_size: 4\nepochs: 0\n", "epochs: --epochs must be at least 1, not 0"),
    ("patience: 0\n", "patience: --patience must be at least 1, not 0"),
    ("mixup: -1\n", "mixup: --mixup must be from 0 to 1, not -1"),
    ("epochs: many\n", "epochs: invalid int value: 'many'"),
    ("epochs: true\n", "epochs: invalid int value: 'True'"),
    ("epochs: [1, 2]\n", "epochs: unexpected argument '2'"),
    ("horizontal_flip: perhaps\n", "horizontal_flip: Truthy value expected"),
    ("output: {a: b}\n", "output: must be a plain value or a list"),
    ("methods: [lbp-wht: r=3]\n", "methods: must be a plain value or a list"),
    ("config: other.yaml\n", "config: a file of options cannot name another"),
])  # fmt: skip
def test_mistakes_in_a_file_of_options(content, expected, tmp_path, capsys):
    file = tmp_path / "my.yaml"
    file.write_text(content)
    line = refusal(capsys, "--config", str(file))
    assert str(file) in line and expected in line


def test_options_that_depend_on_each_other_are_read_from_any_place(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("validation_split: val\ntest_split: train\nmixup: 0.6\ncutmix: 0.6\n")
    found = read("--config", str(file), "--patience", "2", "--train_split", "other", "--cutmix", "0.1")
    assert found.validation_split == "val" and found.needs_validation and not Options().needs_validation


def test_validation_splits_are_of_data_sets(capsys):
    with pytest.raises(SystemExit):
        parse(ClassificationOptions, Classification.defaults, "", ["--keep_best", "--validation_split", "val"])
    assert "names a split of --dataset" in capsys.readouterr().err


def test_fewer_images_than_the_embedded_example_takes():
    """The embedded example's own option of the same kind does not count as the user's."""
    assert parse(ClassificationOptions, Classification.defaults, "", ["--train_images", "5"]).train_images == 5


def test_files_of_options_that_cannot_be_read(tmp_path, capsys):
    assert "No such file" in refusal(capsys, "--config", str(tmp_path / "none.yaml"))
    assert "cannot be read" in refusal(capsys, "--config", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a text file" in refusal(capsys, "--config", str(tmp_path / "binary"))


def test_flags_win_over_the_file_and_the_file_over_the_embedded_example(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("epochs: 3\nlora-r: 4\nseeds: [1, 2]\nimage_size: 64\nmodel:\n")
    found = read("--config", str(file), "--epochs", "5")
    assert (found.epochs, found.lora_r, found.seeds, found.image_size) == (5, 4, [1, 2], [64])
    embedded = parse(ClassificationOptions, Classification.defaults, "", ["--config", str(file)])
    assert embedded.embedded and (embedded.epochs, embedded.batch_size) == (3, 25)


@pytest.mark.parametrize("text, expected", [
    ("foo", "unknown method 'foo'"),
    ("lbp-wht:r", "cannot read 'r'"),
    ("lbp-wht:epochs=3", "cannot read 'epochs=3'"),  # all methods train for the same time
    ("lbp-wht:horizontal_flip=false", "cannot read"),
    ("lbp-wht:r=x", "r must be of type int"),
    ("lbp-wht:r=0", "--r must be at least 1"),
    ("lbp-wht:grad_input_rank=x", "grad_input_rank must be of type int"),
    ("lbp-wht:grad_input_rank=0", "--grad_input_rank must be at least 1"),
    ("lbp-wht:grad_input=10", "cannot read 'grad_input=10': a method takes.*grad_input_rank"),
    ("lbp-wht:r=100", "r must be an int from 1 to"),
    ("lbp-wht:selection=foo", "selection must be one of"),
    ("lora+lbp-wht:grad_input_dtype=foo", "grad_input_dtype must be one of"),
    ("lbp-wht:block_size=3", "power of two"),
])  # fmt: skip
def test_mistakes_in_methods(text, expected):
    with pytest.raises(SystemExit, match=expected):
        chosen_methods(Options(methods=[text]))


def test_a_method_may_have_its_own_input_gradients():
    texts = ["lbp-wht", "lbp-wht:grad_input_rank=3,grad_input_dtype=int8", "lbp-wht:grad_input_rank=none"]
    labels, configs = [], []
    for method in chosen_methods(Options(methods=texts, grad_input_rank=6)):
        labels.append(method.label)
        configs.append(method.config(["head"]))
    assert [config.grad_input_rank for config in configs] == [6, 3, None]
    assert [config.grad_input_dtype for config in configs] == ["auto", "int8", "auto"]
    assert labels == [
        "LBP-WHT r=10, grad_input_rank=6", "LBP-WHT r=10, grad_input_rank=3, grad_input_dtype=int8", "LBP-WHT r=10",
    ]  # fmt: skip


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    output = tmp_path / "out"
    options = Options(output=str(output))
    assert output_folder(options, Path("unused")) == output  # it is not there
    output.mkdir()
    (output / "options.yaml").write_text("")  # of a run that trained nothing
    assert output_folder(options, Path("unused")) == output
    (output / "table.txt").write_text("")
    with pytest.raises(SystemExit, match="--resume .* --overwrite"):
        output_folder(options, Path("unused"))
    for flag in ("resume", "overwrite"):
        assert output_folder(dataclasses.replace(options, **{flag: True}), Path("unused")) == output
    for inside in ("table.txt", "table.txt/deeper"):
        with pytest.raises(SystemExit, match="is a file"):
            output_folder(Options(output=str(output / inside)), Path("unused"))


def test_without_a_name_every_run_has_a_folder_of_its_own(tmp_path):
    default = tmp_path / "digits"
    for expected in ("digits", "digits-2", "digits-3"):
        found = output_folder(Options(), default)
        assert found == tmp_path / expected
        found.mkdir()
        (found / "table.txt").write_text("")
    assert output_folder(Options(resume=True), default) == output_folder(Options(overwrite=True), default) == found
    assert default_output(Classification(), ClassificationOptions()) == Path("runs/digits")
    assert default_output(Segmentation(), SegmentationOptions(model="m")) == Path("runs/semantic_segmentation")


def test_a_run_that_is_not_there_to_be_resumed_is_said_to_start(tmp_path, capsys):
    prepare_output(Options(output=str(tmp_path / "mistyped"), resume=True), [])
    assert "There is no run in" in capsys.readouterr().out


def test_results_that_cannot_be_written_go_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full = tmp_path / "lbp-wht" / "seed-0"

    def write(folder):
        if folder == full:
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        (folder / "adapter").write_text("trained")

    other = write_somewhere(write, full)
    assert other != full and (other / "adapter").read_text() == "trained"
    assert str(other) in capsys.readouterr().err
    assert write_somewhere(write, other) == other

    def never(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="nor could another place"):
        write_somewhere(never, full)
    with pytest.raises(ZeroDivisionError):  # not a fault of the disk
        write_somewhere(lambda folder: 1 / 0, full)


def test_messages_have_one_line(capsys):
    with pytest.raises(SystemExit, match="^a mistake$"), plain_messages():
        raise SystemExit("a\n  mistake")
    with pytest.raises(SystemExit, match="No space left"), plain_messages():
        raise OSError(28, "No space left on device", "somewhere")
    with pytest.raises(SystemExit) as stop, plain_messages():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError), plain_messages():  # a fault of the program is not hidden
        _ = 1 / 0


def test_warnings_stand_on_lines_of_their_own(capsys):
    with plain_messages():
        for _ in range(2):
            warnings.warn("layers\nare narrow", stacklevel=1)
            warnings.warn("will be removed in v6", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "Warning: layers are narrow\n"


def test_tables_are_at_most_120_columns_wide():
    header = ["method", "trainable", "accuracy", "step time", "saved activations", "backward mult-adds"]
    cells = ["1.36 M", "78.5 % ± 2.0", "1.00 x", "59.9 MiB", "4.63 G"]
    label = "LoRA r=8 + LBP-WHT r=10, grad_input_rank=10, compress_activations=all, learning_rate=1e-3"
    for rows in ([["full", *cells]], [["full", *cells], [label, *cells]], [[label + ", more" * 20, *cells]]):
        text = aligned(header, rows)
        assert max(map(len, text.splitlines())) <= 120
        assert text.count("78.5 % ± 2.0") == len(rows)
    assert label in aligned(header, [[label, *cells]])
    many = ["method", *(f"column number {index}" for index in range(14))]
    assert max(map(len, aligned(many, [["full", *["0.1"] * 14]]).splitlines())) <= 120


def test_gradient_fidelity_takes_the_data_arguments_of_the_programs(monkeypatch):
    shared = {field.name for field in dataclasses.fields(ClassificationOptions)}
    own = {field.name for field in dataclasses.fields(gradient_fidelity.FidelityOptions)}
    data = {
        "model", "dataset", "dataset_config", "train_files", "test_files", "train_split", "test_split", "held_out",
        "image_column", "label_column", "image_size", "data_seed", "train_images_per_class", "skip_broken",
    }  # fmt: skip
    assert data <= own & shared
    monkeypatch.setattr(sys, "argv", ["gradient_fidelity.py"])
    with pytest.raises(SystemExit):
        gradient_fidelity.main(["--model", "m", "--dataset", "d", "--settings", "r=0"])
