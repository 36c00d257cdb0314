"""Calibration: chooses the bases of an adapted model's layers by their inputs and gradients in a few training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..bases.base import Basis
from ..bases.calibrated import LeftOutBasis
from ..calibration import CalibratedSelection, TokenStatistics
from ..calibration.statistics import pool
from ..measure.running import LossFunction, device_of
from .observing import NOT_CALLED, Observation, gather_from_processes, layers_of, observe, sum_over_processes, unwrap


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


def calibrate(model: nn.Module, batches: Iterable[object], loss_fn: LossFunction | None = None) -> Calibration:
    """Choose the bases of all layers whose selection is "lhe" or "klt", by a few training steps.

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
            can be calibrated, a grid has more than 4096 tokens for "klt", the model is sharded, or it returns no loss.
        RuntimeError: its gradient checkpointing is reentrant, which `torch.autograd.grad` does not support.

    Example:
        >>> model = get_peft_model(vit, LBPWHTConfig(r=8, selection="klt", modules_to_save=["classifier"]))
        >>> print(lbp_peft.calibrate(model, itertools.islice(loader, 4)))
    """
    model = unwrap(model)
    layers = layers_of(model)
    selections = {
        (name, adapter): selection
        for name, layer in layers.items()
        for adapter in layer.active_adapters
        if adapter in layer.lbpwht_rule and (selection := layer.lbpwht_rule[adapter].chosen_by) is not None
    }
    if not selections:
        raise ValueError(
            'No active adapter has a selection that is calibrated: set selection="lhe" or "klt" in its LBPWHTConfig.'
        )
    selections_of_layers: dict[str, list[CalibratedSelection]] = {}
    for (name, _), selection in selections.items():
        selections_of_layers.setdefault(name, []).append(selection)
    collected = collect(model, batches, loss_fn, selections_of_layers)
    chosen: dict[tuple[str, str], Basis] = {}
    bases: dict[tuple, Basis] = {}  # layers that share a basis share the object, so that its matrices are made once
    for (name, adapter), selection in selections.items():
        statistics = collected.statistics.get((name, selection.name))
        if statistics is not None:
            key = selection, id(statistics)
            if key not in bases:
                bases[key] = choose_basis(name, selection, statistics)
            chosen[name, adapter] = bases[key]
    if not chosen:
        reasons = ", ".join(dict.fromkeys(collected.why_unobserved.values()))
        raise ValueError(f"None of the layers can be calibrated: {reasons or 'their weights are not trained'}.")
    for name, adapter in selections:  # assigned last, since nothing can fail from here on
        rule, why = layers[name].lbpwht_rule[adapter], collected.why_unobserved.get(name, NOT_CALLED)
        if (name, adapter) in chosen:
            layers[name].lbpwht_rule[adapter] = replace(rule, weight_basis=chosen[name, adapter])
        elif why != NOT_CALLED:
            layers[name].lbpwht_rule[adapter] = replace(rule, weight_basis=LeftOutBasis(why))
    return Calibration(
        {name: basis for (name, _), basis in chosen.items()}, collected.why_unobserved, collected.num_batches
    )


def choose_basis(name: str, selection: CalibratedSelection, statistics: TokenStatistics) -> Basis:
    """Choose the basis of a layer by its statistics.

    Raises:
        ValueError: no basis can be chosen; the message names the layer.
    """
    try:
        return selection.choose(statistics)
    except ValueError as error:
        raise ValueError(f"{name} cannot be calibrated: {error}.") from error


@dataclass(frozen=True)
class CollectedStatistics:
    """Statistics of layers in a few training steps.

    Attributes:
        num_batches: The number of batches of all processes together.
        statistics: The statistics by the names of the layer and of the selection; one object for all layers that
            receive the same tensor.
        leaders: The name of the first layer that received the same tensor, by the name of each layer.
        why_unobserved: The reason why a layer was not observed, by the layer's name.
    """

    num_batches: int
    statistics: dict[tuple[str, str], TokenStatistics]
    leaders: dict[str, str]
    why_unobserved: dict[str, str]


def collect(
    model: nn.Module,
    batches: Iterable[object],
    loss_fn: LossFunction | None,
    selections: dict[str, list[CalibratedSelection]],
) -> CollectedStatistics:
    """Run batches, and sum up the statistics that selections need, over all processes.

    Args:
        model, batches, loss_fn: As in [`calibrate`].
        selections: The selections of each layer to observe, by the layer's name.

    Raises:
        ValueError: there are no batches, a grid is too large, or the sums are not finite.
    """
    sums: dict[tuple[str, str], TokenStatistics] = {}
    leaders: dict[str, str] = {}

    def add(observation: Observation) -> None:
        if not observation.trains_weight:  # no basis is needed
            return
        if leaders.setdefault(observation.name, observation.shares_with) != observation.shares_with:
            leaders[observation.name] = observation.name
        for selection in {selection.name: selection for selection in selections[observation.name]}.values():
            try:
                selection.check(observation.layout.grid)
            except ValueError as error:
                raise ValueError(f"{observation.name} cannot be calibrated: {error}.") from None
            layer_sums = sums.setdefault((observation.name, selection.name), TokenStatistics())
            layer_sums.add(observation.layout.grid, *_grid_tokens(observation), selection.statistic)

    number, why_unobserved = observe(model, batches, loss_fn, selections, add)
    counted = torch.tensor(float(number), dtype=torch.float64)
    flat: dict[tuple, Tensor] = {("", "", 0, (0, 0)): counted}
    for (name, selection), layer_sums in sums.items():
        for factor, of_grids in enumerate((layer_sums.inputs, layer_sums.gradients)):
            flat |= {(name, selection, factor, grid): tensor for grid, tensor in of_grids.items()}
    flat = sum_over_processes(flat, device_of(model))
    number = int(flat.pop(("", "", 0, (0, 0))))
    if number == 0:
        raise ValueError("There are no batches to calibrate by.")
    of_layers: dict[tuple[str, str], TokenStatistics] = {}
    for (name, selection, factor, grid), tensor in flat.items():
        layer_sums = of_layers.setdefault((name, selection), TokenStatistics())
        (layer_sums.gradients if factor else layer_sums.inputs)[grid] = tensor
    leaders = agreed_leaders(leaders)
    groups: dict[tuple[str, str], list[TokenStatistics]] = {}
    for (name, selection), layer_sums in of_layers.items():
        if not layer_sums.is_finite():
            raise ValueError(f"The inputs or gradients of {name} are not finite: is the loss NaN?")
        groups.setdefault((leaders[name], selection), []).append(layer_sums)
    of_groups = {key: pool(parts) for key, parts in groups.items()}
    statistics = {(name, selection): of_groups[leaders[name], selection] for name, selection in of_layers}
    return CollectedStatistics(
        number, statistics, leaders, {name: why for name, why in why_unobserved.items() if name not in leaders}
    )


def _grid_tokens(observation: Observation) -> tuple[Tensor, Tensor]:
    """x and g of the tokens on the grid, row by row."""
    layout = observation.layout
    inner = slice(layout.num_prefix_tokens, layout.num_tokens - layout.num_suffix_tokens)
    x, g = observation.x[:, inner], observation.g[:, inner]
    if layout.order:
        rows = torch.tensor(layout.order, device=x.device).argsort()
        x, g = x[:, rows], g[:, rows]
    return x, g


def agreed_leaders(leaders: dict[str, str]) -> dict[str, str]:
    """The leaders on which all processes agree. A layer whose leader differs between processes leads itself."""
    proposed: dict[str, set[str]] = {}
    for of_process in gather_from_processes(leaders):
        for name, leader in of_process.items():
            proposed.setdefault(name, set()).add(leader)
    return {
        name: leaders_of_layer.pop() if len(leaders_of_layer) == 1 else name
        for name, leaders_of_layer in proposed.items()
    }
