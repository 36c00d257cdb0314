"""Random programs: wherever a layer is low-rank, its tokens lie where it says, and its gradient is the formula's."""

import os
import random
import warnings
from functools import cache

import numpy as np
import pytest
import reference
import torch
from arranged import adapted
from models import layers_of
from programs import OF_PLACES, Program, images_with_places

from lbp_peft import layout_report

R = 3
# Set PROGRAMS to check more: PROGRAMS=2000 pytest tests/models/test_random_programs.py
COUNT = int(os.environ.get("PROGRAMS", "120"))
AT_ONCE = 20


@cache
def bases(grid):
    return reference.orthogonal_bases(grid, R)


def parts_of(layout):
    return getattr(layout, "parts", ()) or (layout,) * layout.packed


def in_rows(x, layout):
    """(N, ..., C) as (images, tokens, C), where some axes run over tokens and the others over images."""
    last = x.dim() - 1
    axes = range(1, last) if layout.axes is None else layout.axes
    images = [axis for axis in range(last) if axis not in axes]
    return x.permute(*images, *axes, last).reshape(np.prod([x.shape[a] for a in images], dtype=int), -1, x.shape[-1])


def expected_gradient(x, g, layout):
    blocks = []
    for part in parts_of(layout):
        of_grid = bases(part.grid)[:, list(part.order or range(part.grid[0] * part.grid[1]))]
        before, after = (torch.eye(n, dtype=torch.float64) for n in (part.num_prefix_tokens, part.num_suffix_tokens))
        blocks.append(torch.block_diag(before, of_grid, after))
    x, g = (torch.einsum("kl,nlc->nkc", torch.block_diag(*blocks), in_rows(t, layout)) for t in (x, g))
    return torch.einsum("nko,nki->oi", g, x)


def is_in_one_direction(lines):
    """Whether known values rise or fall along each line, with at most one step back from the end to the start."""
    for line in lines:
        line = line[~np.isnan(line)]
        for rising in (line, -line):
            back = np.diff(rising)[np.diff(rising) < -1e-9]
            if not len(back) or (len(back) == 1 and rising[0] >= rising[-1]):
                break
        else:
            return False
    return True


def why_misplaced(x, layout):
    """How the places among the data contradict a layout; "" if they do not."""
    rows = in_rows(x, layout)
    sizes = [part.num_tokens for part in parts_of(layout)]
    if sum(sizes) != rows.shape[1]:
        return f"{rows.shape[1]} tokens"
    for part, piece in zip(parts_of(layout), rows.split(sizes, 1), strict=True):
        grid = piece[:, part.num_prefix_tokens : piece.shape[1] - part.num_suffix_tokens, -OF_PLACES:].numpy()
        grid = grid[:, np.argsort(part.order)] if part.order else grid
        with np.errstate(all="ignore"):  # learned tokens and padding have no place
            row, column, image = (np.where(grid[..., 3] > 1e-9, grid[..., i] / grid[..., 3], np.nan) for i in range(3))
        if np.nanmax(np.nanmax(image, 1) - np.nanmin(image, 1)) > 1e-6:
            return "several images in one grid"
        shape = (-1, *part.grid)
        ways = ((row.reshape(shape), column.reshape(shape)), (column.reshape(shape), row.reshape(shape)))
        if not any(is_grid(down, across) for down, across in ways):
            return f"not in the order of {part.grid}"
    return ""


def is_grid(down, across):
    spread = [np.nanmax(values, axis) - np.nanmin(values, axis) for values, axis in ((down, 2), (across, 1))]
    are_equal = all(np.nanmax(one, initial=0) < 1e-6 for one in spread)
    return are_equal and is_in_one_direction(np.nanmean(down, 2)) and is_in_one_direction(np.nanmean(across, 1))


def problems(seed):
    """What is wrong with the layers of a program in several passes, before some of which its tables are rewritten."""
    rng, model = random.Random(seed), adapted(Program(seed))
    program, layers, seen, found = model.base_model.model, layers_of(model), {}, []

    def note(name, module, args, output):
        seen[name] = args[0].detach()
        output.register_hook(lambda g: seen.update({f"{name} g": g}))

    for name, layer in layers.items():
        layer.register_forward_hook(lambda *given, name=name: note(name, *given))
    for number in range(3):
        for table in list(program.buffers()) if number else []:
            order = table[torch.tensor(rng.sample(range(len(table)), len(table)))]
            if (way := rng.choice(["PyTorch", "NumPy", "not at all"])) == "PyTorch":
                table.copy_(order)
            elif way == "NumPy":
                np.copyto(table.numpy(), order.numpy())
        model.zero_grad()
        output = model(images_with_places(program.num_images, seed + number))
        weights = torch.linspace(0.5, 9, output.numel(), dtype=torch.float64).sin().view(output.shape)
        (output.sin() * weights).sum().backward()
        for name, layer in layers.items():
            layout, gradient = layout_report(model).layers[layer.layer_name].layout, layer.lbpwht_weight["default"].grad
            x, g = seen[name], seen[f"{name} g"]
            exact = torch.einsum("no,ni->oi", g.flatten(0, -2), x.flatten(0, -2))
            expected = exact if layout is None else expected_gradient(x, g, layout)
            if (gradient - expected).norm() > 1e-9 * exact.norm():
                found.append(f"pass {number}, {name}: the gradient is not that of {layout}")
            if layout is not None and (why := why_misplaced(x, layout)):
                found.append(f"pass {number}, {name}: {why}, but {layout}")
    return [f"{seed} {program.names} {one}" for one in found]


@pytest.mark.parametrize("first", range(0, COUNT, AT_ONCE))
def test_layers_are_low_rank_only_where_their_tokens_lie(first):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not [problem for seed in range(first, min(first + AT_ONCE, COUNT)) for problem in problems(seed)]
