"""On which patch grid do the tokens of a layer lie?

The answer is read off the running model, not guessed from the number of tokens: the convolutions that turn the image
into patches, or merge patches into larger ones, are watched, and the height and width of their outputs are patch grids
at any resolution and aspect ratio. Where a pyramid merges patches without a convolution, the grid is halved. Windowed
attention says itself how large its windows are. Models that cut patches without a convolution are asked for their patch
size instead, and their `pixel_values` for the image's.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .bases import LayoutError, TokenLayout
from .walsh import is_power_of_two

# Learned tokens that vision transformers put before their patches: cls_token, class_embedding, register_tokens, ...
_PREFIX_TOKEN = re.compile(r"(cls|class|dist|distillation|reg|register)_(tokens?|embedding)")


_MAKES_GRIDS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


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
        self._embeddings: dict[nn.Module, int] = {}
        self._first_to_run: nn.Module | None = None
        self._merges_patches = False
        self._reorders_patches = False
        self._num_images = 0
        self._patch_size: tuple[int, int] | None = None
        self._num_prefix_tokens = 0

    def watch(self, model: nn.Module) -> None:
        """Learn from this model's forward passes from now on, by hooks. Once more when its modules have changed."""
        self._merges_patches = any(_may_merge_patches(module) for module in model.modules())
        self._reorders_patches = any(_unrolls_patches(module) for module in model.modules())
        for embedding, ancestors in _patch_embeddings(model):
            if embedding not in self._embeddings:
                _drop_copied_hooks(embedding)
                self._embeddings[embedding] = _count_prefix_tokens(ancestors)
                self._hooks.append(embedding.register_forward_hook(self._note_patches))
        if not self._embeddings and not self._hooks:
            self._patch_size = _patch_size_of(model)
            self._num_prefix_tokens = _count_prefix_tokens([model])
            if self._patch_size is not None:
                self._hooks.append(model.register_forward_pre_hook(self._note_image, with_kwargs=True))

    def detach(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def layout(
        self,
        shape: torch.Size,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int | None = None,
        window: tuple[int, int] | None = None,
    ) -> TokenLayout:
        """The layout of an input.

        Args:
            shape: (N, L, C), or (N, H, W, C), which is its own grid.
            grid_size: (H, W) if given by hand.
            num_prefix_tokens: if given by hand.
            window: (H, W) of the windows that attention near the layer works in.

        Raises:
            GridMismatchError: what was given by hand does not fit.
            LayoutError: nothing was given and the grid cannot be known.
        """
        if len(shape) == 4:
            return self._own_layout((int(shape[1]), int(shape[2])), grid_size, window)
        num_tokens = int(shape[1])
        if grid_size is not None:
            return self._given_layout(num_tokens, grid_size, num_prefix_tokens)
        layout = self._layout_to_rerun(num_tokens) if _in_backward() else self._seen.get(num_tokens)
        if self._reorders_patches:
            raise LayoutError(
                "the model unrolls its patches, so that they do not lie in rows (Hiera)", "Exclude it to silence this."
            )
        in_window = window is not None and num_tokens == window[0] * window[1]
        if (
            window is not None and in_window and (layout is None or int(shape[0]) != self._num_images)
        ):  # folded into the batch
            return TokenLayout(window)
        if layout is None and num_prefix_tokens is None:
            layout = self._merged(num_tokens) if self._merges_patches else self._regrouped(shape)
        if num_prefix_tokens is not None and (layout is None or layout.num_prefix_tokens != num_prefix_tokens):
            grids = {seen.grid for seen in self._seen.values()}
            fitting = [g for g in grids if g[0] * g[1] + num_prefix_tokens == num_tokens]
            layout = TokenLayout(fitting[0], num_prefix_tokens) if len(fitting) == 1 else None
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
        groups = int(shape[0]) // max(self._num_images, 1)
        p = math.isqrt(groups)
        if p < 2 or p * p != groups or groups * self._num_images != int(shape[0]):
            return None
        grids = {layout.grid for layout in self._seen.values()}
        fitting = [(h // p, w // p) for h, w in grids if h % p == w % p == 0 and h * w == int(shape[1]) * groups]
        return TokenLayout(fitting[0]) if len(fitting) == 1 else None

    def _given_layout(self, num_tokens: int, grid_size: tuple[int, int], num_prefix_tokens: int | None) -> TokenLayout:
        on_grid = grid_size[0] * grid_size[1]
        prefix = num_prefix_tokens
        if prefix is None:
            counts = {0, self._num_prefix_tokens, *self._embeddings.values()}
            prefix = num_tokens - on_grid if num_tokens - on_grid in counts else None
        if prefix is None or prefix + on_grid != num_tokens:
            given = f"grid_size={grid_size}" + ("" if prefix is None else f" and num_prefix_tokens={prefix}")
            raise GridMismatchError(
                f"{given} makes {on_grid + (prefix or 0)} tokens, but {num_tokens} arrived. "
                + (
                    f"If {num_tokens - on_grid} of them come before the grid, set num_prefix_tokens to that; else "
                    if prefix is None and num_tokens > on_grid
                    else ""
                )
                + "correct grid_size, or leave it out to have the grid found from the model and the image."
            )
        return TokenLayout(grid_size, prefix)

    def _why_unknown(self, num_tokens: int) -> str:
        if self._seen:
            seen = ", ".join(
                f"{n} ({layout.grid[0]} x {layout.grid[1]} + {layout.num_prefix_tokens})"
                for n, layout in self._seen.items()
            )
            why = f"{num_tokens} tokens fit no patch grid of this forward pass (those have {seen} tokens)"
        elif self._embeddings or self._patch_size:
            why = f"no image has passed through the model's patch embedding yet, so {num_tokens} tokens have no grid"
        else:
            why = f"the model shows no patch embedding from which the grid of {num_tokens} tokens could be known"
        return why

    def _note(self, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        # Without its prefix tokens the same grid occurs too: dense heads and token-free stages drop them.
        for prefix in {0, num_prefix_tokens}:
            layout = TokenLayout(grid, prefix)
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
            self._num_images = int(output.shape[0])
        self._note((int(output.shape[-2]), int(output.shape[-1])), self._embeddings[embedding])

    def _note_image(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert self._patch_size is not None
        self._begin_pass()
        candidates = [kwargs.get("pixel_values"), *args]
        image = next((x for x in candidates if isinstance(x, Tensor) and x.dim() == 4), None)
        if image is not None:
            self._num_images = int(image.shape[0])
            height, width = (int(side) // patch for side, patch in zip(image.shape[-2:], self._patch_size, strict=True))
            self._note((height, width), self._num_prefix_tokens)


def _in_backward() -> bool:
    """Whether autograd is in a backward pass: a forward pass now is gradient checkpointing's second."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _patch_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Layers that cut into patches or merge them (stride > 1), each with its ancestors, nearest first."""
    for name, module in model.named_modules():
        if isinstance(module, _MAKES_GRIDS) and max(_pair(module.stride) or (1, 1)) > 1:
            parts = name.split(".")
            yield module, [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) - 1, -1, -1)]


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


def _may_merge_patches(module: nn.Module) -> bool:
    """Patch merging joins 2 x 2 patches of C channels and reduces 4 C to 2 C (Swin, arXiv 2103.14030)."""
    if not isinstance(module, nn.Linear) or module.bias is not None:
        return False
    return module.in_features == 2 * module.out_features and module.in_features % 4 == 0


def _unrolls_patches(module: nn.Module) -> bool:
    """Hiera (arXiv 2306.00989) puts patches of a unit side by side: timm by a module, transformers by a schedule."""
    return type(module).__name__ == "Unroll" or hasattr(module, "unroll_schedule")


def _drop_copied_hooks(module: nn.Module) -> None:
    """A copy of a watched module (PEFT's modules_to_save makes one) carries a hook that reports to nobody."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), GridFinder):
            del module._forward_hooks[key]


def _count_prefix_tokens(ancestors: list[nn.Module]) -> int:
    """Learned tokens ([CLS], distillation, registers) that the nearest ancestor holding any puts before the patches."""
    for ancestor in ancestors:
        declared = getattr(ancestor, "num_prefix_tokens", None)  # timm says it outright
        if isinstance(declared, int):
            return declared
        tokens = [
            1 if parameter.dim() == 1 else parameter.shape[-2]
            for name, parameter in ancestor.named_parameters(recurse=False)
            if _PREFIX_TOKEN.fullmatch(name)
        ]
        if tokens:
            return sum(tokens)
    return 0


def window_near(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module around a layer that says its `window_size`."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        ancestor = model.get_submodule(".".join(parts[:length]))
        if _pair(getattr(ancestor, "window_size", None)) is not None:
            return ancestor
    return None


def is_unfolded(model: nn.Module, name: str) -> bool:
    """Whether a layer works on images unfolded to (N, C, pixels of a patch, patches), as MobileViTV2's do."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts)))
    return any(type(module).__name__ in ("MobileViTV2Transformer", "LinearTransformerBlock") for module in around)


def window_size(windowed: nn.Module | None) -> tuple[int, int] | None:
    """(H, W) of the windows of what [`window_near`] found; they may change with the image."""
    return _pair(getattr(windowed, "window_size", None))


def _patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    return _pair(getattr(getattr(model, "config", None), "patch_size", None))


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return (size, size)
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return (size[0], size[1])
    return None
