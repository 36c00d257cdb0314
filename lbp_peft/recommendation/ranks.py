"""Chooses the rank of each layer's gradients, within a budget on memory or multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from ..bases.base import Basis
from ..bases.basis_set import BasisSet
from ..bases.listed import ListedBasis
from ..calibration import Option, TokenStatistics, allocate
from ..measure.running import LossFunction, device_of
from ..ops.plan import FixedBasis
from ..projection import num_coefficients, projection
from ..tuner.calibrate import agreed_leaders, choose_basis, collect
from ..tuner.layers.base import LBPWHTLayer
from ..tuner.layers.rule import BackwardRule
from ..tuner.observing import Observation, layers_of, observe, sum_over_processes, unwrap
from .bounds import Bounds

# The ranks that are tried, up to block_size**2.
RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 21, 28, 36, 45, 55, 64, 78, 105, 136, 171, 210, 256)
_WEIGHT, _INPUT = "weight", "input"
_EXACT = 10**9  # stands for no rank; a number, so that it can be sorted and sent to other processes


@dataclass(frozen=True)
class RankAllocation:
    """The ranks of each layer's gradients, from [`lbp_peft.allocate_ranks`]. Printed, it is YAML that can be edited.

    Attributes:
        rank_pattern: r of each layer, by the layer's name, for `LBPWHTConfig(rank_pattern=...)`.
        grad_input_rank_pattern: The rank of each layer's input gradient, by the layer's name, for the setting of that
            name; None where the gradient is exact. Empty if the input gradients of the model are not low-rank.
        cosines: The cosine of each layer's weight gradient with the exact one, at its rank, by the layer's name.
        memory: The bytes that the layers save of their inputs for a batch.
        multiply_adds: The multiply-adds of the layers' backward pass for a batch.
        uniform_cosine, uniform_memory, uniform_multiply_adds: The lowest cosine, and the costs, of the present ranks.
    """

    rank_pattern: dict[str, int]
    grad_input_rank_pattern: dict[str, int | None]
    cosines: dict[str, float] = field(repr=False)
    memory: float
    multiply_adds: float
    uniform_cosine: float
    uniform_memory: float
    uniform_multiply_adds: float

    @property
    def cosine(self) -> float:
        """The lowest cosine of a layer's weight gradient."""
        return min(self.cosines.values())

    def to_yaml(self) -> str:
        """Both patterns, to be edited, and read by `yaml.safe_load`."""
        patterns = {"rank_pattern": self.rank_pattern, "grad_input_rank_pattern": self.grad_input_rank_pattern}
        return yaml.safe_dump(patterns, sort_keys=False)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"# lowest cosine of a layer's weight gradient: {self.cosine:.3f} ({self.uniform_cosine:.3f} before)",
                f"# saved inputs: {self.memory / 2**20:.1f} MiB a batch ({self.uniform_memory / 2**20:.1f} before)",
                f"# multiply-adds: {self.multiply_adds / 1e9:.2f} G a batch "
                f"({self.uniform_multiply_adds / 1e9:.2f} before)",
                self.to_yaml(),
            ]
        )


class _Gradient(NamedTuple):
    """A gradient of layers that share its rank: of layers with the same input, or of a single layer.

    Attributes:
        leader: The name of the first of these layers.
        which: "weight" or "input".
    """

    leader: str
    which: str


