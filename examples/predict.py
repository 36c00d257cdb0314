"""Predict the classes of images, or of their pixels, with a model that an example program has trained.

    python examples/predict.py runs/digits/lbp-wht/seed-0/adapter image.png more_images/

The folder is that of an adapter (`adapter` or `stack`) or of a fully fine-tuned model. The program prints the likeliest
classes of each image. With a segmentation model it prints the share of each class, and writes the label map as a PNG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from common.adapters import Predictor, load, pixels
from PIL import Image
from torch.nn import functional as F

from lbp_peft.loading.datasources import images_in
from lbp_peft.loading.storedimages import open_image, why_unreadable
from lbp_peft.loading.terminal import in_one_line, plain_messages


def main(arguments: list[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The flags; None: those of the command line.

    Returns:
        The exit status, 1 if an image could not be read.
    """
    options = _parse(arguments)
    transformers.logging.disable_progress_bar()
    predictor = load(options.folder, options.base)
    files = list(_files(options.images))
    if not files:
        raise SystemExit(f"there are no images in {', '.join(map(str, options.images))}")
    found, failed = {}, 0
    for file in files:
        try:
            image = open_image({"path": str(file)})
        except Exception as error:  # Pillow's decoders raise exceptions of many types
            print(f"{file} cannot be used: {why_unreadable(error)}", file=sys.stderr)
            failed += 1
            continue
        found[str(file)] = _predict(predictor, image, file, options)
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found[str(file)].items())
        print(f"{file}: {shares}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {in_one_line(message)}\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of the adapter or the model")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--base", help="the base model, hub id or folder (default: the one it was trained on)")
    parser.add_argument("--top", type=int, default=3, help="how many classes to print (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the printed classes and their shares (default: none)")
    parser.add_argument(
        "--maps", type=Path, default=Path("predictions"), help="folder for label maps (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    if options.top < 1:
        parser.error("--top must be at least 1")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if missing := [str(path) for path in options.images if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    return options


def _files(paths: list[Path]) -> Iterator[Path]:
    """The files, and the images in folders."""
    for path in paths:
        yield from images_in(path) if path.is_dir() else [path]


@torch.no_grad()
def _predict(predictor: Predictor, image: Image.Image, file: Path, options: Any) -> dict[str, float]:
    """The most likely classes with their probabilities, or the most frequent ones with their shares of the pixels."""
    logits = predictor.model(pixel_values=pixels(predictor.processor, image), **predictor.arguments).logits
    if predictor.segments:
        size = image.height, image.width
        classes = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)[0]
        options.maps.mkdir(parents=True, exist_ok=True)
        kind = np.uint8 if len(predictor.names) <= 256 else np.uint16
        # The name contains the folder and the ending, so that no map overwrites another.
        name = "-".join(part for part in file.parts if part not in ("/", "..", ".")).removesuffix(".png") + ".png"
        Image.fromarray(classes.numpy().astype(kind)).save(options.maps / name)
        shares = torch.bincount(classes.flatten(), minlength=len(predictor.names)) / classes.numel()
    else:
        shares = logits.softmax(-1)[0]
    top = shares.topk(min(options.top, len(shares)))
    return {
        predictor.names[index]: share
        for share, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if share > 0
    }


if __name__ == "__main__":
    with plain_messages():
        sys.exit(main())
