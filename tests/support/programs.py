"""Random programs that rearrange tokens in ways that models do, and tokens that carry their own places as data.

The last channels of each token hold its row, column and image, and a one, all of which move with it through every
operation. So the true place of each token of a layer's input can be read from the data, independently of the package.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, OF_PLACES = 16, 4
SIZE = 32  # of the images, in pixels
_MOST_TOKENS = 600


def images_with_places(count: int, seed: int) -> Tensor:
    """Images (N, 4, H, W) whose channels are the row, the column, the number of the image, and noise."""
    places = torch.arange(float(SIZE), dtype=torch.float64)
    row, column = places[:, None].expand(SIZE, SIZE), places.expand(SIZE, SIZE)
    noise = torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([torch.stack([row, column, torch.full_like(row, i), noise[i]]) for i in range(count)])


def embedding(patch: tuple[int, int]) -> nn.Conv2d:
    """A layer that cuts images into patches, whose last channels are their mean places and a one."""
    cut = nn.Conv2d(4, CHANNELS, patch, patch, dtype=torch.float64)
    with torch.no_grad():
        cut.weight[:, :3] *= 0.05  # the places are large numbers
        cut.weight[-OF_PLACES:], cut.bias[-OF_PLACES:] = 0, 0
        for i in range(3):
            cut.weight[i - OF_PLACES, i] = 1 / (patch[0] * patch[1])
        cut.bias[-1] = 1
    return cut


def as_image(t: Tensor, h: int, w: int) -> Tensor:
    return t.transpose(1, 2).unflatten(2, (h, w))


def as_tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def windows(t: Tensor, h: int, w: int) -> Tensor:
    """(N, windows, tokens of a window, C) for 2 x 2 windows."""
    return t.reshape(len(t), 2, h // 2, 2, w // 2, t.shape[-1]).transpose(2, 3).flatten(1, 2).flatten(2, 3)


def _kept(t: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
    """A copy of tokens that a function has changed in place, with a gradient."""
    copy = t.detach().clone()
    function(copy)
    return copy + 0 * t.mean()


def _written(shape_of: Tensor, index: Any, value: Tensor) -> Tensor:
    result = torch.zeros_like(shape_of)
    result[index] = value
    return result


def _set_numpy(t: Tensor, table: Tensor) -> None:
    array = t.numpy()
    array[:] = array[:, table.numpy()]


def _rolled(h: int, w: int, down: int, across: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, _: t.unflatten(1, (h, w)).roll((down, across), (1, 2)).flatten(1, 2)


def _rotated(t: Tensor, h: int, w: int) -> Tensor:
    return torch.rot90(t.unflatten(1, (h, w)), 1, (1, 2)).flatten(1, 2)


def _mirrored(t: Tensor, h: int, w: int) -> Tensor:
    """The tokens of an image that is sampled at the places of its mirror image."""
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]], dtype=t.dtype).expand(len(t), 2, 3)
    places = F.affine_grid(mirror, [len(t), 1, h, w], align_corners=False)
    return as_tokens(F.grid_sample(as_image(t, h, w), places, align_corners=False))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(1)


# Operations on tokens (N, h * w, C) in row-by-row order: a function of the tokens and a table, and the new grid; None
# instead of the grid if the tokens are in another order afterwards.
ON_GRIDS: dict[str, Callable[[random.Random, int, int], tuple]] = {
    "roll": lambda rng, h, w: (_rolled(h, w, rng.randrange(h), rng.randrange(w)), (h, w)),
    "roll flat": lambda rng, h, w: (lambda t, table: t.roll(int(table[0]), 1), None),
    "flip": lambda rng, h, w: (lambda t, _: t.unflatten(1, (h, w)).flip(2).flatten(1, 2), (h, w)),
    "rotate": lambda rng, h, w: (lambda t, _: _rotated(t, h, w), (w, h)),
    "transpose": lambda rng, h, w: (lambda t, _: t.unflatten(1, (h, w)).transpose(1, 2).flatten(1, 2), (w, h)),
    "einsum": lambda rng, h, w: (
        lambda t, _: torch.einsum("nhwc->nwhc", t.unflatten(1, (h, w))).flatten(1, 2), (w, h)),
    "units": lambda rng, h, w: (
        lambda t, _: t.reshape(len(t), h // 2, 2, w // 2, 2, CHANNELS).permute(0, 2, 4, 1, 3, 5).flatten(1, 4), None),
    "windows": lambda rng, h, w: (lambda t, _: windows(t, h, w).flatten(0, 1), (h // 2, w // 2)),
    "windows in a row": lambda rng, h, w: (lambda t, _: windows(t, h, w).flatten(1, 2), None),
    "shifted windows": lambda rng, h, w: (
        lambda t, _: windows(t.unflatten(1, (h, w)).roll((-1, -2), (1, 2)).flatten(1, 2), h, w).flatten(0, 1),
        (h // 2, w // 2),
    ),
    "pad": lambda rng, h, w: (
        lambda t, _: F.pad(t.unflatten(1, (h, w)), (0, 0, 1, 0, 0, 2)).flatten(1, 2), (h + 2, w + 1)),
    "reflect": lambda rng, h, w: (lambda t, _: as_tokens(F.pad(as_image(t, h, w), (1, 1, 1, 0), "reflect")), None),
    "crop": lambda rng, h, w: (lambda t, _: t.unflatten(1, (h, w))[:, 1:, :-1].flatten(1, 2), (h - 1, w - 1)),
    "every other": lambda rng, h, w: (
        lambda t, _: t.unflatten(1, (h, w))[:, ::2, 1::2].flatten(1, 2), ((h + 1) // 2, w // 2)),
    "nearest": lambda rng, h, w: (
        lambda t, _: as_tokens(F.interpolate(as_image(t, h, w), scale_factor=2)), (2 * h, 2 * w)),
    "bilinear": lambda rng, h, w: (
        lambda t, _: as_tokens(F.interpolate(as_image(t, h, w), (h + 3, w + 1), mode="bilinear")), (h + 3, w + 1)),
    "resize flat": lambda rng, h, w: (lambda t, _: F.interpolate(t.mT, scale_factor=2, mode="linear").mT, None),
    "pool": lambda rng, h, w: (lambda t, _: as_tokens(F.avg_pool2d(as_image(t, h, w), 2)), (h // 2, w // 2)),
    "adaptive pool": lambda rng, h, w: (lambda t, _: as_tokens(F.adaptive_avg_pool2d(as_image(t, h, w), 3)), (3, 3)),
    "area": lambda rng, h, w: (
        lambda t, _: as_tokens(F.interpolate(as_image(t, h, w), (h // 2, w // 2), mode="area")), (h // 2, w // 2)),
    "grid sample": lambda rng, h, w: (lambda t, _: _mirrored(t, h, w), (h, w)),
    "quarters exchanged": lambda rng, h, w: (lambda t, _: _rolled(h, w, h // 2, w // 2)(t, t), (h, w)),
    "columns in turn": lambda rng, h, w: (
        lambda t, _: torch.cat([c.flip(1) if j % 2 else c for j, c in enumerate(t.unflatten(1, (h, w)).unbind(2))], 1),
        None,
    ),
    "shear": lambda rng, h, w: (
        lambda t, _: torch.cat([row.roll(i, 1) for i, row in enumerate(t.split(w, 1))], 1), None),
    "merge": lambda rng, h, w: (
        lambda t, _: as_tokens(F.pixel_unshuffle(as_image(t, h, w), 2).unflatten(1, (CHANNELS, 4)).mean(2)),
        (h // 2, w // 2),
    ),
    "pixel shuffle": lambda rng, h, w: (
        lambda t, _: as_tokens(F.pixel_shuffle(as_image(t, h, w).repeat_interleave(4, 1), 2)), (2 * h, 2 * w)),
    "unfold": lambda rng, h, w: (
        lambda t, _: F.unfold(as_image(t, h, w), 2, stride=2).unflatten(1, (CHANNELS, 4)).permute(0, 2, 3, 1)
        .flatten(0, 1), (h // 2, w // 2)),
    "halves flipped": lambda rng, h, w: (
        lambda t, _: torch.cat([half.flip(1) for half in t.unflatten(1, (h, w)).chunk(2, 1)], 1).flatten(1, 2), (h, w)),
    "halves side by side": lambda rng, h, w: (
        lambda t, _: torch.cat(t.unflatten(1, (h, w)).chunk(2, 1), 2).flatten(1, 2), (h // 2, 2 * w)),
    "rows in a fixed order": lambda rng, h, w: (
        lambda t, table: t.unflatten(1, (h, w))[:, table].flatten(1, 2), (h, w), h),
    "columns in a fixed order": lambda rng, h, w: (
        lambda t, table: t.unflatten(1, (h, w)).index_select(2, table).flatten(1, 2), (h, w), w),
    "strips": lambda rng, h, w: (lambda t, _: t.unflatten(1, (h, w)).flatten(0, 1), (1, w)),
    "boustrophedon": lambda rng, h, w: (
        lambda t, _: torch.cat([row.flip(1) if i % 2 else row for i, row in enumerate(t.split(w, 1))], 1), None),
    "last row first": lambda rng, h, w: (lambda t, _: torch.hstack(t.split(w, 1)[::-1]), (h, w)),
}  # fmt: skip

# Operations on any tokens (N, L, C), by the number of tokens: a function of the tokens and a table of that length.
ON_TOKENS: dict[str, Callable[[int], Callable[[Tensor, Tensor], Tensor]]] = {
    "index": lambda n: lambda t, table: t[:, table],
    "index of each image": lambda n: lambda t, table: t[torch.arange(len(t))[:, None], table],
    "list": lambda n: lambda t, table: t[:, list(range(n))[::-1]],
    "take along": lambda n: lambda t, table: torch.take_along_dim(t, table[None, :, None], 1),
    "gather": lambda n: lambda t, table: t.gather(1, table[None, :, None].expand(len(t), -1, t.shape[2])),
    "by data": lambda n: lambda t, table: t[:, t[0, :, 0].argsort()],
    "by chance": lambda n: lambda t, table: t[:, torch.randperm(n)],
    "out": lambda n: lambda t, table: _kept(t, lambda copy: torch.index_select(t.detach(), 1, table, out=copy)),
    "setitem": lambda n: lambda t, table: _written(t, (slice(None), table), t),
    "setitem under a view": lambda n: lambda t, table: _kept(t, lambda copy: copy[:].__setitem__((0, table), t[0])),
    "index copy": lambda n: lambda t, table: torch.zeros_like(t).index_copy(1, table, t),
    "index add": lambda n: lambda t, table: (t * 0).index_add(1, table, t),
    "scatter": lambda n: lambda t, table: t.clone().scatter_(1, table[None, :, None].expand(t.shape), t),
    "data": lambda n: lambda t, table: _kept(t, lambda copy: copy.data.copy_(copy[:, table].clone())),
    "set": lambda n: lambda t, table: _kept(t, lambda copy: copy.set_(copy[:, table])),
    "NumPy": lambda n: lambda t, table: _kept(t, lambda copy: _set_numpy(copy, table)),
    "DLPack": lambda n: lambda t, table: _kept(t, lambda copy: torch.from_dlpack(copy).copy_(copy[:, table].clone())),
    "parts from last to first": lambda n: lambda t, table: torch.cat(t.chunk(3, 1)[::-1], 1),
    "interleaved": lambda n: lambda t, table: torch.cat((t[:, ::2], t[:, 1::2]), 1),
    "unbound": lambda n: lambda t, table: torch.stack(t.unbind(1)[::-1], 1),
    "where": lambda n: lambda t, table: torch.where((torch.arange(n) % 3 == 0)[:, None], t.flip(1), t),
    "a factor": lambda n: lambda t, table: torch.eye(n, dtype=t.dtype)[table] @ t,
    "masked select": lambda n: (
        lambda t, table: t.masked_select((table % 2 == 0)[:, None].expand(t.shape)).view(len(t), -1, CHANNELS)
    ),
    "masks of each image": lambda n: (
        lambda t, table: t[torch.stack([table.roll(i) % 2 == 0 for i in range(len(t))])].view(len(t), -1, CHANNELS)
    ),
    "masked scatter": lambda n: lambda t, table: t.masked_scatter((table % 2 == 0)[:, None].expand(t.shape), t.flip(1)),
    "merged": lambda n: (
        lambda t, table: t[:, ::2].scatter_reduce(
            1, (table[: n // 2] // 2)[None, :, None].expand(len(t), -1, CHANNELS), 0 * t[:, 1 : n // 2 * 2 : 2], "sum"
        )
    ),
    "added to zeros": lambda n: lambda t, table: torch.zeros_like(t).index_add_(1, table, t),
    "sums of all before": lambda n: (
        lambda t, table: t.cumsum(1).diff(dim=1, prepend=torch.zeros_like(t[:, :1])).flip(1)
    ),
    "sorted and back": lambda n: (
        lambda t, table: (lambda order: t.gather(1, order.expand_as(t)).gather(1, order.argsort(1).expand_as(t)))(
            t[..., :1].argsort(1)
        )
    ),
    "highest first": lambda n: (
        lambda t, table: t.gather(1, t[..., :1].topk(n // 2, 1).indices.expand(-1, -1, CHANNELS))
    ),
    "Fourier": lambda n: lambda t, table: torch.fft.ifft(torch.fft.fft(t, dim=1).conj(), dim=1).real,
    "autograd function": lambda n: lambda t, table: _Reversed.apply(t),
    "embedding": lambda n: lambda t, table: torch.stack([F.embedding(table, one) for one in t]),
    "vmap": lambda n: lambda t, table: torch.vmap(lambda one: one[table])(t),
    "aten": lambda n: lambda t, table: torch.ops.aten.index_select(t, 1, table),
    "some": lambda n: lambda t, table: t[:, : n // 2],
    "learned before": lambda n: lambda t, table: F.pad(t, (0, 0, 2, 0)),
    "learned between": lambda n: lambda t, table: torch.cat((t[:, :4], torch.zeros_like(t[:, :1]), t[:, 4:]), 1),
    "twice": lambda n: lambda t, table: torch.cat((t, t.flip(1)), 1),
    "another scale": lambda n: lambda t, table: torch.cat((t, F.avg_pool1d(t.mT, 4).mT), 1),
    "some images": lambda n: lambda t, table: t[torch.randperm(len(t))[: len(t) // 2 + 1]],
    "images twice": lambda n: lambda t, table: torch.cat((t, t.flip(0))),
    "packed": lambda n: lambda t, table: t.flatten(0, 1)[None],
    "packed, of two sizes": lambda n: lambda t, table: torch.cat((t[0], t[-1, : n // 2]))[None],
    "packed, with a token each": lambda n: lambda t, table: F.pad(t, (0, 0, 1, 0)).flatten(0, 1)[None],
    "images exchanged": lambda n: lambda t, table: torch.cat((t[:, : n // 2], t.flip(0)[:, n // 2 :]), 1),
}

# How a layer is given tokens (N, L, C), and back. The others need a number of tokens that 4 divides.
PRESENTATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, torch.Size], Tensor]]] = {
    "plain": (lambda t: t, lambda t, s: t),
    "sequence first": (lambda t: t.transpose(0, 1), lambda t, s: t.transpose(0, 1)),
    "flattened": (lambda t: t.flatten(0, 1), lambda t, s: t.view(s)),
    "rows": (lambda t: t.unflatten(1, (-1, 4)), lambda t, s: t.flatten(1, 2)),
    "rows, images, columns": (
        lambda t: t.unflatten(1, (-1, 4)).transpose(0, 1), lambda t, s: t.transpose(0, 1).flatten(1, 2)),
    "columns before rows": (
        lambda t: t.unflatten(1, (-1, 4)).transpose(1, 2), lambda t, s: t.transpose(1, 2).flatten(1, 2)),
}  # fmt: skip


class Program(nn.Module):
    """A model of random operations, with layers among them that treat every token alike."""

    def __init__(self, seed: int):
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        patch = rng.choice([(4, 4), (4, 4), (4, 4), (2, 8), (8, 4)])
        self.cut, self.blocks = embedding(patch), nn.ModuleList()
        self.num_images = rng.choice([1, 2, 3, 8])
        self.names: list[str] = []
        self._steps: list[tuple] = []
        t = as_tokens(self.cut(images_with_places(self.num_images, 0))).detach()
        grid: tuple[int, int] | None = (SIZE // patch[0], SIZE // patch[1])
        for _ in range(rng.choice([1, 1, 2, 2, 3])):
            t, grid = self._add_operation(rng, t, grid)
            if rng.random() < 0.3:
                self._add_layer(rng, t.shape[1])
        self._add_layer(rng, t.shape[1])

    def _add_operation(
        self, rng: random.Random, t: Tensor, grid: tuple[int, int] | None
    ) -> tuple[Tensor, tuple[int, int] | None]:
        while True:
            if grid is not None and rng.random() < 0.6:
                name = rng.choice(sorted(ON_GRIDS))
                function, after, *length = ON_GRIDS[name](rng, *grid)
            else:
                name = rng.choice(sorted(ON_TOKENS))
                function, after, length = ON_TOKENS[name](t.shape[1]), None, []
            table = torch.tensor(rng.sample(range(n := length[0] if length else t.shape[1]), n))
            try:
                result = function(t, table)
            except (RuntimeError, ValueError, IndexError):  # the tokens cannot be cut that way
                continue
            if result.dim() == 3 and 2 <= result.shape[1] <= _MOST_TOKENS and 1 <= len(result) <= 64:
                self.register_buffer(f"table{len(self._steps)}", table)
                self._steps.append((function, f"table{len(self._steps)}"))
                self.names.append(name)
                return result, after

    def _add_layer(self, rng: random.Random, num_tokens: int) -> None:
        fitting = [name for name in PRESENTATIONS if num_tokens % 4 == 0] or list(PRESENTATIONS)[:3]
        name = rng.choice(["plain", *fitting])
        self._steps.append((len(self.blocks), name))
        self.blocks.append(nn.ModuleDict({"fc": nn.Linear(CHANNELS, CHANNELS, dtype=torch.float64)}))
        self.names.append(f"[{name}]")

    def forward(self, x: Tensor) -> Tensor:
        t = as_tokens(self.cut(x))
        for step, name in self._steps:
            if callable(step):
                t = step(t, getattr(self, name))
                continue
            there, back = PRESENTATIONS[name]
            y = torch.tanh(back(self.blocks[step]["fc"](there(t)), t.shape))
            t = torch.cat((t[..., :-OF_PLACES] + y[..., :-OF_PLACES], t[..., -OF_PLACES:]), -1)
        return t[..., :-OF_PLACES]
