"""Compares ways to fit the basis of an adaptive input gradient with the one that the package uses, on real images.

    python examples/benchmarks/adaptive_variants.py --model dinov2-small-saliency --train-files cifar100/train.parquet

The package fits a basis Q to the gradient g of each layer, from a sketch by random signs and the Q of the layer behind
(lbp_peft/ops/adaptive.py). The variants sketch in another way, fit less often, scale the result, or give some blocks
another rank. The table has the cosines of gradient_fidelity.py, the number of fits in one backward pass, and their
time. With the default, `--r 64` at 112 px, weight gradients are exact, so that only input gradients matter.

The variants that share one Q between layers assume the layers of a ViT: the gradient of fc1 is wider than all others.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.models import head_modules

from benchmarks.gradient_fidelity import OneBatch, cosine, gradients, least
from benchmarks.real_images import experiment_for, file_for_record
from benchmarks.tables import aligned
from lbp_peft import LBPWHTConfig, exact_backward, heuristics
from lbp_peft.bases.walsh import basis_order, walsh_functions
from lbp_peft.encoder import encoder_linears
from lbp_peft.environment import environment, in_words, write_record
from lbp_peft.heuristics import Heuristics
from lbp_peft.loading.options import option, parse
from lbp_peft.loading.terminal import plain_messages
from lbp_peft.measure.timing import now
from lbp_peft.ops import adaptive
from lbp_peft.ops.adaptive import RangeFinder

Fit = Callable[[RangeFinder, Tensor], tuple[Tensor, Tensor]]  # as RangeFinder._fit
AS_BUILT: Fit = RangeFinder._fit


def fitted(g: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Q (N, k, L) and Q g (N, k, C) for g (N, L, C) and its sketch Z (N, k, C)."""
    basis = adaptive.orthonormal_rows(adaptive._patterns_of(sketch, g)).to(g.dtype)
    return basis, torch.bmm(basis, g)


