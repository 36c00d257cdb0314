"""Chooses the bases of an adapted model's layers by what they see in a few training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.base import Basis
from ..bases.calibrated import LeftOutBasis
from ..calibration import CalibratedSelection, TokenStatistics
from ..calibration.statistics import pooled
from ..measure.undisturbed import LossFunction, device_of
from .observing import NOT_CALLED, Seen, gathered_from_processes, layers_of, observe, sum_over_processes, unwrapped


@dataclass(frozen=True)
class Calibration:
    """The result of [`lbp_peft.calibrate`]. Printed, it is a summary.

    Attributes:
        bases: The basis that was chosen for each layer, by the layer's name.
        left_out: The reasons why layers could not be calibrated, by the layer's name. Their backward pass is exact.
        num_batches: The number of batches that all processes together have run.
    """

    bases: dict[str, Basis]
    left_out: dict[str, str] = field(default_factory=dict)
    num_batches: int = 0

    def __str__(self) -> str:
        distinct = len(set(self.bases.values()))
        batches = "1 batch" if self.num_batches == 1 else f"{self.num_batches} batches"
        lines = [
            f"{len(self.bases)} layers calibrated by {batches}. Layers with the same input share a basis; number of "
            f"bases: {distinct}."
        ]
        lines += [f"{number} not calibrated: {why}." for why, number in Counter(self.left_out.values()).most_common()]
        return "\n".join(lines)


def calibrate(model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction | None = None) -> Calibration:
    """Choose the bases of all layers whose selection is "lhe" or "klt", by what they see in a few training steps.

    Call it before training. It may be called again at any time, to choose the bases again. A forward and a backward
    pass with exact gradients are run on each batch, which takes the time and memory of a step of full fine-tuning
    without its optimiser. Weights, gradients, buffers, modes, hooks and random numbers are left as they were. The bases
    are saved with the adapter, and loaded with it.

    Where `torch.distributed` is in use, as under accelerate, every process has to call it with batches of its own;
    the statistics are summed, and all processes choose the same bases. Call it before a model is sharded (FSDP,
    ZeRO-3).

    Layers that receive the same tensor, as query, key and value do, are calibrated together and share its projection.
    Layers whose tokens lie on no known grid are left out, as are those that receive images of several sizes packed into
    one sequence: their backward pass is exact. "klt" knows only the grid sizes of these batches.

    Args:
        model: A `PeftModel` with LBP-WHT, also one that is stacked on LoRA or another method; with or without DDP.
        batches: A list or a DataLoader of batches: the arguments of the model with labels, or what `loss_fn` takes. All
            of them are used; a few are enough.
        loss_fn: (model, batch) -> scalar loss. None: `model(**batch).loss`.

    Returns:
        The bases that were chosen, a [`Calibration`].

    Raises:
        ValueError: no active adapter has such a selection, there are no batches, the gradients are not finite, no layer
            can be calibrated, a grid has more than 4096 tokens for "klt", the model is sharded, or returns no loss.
        RuntimeError: its gradient checkpointing is reentrant, which `torch.autograd.grad` does not support.

    Example:
        >>> model = get_peft_model(vit, LBPWHTConfig(r=8, selection="klt", modules_to_save=["classifier"]))
        >>> print(lbp_peft.calibrate(model, itertools.islice(loader, 4)))
    """
    model = unwrapped(model)
    layers = layers_of(model)
    wanted = {
        (name, adapter): selection
        for name, layer in layers.items()
        for adapter in layer.active_adapters
        if adapter in layer.lbpwht_rule and (selection := layer.lbpwht_rule[adapter].chosen_by) is not None
    }
    if not wanted:
        raise ValueError(
            'No active adapter has a selection that is calibrated: set selection="lhe" or "klt" in its LBPWHTConfig.'
        )
    by_layer: dict[str, list[CalibratedSelection]] = {}
    for (name, _), selection in wanted.items():
        by_layer.setdefault(name, []).append(selection)
    collected = collect(model, batches, loss_fn, by_layer)
    chosen: dict[tuple[str, str], Basis] = {}
    made: dict[tuple, Basis] = {}  # layers that share a basis share the object, whose matrices are made once
    for (name, adapter), selection in wanted.items():
        statistics = collected.statistics.get((name, selection.name))
        if statistics is not None:
            key = selection, id(statistics)
            if key not in made:
                made[key] = choose(name, selection, statistics)
            chosen[name, adapter] = made[key]
    if not chosen:
        reasons = ", ".join(dict.fromkeys(collected.unseen.values()))
        raise ValueError(f"None of the layers can be calibrated: {reasons or 'their weights are not trained'}.")
    for name, adapter in wanted:  # assigned only now, since nothing can fail any more
        rule, why = layers[name].lbpwht_rule[adapter], collected.unseen.get(name, NOT_CALLED)
        if (name, adapter) in chosen:
            layers[name].lbpwht_rule[adapter] = replace(rule, weight_basis=chosen[name, adapter])
        elif why != NOT_CALLED:
            layers[name].lbpwht_rule[adapter] = replace(rule, weight_basis=LeftOutBasis(why))
    return Calibration({name: basis for (name, _), basis in chosen.items()}, collected.unseen, collected.num_batches)


def choose(name: str, selection: CalibratedSelection, statistics: TokenStatistics) -> Basis:
    """The basis of a layer.

    Raises:
        ValueError: it cannot be chosen; the message names the layer.
    """
    try:
        return selection.choose(statistics)
    except ValueError as error:
        raise ValueError(f"{name} cannot be calibrated: {error}.") from error


@dataclass(frozen=True)
class Collected:
    """What layers have seen in some training steps.

    Attributes:
        num_batches: The batches of all processes together.
        statistics: (name of the layer, name of the selection) -> its statistics; one object for all layers that receive
            the same tensor.
        leaders: Name of the layer -> that of the first layer that received the same tensor.
        unseen: Name of the layer -> why it was not seen.
    """

    num_batches: int
    statistics: dict[tuple[str, str], TokenStatistics]
    leaders: dict[str, str]
    unseen: dict[str, str]


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None,
    wanted: dict[str, list[CalibratedSelection]],
) -> Collected:
    """Run batches, and sum up the statistics that the selections of some layers need, over all processes.

    Args:
        wanted: Name of the layer -> its selections.

    Raises:
        ValueError: there are no batches, a grid is too large, or the sums are not finite.
    """
    sums: dict[tuple[str, str], TokenStatistics] = {}
    leaders: dict[str, str] = {}

    def see(seen: Seen) -> None:
        if not seen.trains_weight:  # it needs no basis
            return
        if leaders.setdefault(seen.name, seen.shares_with) != seen.shares_with:
            leaders[seen.name] = seen.name
        for selection in {one.name: one for one in wanted[seen.name]}.values():
            try:
                selection.check(seen.layout.grid)
            except ValueError as error:
                raise ValueError(f"{seen.name} cannot be calibrated: {error}.") from None
            own = sums.setdefault((seen.name, selection.name), TokenStatistics())
            own.add(seen.layout.grid, *_on_grid(seen), selection.statistic)

    number, unseen = observe(model, batches, loss_fn, wanted, see)
    counted = torch.tensor(float(number), dtype=torch.float64)
    flat: dict[tuple, Tensor] = {("", "", 0, (0, 0)): counted}
    for (name, selection), one in sums.items():
        for factor, of_grids in enumerate((one.inputs, one.gradients)):
            flat |= {(name, selection, factor, grid): tensor for grid, tensor in of_grids.items()}
    flat = sum_over_processes(flat, device_of(model))
    number = int(flat.pop(("", "", 0, (0, 0))))
    if number == 0:
        raise ValueError("There are no batches to calibrate by.")
    found: dict[tuple[str, str], TokenStatistics] = {}
    for (name, selection, factor, grid), tensor in flat.items():
        own = found.setdefault((name, selection), TokenStatistics())
        (own.gradients if factor else own.inputs)[grid] = tensor
    leaders = agreed_leaders(leaders)
    groups: dict[tuple[str, str], list[TokenStatistics]] = {}
    for (name, selection), one in found.items():
        if not one.is_finite():
            raise ValueError(f"The inputs or gradients of {name} are not finite: is the loss NaN?")
        groups.setdefault((leaders[name], selection), []).append(one)
    of_groups = {key: pooled(parts) for key, parts in groups.items()}
    statistics = {(name, selection): of_groups[leaders[name], selection] for name, selection in found}
    return Collected(number, statistics, leaders, {name: why for name, why in unseen.items() if name not in leaders})


def _on_grid(seen: Seen) -> tuple[Tensor, Tensor]:
    """x and g without the tokens outside the grid, row by row."""
    layout = seen.layout
    inner = slice(layout.num_prefix_tokens, layout.num_tokens - layout.num_suffix_tokens)
    x, g = seen.x[:, inner], seen.g[:, inner]
    if layout.order:
        rows = torch.tensor(layout.order, device=x.device).argsort()
        x, g = x[:, rows], g[:, rows]
    return x, g


def agreed_leaders(leaders: dict[str, str]) -> dict[str, str]:
    """The leaders in which all processes agree. A layer whose leader differs between processes leads itself."""
    found: dict[str, set[str]] = {}
    for own in gathered_from_processes(leaders):
        for name, leader in own.items():
            found.setdefault(name, set()).add(leader)
    return {name: one.pop() if len(one) == 1 else name for name, one in found.items()}