def allocate_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    memory: str | float | None = None,
    multiply_adds: str | float | None = None,
    loss_fn: LossFunction | None = None,
) -> RankAllocation:
    """Choose the rank of each layer's gradients so that the worst gradient is as good as a budget allows.

    For each layer and some twenty ranks, the cosine between the low-rank and the exact weight gradient is measured on
    the batches, while the other gradients are exact. Then the ranks are allocated: all gradients start with the lowest
    rank, and the gradient with the lowest cosine gets the next rank, as long as the budget allows. Layers with the same
    input, such as query, key and value, get the same rank, so that they still share its projection. Where the
    configuration has low-rank Walsh input gradients, their ranks are allocated along with the others, by the cosine
    between g and its projection. This does not take into account that their errors compound from layer to layer.

    The model is left as it was. To use the ranks, make a new configuration with them; "lhe" and "klt" then have to be
    calibrated with these ranks. Where `torch.distributed` is in use, every process has to call it, with batches of its
    own.

    Args:
        model: A `PeftModel` with LBP-WHT and one active adapter, with or without DDP.
        batches: As in [`lbp_peft.calibrate`]; a list or a DataLoader, since "lhe" and "klt" use them twice.
        memory: The most that the layers may save of their inputs for one batch of this size: "120MiB", bytes, or as a
            multiple of what the present ranks save, such as "1x".
        multiply_adds: The most multiply-adds in the layers' backward pass for one batch: a number, or as a multiple of
            that of the present ranks. The products with W and for dW are counted, and projections as dense ones.
        loss_fn: (model, batch) -> scalar loss. None: `model(**batch).loss`.

    Raises:
        ValueError: neither budget is given, or one is too small or cannot be read; batches is an iterator; no layer
            with a trained weight has tokens on a known grid; or for the reasons of [`lbp_peft.calibrate`].

    Example:
        >>> ranks = lbp_peft.allocate_ranks(model, batches, memory="1x")
        >>> print(ranks)
        >>> config = LBPWHTConfig(r=8, rank_pattern=ranks.rank_pattern, modules_to_save=["classifier"])
    """
    if memory is None and multiply_adds is None:
        raise ValueError('Give a budget: memory="1x" for as much memory as now, or multiply_adds.')
    if iter(batches) is batches:
        raise ValueError("The batches are used twice: give a list or a DataLoader, not an iterator.")
    model = unwrap(model)
    rules = {name: rule for name, layer in layers_of(model).items() if (rule := _active_rule(layer)) is not None}
    selections = {name: [rule.chosen_by] for name, rule in rules.items() if rule.chosen_by is not None}
    statistics: dict[str, TokenStatistics] = {}
    if selections:
        collected = collect(model, batches, loss_fn, selections)
        statistics = {name: one for (name, _), one in collected.statistics.items()}
    curves = _Curves(rules, statistics)
    number, _ = observe(model, batches, loss_fn, rules, curves.add)
    options, present, leaders, cosines = curves.measurements(number, device_of(model))
    if not any(key.which == _WEIGHT for key in options):
        raise ValueError("No layer with a trained weight has tokens on a known grid: there are no ranks to allocate.")
    total = [sum(getattr(one, cost) for one in present.values()) for cost in ("memory", "multiply_adds")]
    chosen = allocate(options, _budget(memory, total[0]), _budget(multiply_adds, total[1]))
    of_layers = {
        which: {name: chosen[_Gradient(leader, which)] for name, leader in leaders.items() if (name, which) in cosines}
        for which in (_WEIGHT, _INPUT)
    }
    return RankAllocation(
        {name: one.rank for name, one in of_layers[_WEIGHT].items() if one.rank is not None},
        {name: one.rank for name, one in of_layers[_INPUT].items()},
        {name: cosines[name, _WEIGHT][one.rank] for name, one in of_layers[_WEIGHT].items() if one.rank is not None},
        sum(one.memory for one in chosen.values()),
        sum(one.multiply_adds for one in chosen.values()),
        min(one.cosine for key, one in present.items() if key.which == _WEIGHT),
        *total,
    )


