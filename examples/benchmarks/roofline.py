"""Calculates the roofline of a layer's training step on GPUs: operations, bytes and launches. Nothing is measured.

    python examples/benchmarks/roofline.py
    python examples/benchmarks/roofline.py --batch-size 8 --tokens 257 --width 1024 --kept 49

Each way to train a linear layer is described by the kernels that this package and PyTorch launch in eager mode under
bf16 autocast, with float32 weights. A kernel takes the time of its multiply-adds or of its bytes, whichever is longer.
Every operand is read once from memory, and every result is written there once; small tensors stay in the cache and are
faster. A step takes the sum over its kernels on the GPU, and on the CPU the number of launches times the time of one.

The rates are those of data sheets (dense, without sparsity). Real products reach two thirds to nine tenths of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tables import aligned

LAUNCH_US = 5.0  # of one kernel by PyTorch in eager mode
LORA_RANK = 8


@dataclass(frozen=True)
class Gpu:
    """The rates of a GPU according to its data sheet.

    Attributes:
        multiply_adds: Multiply-adds per second, of bf16 values summed in float32.
        bytes: Bytes per second, from or to its memory.
    """

    multiply_adds: float
    bytes: float


GPUS = {"H100 SXM": Gpu(989e12 / 2, 3.35e12), "RTX 4090": Gpu(165e12 / 2, 1.008e12)}


@dataclass(frozen=True)
class Kernel:
    """One launch of a kernel.

    Attributes:
        bytes: The bytes that it reads and writes.
        multiply_adds: The multiply-adds, if it is a matrix product; otherwise 0.
    """

    bytes: float
    multiply_adds: float = 0

    def seconds(self, gpu: Gpu) -> float:
        return max(self.bytes / gpu.bytes, self.multiply_adds / gpu.multiply_adds)


@dataclass(frozen=True)
class Layer:
    """A linear layer and its input.

    Attributes:
        images: N.
        tokens: L, the number of tokens of each image.
        kept: k, the number of coefficients that a projection keeps of them.
        inputs, outputs: C_in and C_out.
    """

    images: int
    tokens: int
    kept: int
    inputs: int
    outputs: int

    @property
    def rows(self) -> int:
        return self.images * self.tokens


Kernels = tuple[list[Kernel], list[Kernel]]  # of the forward pass, and of the backward pass


def product(rows: int, inner: int, columns: int) -> Kernel:
    """The product of matrices (rows, inner) and (inner, columns) in bf16."""
    return Kernel(2 * (rows * inner + inner * columns + rows * columns), rows * inner * columns)


def over(elements: int, read: float, written: float) -> Kernel:
    """A kernel that reads and writes so many bytes for each element."""
    return Kernel(elements * (read + written))


def cast(layer: Layer) -> Kernel:
    return over(layer.inputs * layer.outputs, 4, 2)


def forward(layer: Layer) -> list[Kernel]:
    return [cast(layer), product(layer.rows, layer.inputs, layer.outputs)]


def projection(layer: Layer, features: int) -> Kernel:
    """The projection of the tokens of all images to k rows each, or the lifting of these."""
    moved = 2 * layer.images * (layer.tokens + layer.kept) * features
    return Kernel(moved, layer.images * layer.kept * layer.tokens * features)


def exact_dx(layer: Layer) -> Kernel:
    return product(layer.rows, layer.outputs, layer.inputs)


def full(layer: Layer) -> Kernels:
    weight = layer.inputs * layer.outputs
    gradient = [product(layer.outputs, layer.rows, layer.inputs), over(weight, 2, 4)]
    return forward(layer), [exact_dx(layer), *gradient, over(layer.rows * layer.outputs, 2, 0)]


def lora(layer: Layer) -> Kernels:
    m, r, y = layer.rows, LORA_RANK, layer.rows * layer.outputs
    branch = [product(m, layer.inputs, r), product(m, r, layer.outputs), over(y, 2, 2), over(y, 4, 2)]
    backward = [over(y, 2, 2), product(layer.outputs, m, r), product(m, layer.outputs, r), product(r, m, layer.inputs)]
    of_x = [product(m, r, layer.inputs), exact_dx(layer), over(m * layer.inputs, 4, 2)]
    return [*forward(layer), *branch], [*backward, *of_x]


def low_rank(layer: Layer, exact: bool) -> Kernels:
    k = layer.images * layer.kept
    first = [*forward(layer), projection(layer, layer.inputs)]
    back = [projection(layer, layer.outputs), product(layer.outputs, k, layer.inputs), cast(layer)]
    back += [over(layer.inputs * layer.outputs, 2, 4), over(k * layer.outputs, 2, 0)]
    lifted = [product(k, layer.outputs, layer.inputs), projection(layer, layer.inputs)]
    return first, [*back, *([exact_dx(layer)] if exact else lifted)]


def adaptive(layer: Layer, rank: int) -> Kernels:
    first, back = low_rank(layer, exact=False)
    own = Layer(layer.images, layer.tokens, rank, layer.inputs, layer.outputs)
    fit = [projection(own, layer.outputs)] * 3  # the sketch, the patterns, the coefficients
    fit += [over(layer.images * rank * layer.tokens, 8, 8)] * 4  # orthonormal rows, in float64
    of_x = [product(layer.images * rank, layer.outputs, layer.inputs), projection(own, layer.inputs)]
    return first, [*back[:-2], *fit, *of_x]


def lora_low_rank(layer: Layer) -> Kernels:
    k, r = layer.images * layer.kept, LORA_RANK
    weight = layer.inputs * layer.outputs
    summed = [Kernel(8 * weight, weight * r), over(weight, 4, 2)]
    first = [*summed, product(layer.rows, layer.inputs, layer.outputs), projection(layer, layer.inputs)]
    factors = [product(k, layer.outputs, r), product(r, k, layer.inputs)]
    factors += [product(k, layer.inputs, r), product(layer.outputs, k, r)]
    return first, [projection(layer, layer.outputs), *factors, *summed, exact_dx(layer)]


WAYS: dict[str, Callable[[Layer], Kernels]] = {
    "full fine-tuning": full,
    "LoRA": lora,
    "LBP-WHT": lambda layer: low_rank(layer, exact=True),
    "LBP-WHT, adaptive dx of rank 24": lambda layer: adaptive(layer, 24),
    "LBP-WHT, paper's setting": lambda layer: low_rank(layer, exact=False),
    "LoRA + LBP-WHT": lora_low_rank,
}


def rows(layers: dict[str, list[Layer]]) -> list[list[str]]:
    """The rows of the table: each way to train each group of layers, whose layers run one after another."""
    found = []
    for name, group in layers.items():
        for way, kernels in WAYS.items():
            of_layers = [kernels(layer) for layer in group]
            passes = [[kernel for one in of_layers for kernel in one[which]] for which in (0, 1)]
            both = [*passes[0], *passes[1]]
            macs, moved = sum(kernel.multiply_adds for kernel in both), sum(kernel.bytes for kernel in both)
            line = [name, way, f"{macs / 1e9:.1f}", f"{moved / 1e6:.0f}", "{} + {}".format(*map(len, passes))]
            for gpu in GPUS.values():
                times = [1e6 * sum(kernel.seconds(gpu) for kernel in one) for one in passes]
                line += ["{:.0f} + {:.0f}".format(*times)]
            found.append([*line, f"{LAUNCH_US * len(both):.0f}"])
    return found


HEADER = ["layer", "way", "G MACs", "MB", "launches", *(f"{name}, us" for name in GPUS), "launching, us"]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=197, help="L of an image")
    parser.add_argument(
        "--kept", type=int, default=41, help="k of them, here those of r=10 on 14 x 14 patches and [CLS]"
    )
    parser.add_argument("--width", type=int, default=768, help="features; the MLP has four times as many")
    return parser.parse_args(arguments)


def rows_of(options: argparse.Namespace) -> list[list[str]]:
    """The rows of the table for layers of these sizes."""
    sizes = options.batch_size, options.tokens, options.kept
    width = options.width
    square, fc1, fc2 = (
        Layer(*sizes, *features) for features in ((width, width), (width, 4 * width), (4 * width, width))
    )
    layers = {"q, k, v or out": [square], "fc1": [fc1], "fc2": [fc2], "all of a block": [*[square] * 4, fc1, fc2]}
    return rows(layers)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    print("Worked out from data sheets, not measured; forward + backward.")
    print(aligned(HEADER, rows_of(options)))


if __name__ == "__main__":
    main()
