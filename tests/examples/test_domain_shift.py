"""Training by day and testing at dusk, on a few random images in the layout of CamVid."""

import json

import domain_shift
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from domain_shift import DAY, DUSK, NOT_LABELLED, SEQUENCES, TRAINED_ON, Images
from PIL import Image as PILImage
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Each sequence has two images; the top half is sky, the bottom half road, and one row is not labelled."""
    short = {
        split: {name: range(2 * place, 2 * place + 2) for place, name in enumerate(sequences)}
        for split, sequences in SEQUENCES.items()
    }
    monkeypatch.setattr(domain_shift, "SEQUENCES", short)
    random = np.random.default_rng(0)
    label = np.zeros((30, 40), dtype=np.uint8)
    label[15:], label[14] = 3, NOT_LABELLED
    for split, sequences in short.items():
        count = 2 * len(sequences)
        noise = random.integers(0, 99, (count, 30, 40, 3))
        images = (noise + 100 * (label[..., None] == 0)).astype(np.uint8)
        columns = {
            "image": [PILImage.fromarray(image) for image in images],
            "label": [PILImage.fromarray(label)] * count,
        }
        Dataset.from_dict(columns, features=Features({"image": Image(), "label": Image()})).to_parquet(
            str(tmp_path / f"{split}.parquet")
        )
    return tmp_path


def test_no_sequence_is_both_trained_and_tested_on():
    of_training, tested = {name for _, name in TRAINED_ON}, {name for _, name in (*DAY, *DUSK)}
    assert not of_training & tested
    assert of_training | tested == {name for part in SEQUENCES.values() for name in part}
    assert [sum(map(len, part.values())) for part in SEQUENCES.values()] == [367, 233]


def test_images_come_small_and_label_maps_whole(data):
    files = {split: Dataset.from_parquet(str(data / f"{split}.parquet")) for split in SEQUENCES}
    images = Images(files, DUSK, (12, 16))
    assert len(images) == 4
    pixels, label = images[0]
    assert pixels.shape == (3, 12, 16) and label.shape == (30, 40) and label.unique().tolist() == [0, 3, NOT_LABELLED]


def test_the_program(data, tmp_path, capsys):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4)
    Dinov2Model(config).save_pretrained(tmp_path / "vit")
    output = tmp_path / "out.json"
    given = ["--data", data, "--model", tmp_path / "vit", "--output", output, "--size", 16, 24, "--epochs", 20]
    domain_shift.main([str(part) for part in [*given, "--batch-size", 4, "--learning-rate", 0.01, "--seeds", 0, 1]])
    assert "4 training images by day, tested on 2 by day and 4 at dusk" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert [(row["seed"], row["method"]) for row in rows] == [
        (seed, method) for seed in (0, 1) for method in domain_shift.METHODS
    ]
    assert rows[0]["trained"] == 33 * 11 < rows[1]["trained"] == rows[2]["trained"]
    for row in rows:  # both classes have been learned, at dusk as by day
        for part in ("day", "dusk"):
            right = sum(row[part][index][index] for index in range(len(domain_shift.CLASSES)))
            assert right > 0.8 * sum(map(sum, row[part]))
    with pytest.raises(SystemExit):
        domain_shift.main(["--data", str(tmp_path / "vit"), "--model", "any"])
    assert "there is no train.parquet" in capsys.readouterr().err