class _Curves:
    """Cosines and costs of the layers' gradients by rank, summed over calls.

    Args:
        rules: The rule of each layer, by the layer's name.
        statistics: The statistics of each layer that is calibrated, by the layer's name.
    """

    def __init__(self, rules: dict[str, BackwardRule], statistics: dict[str, TokenStatistics]):
        self._bases = {name: _RankedBases.of(name, rule, statistics.get(name)) for name, rule in rules.items()}
        self._input_bases = {
            name: _RankedBases.of_walsh(rule.input_gradient.basis)
            for name, rule in rules.items()
            if isinstance(rule.input_gradient, FixedBasis)
        }
        # (name, which gradient, rank) -> calls, cosines, bytes and multiply-adds
        self._sums: dict[tuple[str, str, int], Tensor] = {}
        self._leaders: dict[str, str] = {}

    def add(self, seen: Observation) -> None:
        """Add one call of a layer."""
        if self._leaders.setdefault(seen.name, seen.shares_with) != seen.shares_with:
            self._leaders[seen.name] = seen.name
        if seen.trains_weight and (bases := self._bases[seen.name]) is not None:
            exact = _weight_gradient(seen.x, seen.g)
            self._add(
                seen, _WEIGHT, bases, lambda project: _cosine(_weight_gradient(project(seen.x), project(seen.g)), exact)
            )
        if seen.needs_input_gradient and (bases := self._input_bases.get(seen.name)) is not None:
            norm = seen.g.norm()
            self._add(seen, _INPUT, bases, lambda project: project(seen.g).norm() / norm if norm > 0 else norm + 1)

    def _add(
        self,
        seen: Observation,
        which: str,
        bases: _RankedBases,
        cosine_of: Callable[[Callable[[Tensor], Tensor]], Tensor],
    ) -> None:
        num_images, num_tokens, c_in = seen.x.shape
        c_out = seen.g.shape[2]
        for rank in bases.ranks:
            basis = bases.make(rank)
            kept = num_coefficients(seen.layout, basis)
            is_exact = kept == num_tokens
            layer_projection = projection(seen.layout, basis, seen.x.dtype, seen.x.device)
            cosine = 1.0 if layer_projection is None else float(cosine_of(layer_projection.project))
            saved = num_images * kept * c_in * seen.x.dtype.itemsize if which == _WEIGHT else 0
            projecting = 0 if is_exact else kept * num_tokens * (c_in + c_out)
            values = [1.0, cosine, saved, num_images * (kept * c_in * c_out + projecting)]
            row = torch.tensor(values, dtype=torch.float64)
            key = seen.name, which, _EXACT if is_exact and which == _INPUT else rank
            self._sums[key] = self._sums[key] + row if key in self._sums else row
            if is_exact:
                break

    def measurements(self, num_batches: int, device: torch.device) -> _Measurements:
        """The measurements of all processes. Every process has to call this."""
        counted: dict[Any, Tensor] = {("", "", 0): torch.tensor([float(num_batches)], dtype=torch.float64)}
        sums = sum_over_processes(counted | self._sums, device)
        number = float(sums.pop(("", "", 0)))
        if number == 0:
            raise ValueError("There are no batches to measure by.")
        leaders = agreed_leaders(self._leaders)
        rows: dict[_Gradient, dict[int, list[tuple[float, float, float]]]] = {}
        members: dict[_Gradient, str] = {}
        for (name, which, rank), row in sums.items():
            calls, cosine, memory, multiply_adds = row.tolist()
            key = _Gradient(leaders[name], which)
            members.setdefault(key, name)
            rows.setdefault(key, {}).setdefault(rank, []).append(
                (cosine / calls, memory / number, multiply_adds / number)
            )
        options = {
            key: [
                Option(
                    None if rank == _EXACT else rank,
                    min(of_layers)[0],
                    of_layers[0][1],
                    sum(row[2] for row in of_layers),
                )
                for rank, of_layers in sorted(by_rank.items())
                if len(of_layers) == max(map(len, by_rank.values()))  # ranks that were tried for all of its layers
            ]
            for key, by_rank in rows.items()
        }
        present = {}
        for key, of_key in options.items():
            bases = (self._bases if key.which == _WEIGHT else self._input_bases)[members[key]]
            assert bases is not None
            up_to_present = [option for option in of_key if option.rank is not None and option.rank <= bases.present]
            is_exact = of_key[-1].rank is None and len(up_to_present) == len(of_key) - 1
            present[key] = of_key[-1] if is_exact else up_to_present[-1]
        cosines: dict[tuple[str, str], dict[int, float]] = {}
        for (name, which, rank), row in sums.items():
            cosines.setdefault((name, which), {})[rank] = float(row[1] / row[0])
        return _Measurements(options, present, leaders, cosines)