def signs(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
    return fitted(g, torch.matmul(adaptive.sign_matrix(finder.rank, g.shape[1], g.dtype, g.device), g))


def gaussian(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
    omega = torch.randn(finder.rank, g.shape[1], generator=torch.Generator().manual_seed(0), dtype=g.dtype)
    return fitted(g, torch.matmul(omega.to(g.device), g))


def walsh(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
    """A sketch by the first Walsh functions of the grid, whose sides are powers of two."""
    assert finder.layout is not None
    rows, columns = (walsh_functions(side) for side in finder.layout.grid)
    pairs = basis_order("lp_l1", range(len(rows)), range(len(columns)))[: finder.rank]
    omega = np.stack([np.outer(rows[i], columns[j]).ravel() for i, j in pairs])
    return fitted(g, torch.matmul(torch.from_numpy(omega).to(g), g))


def in_bfloat16(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
    """The sketch and the patterns from factors in bfloat16."""
    narrow = g.bfloat16()
    omega = adaptive.sign_matrix(finder.rank, g.shape[1], g.dtype, g.device).bfloat16()
    sketch = torch.matmul(omega, narrow)
    basis = adaptive.orthonormal_rows(torch.bmm(sketch / sketch.abs().amax((1, 2), keepdim=True), narrow.mT)).to(g)
    return basis, torch.bmm(basis, g)


def singular_vectors(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
    """The best basis of each layer by itself."""
    basis = torch.linalg.svd(g, full_matrices=False)[0][:, :, : finder.rank].mT.contiguous()
    return basis, torch.bmm(basis, g)


def scaled(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
    """As built, with Q g scaled to the norm of g in each image."""
    basis, coefficients = AS_BUILT(finder, g)
    lengths = coefficients.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return basis, coefficients * (g.norm(dim=(1, 2), keepdim=True) / lengths)


class Shared:
    """As built, but some layers take the Q of the layer behind them in place of a fit.

    Args:
        reuses: From the number of layers since the last fc1 in the backward pass, fc1 itself being 0, to whether this
            layer takes the last Q. The order is fc2, fc1, output, value, key, query: 5, 0, 1, 2, 3, 4.
    """

    def __init__(self, reuses: Callable[[int], bool]):
        self.reuses, self.last, self.since = reuses, None, -1

    def __call__(self, finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
        is_fc1 = self.last is not None and g.shape[2] > self.width
        self.since = 0 if is_fc1 else self.since + 1
        self.width = g.shape[2] if self.last is None else min(self.width, g.shape[2])
        if self.last is not None and self.reuses(self.since):
            return self.last, torch.bmm(self.last, g)
        self.last, coefficients = AS_BUILT(finder, g)
        return self.last, coefficients


def exact_at_the_end(block: int, blocks: int, rank: int) -> int | None:
    return None if block >= blocks - 2 else rank


def more_at_first(block: int, blocks: int, rank: int) -> int:
    """4/3 of the rank in the first third of the blocks, and 5/6 in the others, so that the mean is the rank."""
    return 4 * rank // 3 if block < blocks // 3 else 5 * rank // 6


def more_at_last(block: int, blocks: int, rank: int) -> int:
    return more_at_first(blocks - 1 - block, blocks, rank)


@dataclass(frozen=True)
class Variant:
    """A way to fit, and the ranks of the blocks.

    Attributes:
        name: In the table.
        make: Makes the function that fits, for one backward pass.
        rank_of_block: From the index of a block, the number of blocks and the rank of the options to the block's rank;
            None: its input gradients are exact.
        energy: `grad_input_energy`.
    """

    name: str
    make: Callable[[], Fit] = field(default=lambda: AS_BUILT)
    rank_of_block: Callable[[int, int, int], int | None] = field(default=lambda block, blocks, rank: rank)
    energy: float | None = None


VARIANTS = (
    Variant("as built: the Q of the layer behind and signs"),
    Variant("signs alone", lambda: signs),
    Variant("Gaussian numbers alone", lambda: gaussian),
    Variant("Walsh functions alone", lambda: walsh),
    Variant("signs alone, sketch in bfloat16", lambda: in_bfloat16),
    Variant("singular vectors of each layer", lambda: singular_vectors),
    Variant("as built, Q g scaled to the norm of g", lambda: scaled),
    Variant("one Q for query, key and value", lambda: Shared(lambda since: since in (3, 4))),
    Variant("one Q for both layers of the MLP", lambda: Shared(lambda since: since == 0)),
    Variant("both of these", lambda: Shared(lambda since: since in (0, 3, 4))),
    Variant("a fit in every second layer", lambda: Shared(lambda since: since in (0, 2, 4))),
    Variant("exact in the last two blocks", rank_of_block=exact_at_the_end),
    Variant("a higher rank in the first third", rank_of_block=more_at_first),
    Variant("a higher rank in the last third", rank_of_block=more_at_last),
    *(Variant(f"`grad_input_energy={energy}`", energy=energy) for energy in (0.95, 0.9, 0.8)),
)


@dataclass
class Fits:
    """The number of fits in a backward pass, and their time."""

    count: int = 0
    seconds: float = 0.0


@contextmanager
def using(fit: Fit) -> Iterator[Fits]:
    """Fit in another way within the block, and count and time the fits, among which a Q that is taken over is none."""
    fits, original = Fits(), RangeFinder._fit
    orthonormal_rows, svd = adaptive.orthonormal_rows, torch.linalg.svd

    def counted(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        fits.count += 1
        return function(*given, **more)

    def timed(finder: RangeFinder, g: Tensor) -> tuple[Tensor, Tensor]:
        start = now()
        found = fit(finder, g)
        fits.seconds += now() - start
        return found

    RangeFinder._fit = timed  # type: ignore[method-assign]
    adaptive.orthonormal_rows, torch.linalg.svd = partial(counted, orthonormal_rows), partial(counted, svd)
    try:
        yield fits
    finally:
        RangeFinder._fit = original  # type: ignore[method-assign]
        adaptive.orthonormal_rows, torch.linalg.svd = orthonormal_rows, svd


class Always(Heuristics):
    """An adaptive basis in every layer, also where an exact input gradient would be faster."""

    def use_adaptive_basis(self, num_tokens: int, rank: int, out_features: int, in_features: int) -> bool:
        return True


def measured(
    base: nn.Module, batch: dict[str, Any], heads: list[str], variant: Variant, r: int, rank: int
) -> list[float]:
    """The cosines over all layers, in the first, the middle and the last block; the number of fits, and their ms."""
    names, blocks = encoder_linears(base), base.config.num_hidden_layers
    each = len(names) // blocks
    ranks = {re.escape(name): variant.rank_of_block(i // each, blocks, rank) for i, name in enumerate(names)}
    config = LBPWHTConfig(
        r=r, grad_input_basis="adaptive", grad_input_rank=rank, grad_input_rank_pattern=ranks,
        grad_input_energy=variant.energy, modules_to_save=heads,
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config).train()
    with exact_backward(model):
        exact = gradients(model, batch)
    with heuristics.using(Always()), using(variant.make()) as fits:
        found = gradients(model, batch)
    parts = [slice(block * each, (block + 1) * each) for block in (0, blocks // 2, blocks - 1)]
    cosines = [cosine(found, exact), *(least(found[part], exact[part]) for part in parts)]
    return [*cosines, fits.count, 1e3 * fits.seconds]


@dataclass
class VariantOptions(OneBatch):
    """The options: the model and the batch as in gradient_fidelity.py, and the ranks."""

    r: int = option(64, "Rank of the weight gradient. (default: all functions of a block, for exact ones)")
    rank: int = option(24, "Rank of the input gradient.")
    output: str = option("runs/benchmarks/adaptive-variants.json", "File for the figures.")


def main(arguments: list[str] | None = None) -> None:
    given = parse(VariantOptions, None, __doc__, arguments)
    file = file_for_record(given.output)
    experiment = experiment_for(given.for_experiment())
    batch = send_to_device(next(iter(experiment.loaders(seed=0)[0])), experiment.accelerator.device)
    base = experiment.base(seed=0).to(experiment.accelerator.device)
    heads = head_modules(base, experiment.options)
    rows = [
        [variant.name, *measured(base, batch, heads, variant, given.r, given.rank)]
        for variant in tqdm(VARIANTS, leave=False)
    ]
    where = environment()
    print(in_words(where))
    lines = []
    for name, *cosines, count, ms in rows:
        lines.append([name, *(f"{value:.4f}" for value in cosines), str(count), f"{ms:.0f}"])
    print(aligned(["variant", "all layers", "first block", "middle", "last", "fits", "ms"], lines))
    write_record(file, where, vars(given), rows=rows)
    print(f"written to {file}")


if __name__ == "__main__":
    with plain_messages():
        main()
