"""On which patch grid do the tokens of a layer lie?

The answer is read off the running model, not guessed from the number of tokens: the convolutions that turn the image
into patches, or merge patches into larger ones, are watched, and the height and width of their outputs are patch grids
at any resolution and aspect ratio. Where a pyramid merges patches without a convolution, the grid is halved. Windowed
attention says itself how large its windows are. Models that cut patches without a convolution are asked for their patch
size instead, and their `pixel_values` for the image's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .bases import LayoutError, TokenLayout
from .hints import learned_queries, learned_tokens, may_merge_patches, patch_embeddings, patch_size_of, unroll_schedule
from .padding import PaddingFinder
from .walsh import is_power_of_two


class GridMismatchError(ValueError):
    """A `grid_size` or `num_prefix_tokens` given by hand does not fit the tokens that arrive."""


class GridFinder:
    """Finds the [`TokenLayout`] of a layer's input. One is shared by all layers of a model.

    What it learns of a forward pass is kept until the next one begins, so a layer that is run again in the backward
    pass (gradient checkpointing) gets the same answer as before.
    """

    def __init__(self) -> None:
        # Layouts of the forward pass under way or last done, by number of tokens.
        self._seen: dict[int, TokenLayout] = {}
        # Those of all forward passes since the last backward pass that ran layers again.
        self._to_rerun: dict[int, set[TokenLayout]] = {}
        self._reran = False
        self._warned: set[str] = set()
        self._hooks: list[Any] = []
        # With the learned tokens before and after their patches.
        self._embeddings: dict[nn.Module, tuple[int, int]] = {}
        self._first_to_run: nn.Module | None = None
        self._merges_patches = False
        self._unrolled_by: tuple[tuple[int, int], ...] = ()
        self._queries: set[int] = set()
        # Of the embeddings that ran; some run on crops or frames. A list, since torch.compile may not know the numbers.
        self._num_images: list[int] = []
        self._patch_size: tuple[int, int] | None = None
        self._learned_tokens = (0, 0)
        self.paddings = PaddingFinder()

    def watch(self, model: nn.Module) -> None:
        """Learn from this model's forward passes from now on, by hooks. Once more when its modules have changed."""
        self._merges_patches = any(may_merge_patches(module) for module in model.modules())
        self._unrolled_by = unroll_schedule(model)
        self._queries = learned_queries(model)
        self.paddings.watch(model)
        for embedding, around in patch_embeddings(model):
            if embedding not in self._embeddings:
                _drop_copied_hooks(embedding)
                self._embeddings[embedding] = learned_tokens(around)
                self._hooks.append(embedding.register_forward_hook(self._note_patches))
        if not self._embeddings and not self._hooks:
            self._patch_size = patch_size_of(model)
            self._learned_tokens = learned_tokens([model])
            if self._patch_size is not None:
                self._hooks.append(model.register_forward_pre_hook(self._note_image, with_kwargs=True))

    def detach(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.paddings.detach()

    def padding(self, shape: torch.Size) -> Tensor | None:
        """Shape (N, L), True where a token of a text (N, L, C) is only padding; None where it is not known."""
        return self.paddings.padding(shape, _in_backward())

    def layout(
        self,
        shape: torch.Size,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int | None = None,
        num_suffix_tokens: int | None = None,
        window: tuple[int, int] | None = None,
    ) -> TokenLayout:
        """The layout of an input.

        Args:
            shape: (N, L, C), or (N, H, W, C), which is its own grid.
            grid_size: (H, W) if given by hand.
            num_prefix_tokens, num_suffix_tokens: if given by hand.
            window: (H, W) of the windows that attention near the layer works in.

        Raises:
            GridMismatchError: what was given by hand does not fit.
            LayoutError: nothing was given and the grid cannot be known.
        """
        if len(shape) == 4:
            return self._own_layout((int(shape[1]), int(shape[2])), grid_size, window)
        num_tokens = int(shape[1])
        if grid_size is not None:
            return self._given_layout(num_tokens, grid_size, num_prefix_tokens, num_suffix_tokens)
        if self._num_images and shape[0] and all(n and shape[0] % n and n % shape[0] for n in self._num_images):
            images = " or ".join(map(str, sorted(self._num_images)))
            raise LayoutError(
                f"its input of shape {tuple(shape)} does not hold the tokens of {images} images one after the other",
                "Leave it out with exclude_modules to silence this.",
            )
        layout = self._layout_to_rerun(num_tokens) if _in_backward() else self._seen.get(num_tokens)
        is_window = window is not None and num_tokens == window[0] * window[1] and not self._unrolled_by
        if is_window and (layout is None or shape[0] not in self._num_images):  # folded into the batch
            layout = TokenLayout(window or (0, 0))
        elif num_prefix_tokens is not None or num_suffix_tokens is not None:
            layout = self._with_outside(num_tokens, num_prefix_tokens, num_suffix_tokens)
        elif layout is None:
            layout = self._merged(num_tokens) if self._merges_patches else self._regrouped(shape)
        if layout is None:
            raise LayoutError(
                self._why_unknown(num_tokens), "Set grid_size (and num_prefix_tokens) if they lie on a grid."
            )
        return layout

    def _own_layout(
        self, grid: tuple[int, int], grid_size: tuple[int, int] | None, window: tuple[int, int] | None
    ) -> TokenLayout:
        """Of an input with two axes of tokens. They are height and width only where such a grid is known to be."""
        if grid_size is not None and grid != grid_size:
            raise GridMismatchError(
                f"grid_size={grid_size}, but the channels-last input that arrived is its own grid, {grid}. Correct "
                "grid_size, or leave it out."
            )
        seen = {layout.grid for layout in self._seen.values()}
        known = grid in (grid_size, window) or not seen or any(_are_multiples(grid, other) for other in seen)
        if not known and not (self._merges_patches and any(_is_merged(grid, larger) for larger in seen)):
            raise LayoutError(
                f"{grid[0]} x {grid[1]} tokens are no patch grid of this forward pass", "Set grid_size if they are one."
            )
        return TokenLayout(grid)

    def warn_once(self, cause: str, message: str) -> None:
        """Warn, unless a layer of this model has been warned about for the same cause."""
        if cause not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(cause)
            warnings.warn(message, stacklevel=2)

    def _layout_to_rerun(self, num_tokens: int) -> TokenLayout | None:
        self._reran = True
        candidates = self._to_rerun.get(num_tokens, set())
        if len(candidates) > 1:
            grids = " and ".join(f"{height} x {width}" for height, width in sorted(c.grid for c in candidates))
            raise RuntimeError(
                f"Gradient checkpointing runs layers again, and images of {grids} patches, as many tokens each, went "
                "through the model before this backward pass: they cannot be told apart. Call backward after each, "
                "give grid_size if it is the same, or do without gradient checkpointing."
            )
        return next(iter(candidates), None)

    def _merged(self, num_tokens: int) -> TokenLayout | None:
        """Of the grids that were seen, halved once or more and rounded either way, the one that fits, if it is one."""
        fitting = set()
        for grid in {layout.grid for layout in self._seen.values()}:
            for up in (0, 1):
                height, width = grid
                while max(height, width) > 1:
                    height, width = max((height + up) // 2, 1), max((width + up) // 2, 1)
                    if height * width == num_tokens:
                        fitting.add(TokenLayout((height, width)))
        return fitting.pop() if len(fitting) == 1 else None

    def _regrouped(self, shape: torch.Size) -> TokenLayout | None:
        """Every p-th patch along both sides, the p x p such groups of an image folded into the batch (MobileViT)."""
        for num_images in self._num_images:
            groups = int(shape[0]) // num_images
            p = math.isqrt(groups)
            if p < 2 or p * p != groups or groups * num_images != int(shape[0]):
                continue
            grids = {layout.grid for layout in self._seen.values()}
            fitting = [(h // p, w // p) for h, w in grids if h % p == w % p == 0 and h * w == int(shape[1]) * groups]
            if len(fitting) == 1:
                return TokenLayout(fitting[0])
        return None

    def _with_outside(self, num_tokens: int, before: int | None, after: int | None) -> TokenLayout | None:
        """The one grid of this forward pass that has so many tokens with those that were given."""
        before, after = before or 0, after or 0
        grids = {seen.grid for seen in self._seen.values()}
        fitting = [(h, w) for h, w in grids if h * w + before + after == num_tokens]
        return TokenLayout(fitting[0], before, after) if len(fitting) == 1 else None

    def _given_layout(
        self, num_tokens: int, grid_size: tuple[int, int], before: int | None, after: int | None
    ) -> TokenLayout:
        rest = num_tokens - grid_size[0] * grid_size[1]
        if before is None and after is None:
            learned = {(0, 0), self._learned_tokens, *self._embeddings.values()}
            before, after = next((pair for pair in learned if sum(pair) == rest), (None, None))
        elif before is None or after is None:
            before, after = before or 0, after or 0
        if before is None or after is None or before + after != rest:
            given = [f"grid_size={grid_size}"]
            given += [f"num_prefix_tokens={before}"] if before else []
            given += [f"num_suffix_tokens={after}"] if after else []
            total = num_tokens - rest + (before or 0) + (after or 0)
            raise GridMismatchError(
                f"{' and '.join(given)} makes {total} tokens, but {num_tokens} arrived. "
                + (
                    f"If {rest} of them come before the grid, set num_prefix_tokens to that; else "
                    if before is None and rest > 0
                    else ""
                )
                + "correct grid_size, or leave it out to have the grid found from the model and the image."
            )
        return TokenLayout(grid_size, before, after)

    def _why_unknown(self, num_tokens: int) -> str:
        if self._seen:
            seen = ", ".join(
                f"{n} ({layout.grid[0]} x {layout.grid[1]} + {layout.num_outside})" for n, layout in self._seen.items()
            )
            why = f"{num_tokens} tokens fit no patch grid of this forward pass (those have {seen} tokens)"
        elif self._embeddings or self._patch_size:
            why = (
                f"no layer that cuts an image into patches has run yet, so the grid of {num_tokens} tokens is not known"
            )
        else:
            why = f"the model shows no patch embedding from which the grid of {num_tokens} tokens could be known"
        return why

    def _note(self, grid: tuple[int, int], learned_tokens: tuple[int, int]) -> None:
        # Without its learned tokens the same grid occurs too: dense heads and token-free stages drop them.
        before, after = learned_tokens
        layouts = {TokenLayout(grid)} | {TokenLayout(grid, before + count, after) for count in {0, *self._queries}}
        if self._unrolled_by:
            layouts = set(_unrolled(grid, self._unrolled_by))
        for layout in layouts:
            self._seen[layout.num_tokens] = layout
            self._to_rerun.setdefault(layout.num_tokens, set()).add(layout)

    def _begin_pass(self) -> None:
        self._seen.clear()
        if self._reran:
            self._to_rerun.clear()
            self._reran = False

    def _note_patches(self, embedding: nn.Module, args: tuple, output: Tensor) -> None:
        if not _in_backward() and self._first_to_run in (None, embedding):  # the same one again: a new forward pass
            self._begin_pass()
            self._first_to_run = embedding
            self._num_images.clear()
        num_images = int(output.shape[0])
        if num_images not in self._num_images:
            self._num_images.append(num_images)
        self._note((int(output.shape[-2]), int(output.shape[-1])), self._embeddings[embedding])

    def _note_image(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert self._patch_size is not None
        self._begin_pass()
        candidates = [kwargs.get("pixel_values"), *args]
        image = next((x for x in candidates if isinstance(x, Tensor) and x.dim() == 4), None)
        if image is not None:
            self._num_images = [int(image.shape[0])]
            height, width = (int(side) // patch for side, patch in zip(image.shape[-2:], self._patch_size, strict=True))
            self._note((height, width), self._learned_tokens)


def _in_backward() -> bool:
    """Whether autograd is in a backward pass: a forward pass now is gradient checkpointing's second."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _unrolled(grid: tuple[int, int], strides: tuple[tuple[int, int], ...]) -> Iterator[TokenLayout]:
    """Patches unrolled by all strides, then pooled again and again over those of the first that are left (Hiera)."""
    yield TokenLayout(grid, unrolled=strides)
    for level, (down, across) in enumerate(strides, start=1):
        grid = (grid[0] // down, grid[1] // across)
        yield TokenLayout(grid, unrolled=strides[level:])


def _are_multiples(grid: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one of two grids is the other at 2, 4, ... times its resolution."""
    small, large = sorted((grid, other))
    factor = large[0] // small[0]
    return (small[0] * factor, small[1] * factor) == large and is_power_of_two(factor)


def _is_merged(grid: tuple[int, int], larger: tuple[int, int]) -> bool:
    """Whether a grid is another one halved once or more."""
    while min(larger) > 1:
        larger = ((larger[0] + 1) // 2, (larger[1] + 1) // 2)
        if grid == larger:
            return True
    return False


def _drop_copied_hooks(module: nn.Module) -> None:
    """A copy of a watched module (PEFT's modules_to_save makes one) carries a hook that reports to nobody."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), GridFinder):
            del module._forward_hooks[key]