class _Measurements(NamedTuple):
    """The options for the ranks of gradients.

    Attributes:
        options: The options of each gradient, by ascending rank.
        present: The option of each gradient that has its present rank.
        leaders: The name of the first layer with the same input, by the name of each layer.
        cosines: The cosine at each rank, by the name of the layer and the gradient, for this layer alone.
    """

    options: dict[_Gradient, list[Option]]
    present: dict[_Gradient, Option]
    leaders: dict[str, str]
    cosines: dict[tuple[str, str], dict[int, float]]


class _RankedBases(NamedTuple):
    """The bases that a gradient may have, by rank.

    Attributes:
        make: A function from the rank to the basis.
        ranks: The ranks to try, ascending.
        present: The rank in the present configuration.
    """

    make: Callable[[int], Basis]
    ranks: list[int]
    present: int

    @staticmethod
    def of(name: str, rule: BackwardRule, statistics: TokenStatistics | None) -> _RankedBases | None:
        """The bases of a weight gradient; None if there are no statistics by which to choose them."""
        selection = rule.chosen_by
        if selection is None:
            return _RankedBases.of_walsh(rule.weight_basis)
        if statistics is None:
            return None
        made: dict[int, Basis] = {}

        def make(rank: int) -> Basis:
            if rank not in made:
                made[rank] = choose_basis(name, replace(selection, r=rank), statistics)
            return made[rank]

        return _RankedBases(make, _ranks(selection.r, selection.block_size**2), selection.r)

    @staticmethod
    def of_walsh(basis: Basis) -> _RankedBases | None:
        """The bases of a selection of Walsh functions; None for any other basis, which has no rank."""
        if isinstance(basis, BasisSet):
            make: Callable[[int], Basis] = lambda rank: replace(basis, r=rank)  # noqa: E731
            return _RankedBases(make, _ranks(basis.r, basis.block_size**2), basis.r)
        if isinstance(basis, ListedBasis):
            length = len(basis.pairs)
            return _RankedBases(lambda r: replace(basis, pairs=basis.pairs[:r]), _ranks(length, length), length)
        return None


def _ranks(present: int, largest: int) -> list[int]:
    return sorted({one for one in (*RANKS, present, largest) if one <= largest})


def _weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """(N, L, C_in), (N, L, C_out) -> (C_out, C_in)"""
    return g.flatten(0, 1).t() @ x.flatten(0, 1)


def _cosine(gradient: Tensor, exact: Tensor) -> Tensor:
    """The cosine of two tensors; 1 if both are zero."""
    norms = gradient.norm() * exact.norm()
    return (gradient * exact).sum() / norms if norms > 0 else torch.tensor(float(not exact.any()))


def _budget(given: str | float | None, present: float) -> float:
    """A budget as a number; infinite if none is given.

    Args:
        given: The budget as the user writes it.
        present: The cost of the present ranks, of which the budget may be a multiple.
    """
    bounds = Bounds.parse(memory=given)
    if bounds.memory is None:
        return math.inf
    # The small excess keeps "1x" within the budget in spite of rounding.
    return bounds.memory * present * (1 + 1e-9) if bounds.memory_is_relative else bounds.memory


def _active_rule(layer: LBPWHTLayer) -> BackwardRule | None:
    """The rule of the active adapter; None if no LBP-WHT adapter is active in the layer.

    Raises:
        ValueError: several are active.
    """
    active = [layer.lbpwht_rule[name] for name in layer.active_adapters if name in layer.lbpwht_rule]
    if len(active) > 1:
        raise ValueError("Ranks are allocated for one adapter at a time: activate one with model.set_adapter(name).")
    return active[0] if active else None
