"""Low-rank backpropagation through a layer that another PEFT method adapts."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...bases.grids import TokenLayout
from ...formats.products import FULL
from ...layer_types import is_plain_linear, layer_type_of
from ...layout import LayoutFinder
from ...ops.branches import Branch
from ...ops.linear import low_rank_linear
from ...ops.plan import BackwardPlan, ExactProduct
from ...ops.recompute import low_rank_layer
from ..layers.base import LBPWHTLayer, check_image_layout
from ..layers.calling import (
    SIDE_EFFECTS,
    call_eagerly,
    has_own_forward,
    has_to_be_called,
    has_to_be_called_for,
    is_offloaded,
    replace_forward,
    rerun_has_side_effects,
)
from ..layers.rule import BackwardRule
from ..patches.forward_patch import ForwardPatch, UnpatchedForward, plain_forward


class LBPWHTStacked(nn.Module, ForwardPatch, LBPWHTLayer):
    """Patches a layer that another method adapts, its host, see [`ForwardPatch`].

    Args:
        finder: Finds where tokens lie; shared by all layers of the model.
        layer_name: The name of the host in the model, for messages.
        rules: The rules of the LBP-WHT adapters, by name. The first adapter is active.
    """

    adapter_layer_names = ()
    weight = bias = None  # so that PEFT does not search for a base layer here endlessly

    def __init__(self, finder: LayoutFinder, layer_name: str, rules: dict[str, BackwardRule]):
        super().__init__()
        LBPWHTLayer.__init__(self, finder, layer_name)
        self._active_adapter = next(iter(rules))
        self.lbpwht_rule.update(rules)
        self._on_images = False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: there are no weights to merge."""

    def unmerge(self) -> None:
        """Do nothing: no weights were merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: there are no weights to move."""

    def _shape_of_tokens(self, x: Tensor) -> torch.Size:
        return x.movedim(1, -1).shape if self._on_images and x.dim() > 2 else x.shape

    def _channels_axis(self, x: Tensor) -> int:
        return 1 if self._on_images else -1

    def _check_layout(self, x: Tensor, layout: TokenLayout) -> None:
        if self._on_images:
            check_image_layout(x, layout)

    def run(self, host: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward pass."""
        plain = plain_forward(host)
        base = self._base_layer(host)
        layer_type = layer_type_of(base)
        self._on_images = layer_type is not None and layer_type.channels_axis == 1
        if self.disable_adapters or args or kwargs:
            self._note_call(x)
            return plain(host, x, *args, **kwargs)
        rule = self._rule_for(x)
        if rule is None:
            return plain(host, x)
        parts = None if self._on_images else _lora_parts(host, x)
        plan = self._plan(x, base, _is_trained(host, parts), rule)
        if plan is None:
            return plain(host, x)
        if parts is None:
            return self._run_as_a_whole(host, x, plan)
        if base is host or not _have_to_be_called(base, parts, x):
            branches = _branches(host, x, parts)
            return self._as_one_operation(
                x,
                lambda: low_rank_linear(
                    x, base.weight, base.bias, plan=plan, branches=branches, exact_forward=rule.exact_forward
                ),
            )
        linears = [base, *(part for lora_parts in parts for part in (lora_parts.down, lora_parts.up))]
        self._check_values(linears)
        if any(has_own_forward(part) for part in linears):
            return self._run_as_a_whole(host, x, plan)
        return call_eagerly(_call_parts, self, host, x, linears, plan)

    def _run_as_a_whole(self, host: Any, x: Tensor, plan: BackwardPlan) -> Tensor:
        """The host's forward pass. Its backward pass runs the host again, on few rows."""
        plain = plain_forward(host)
        full_plan = self._in_full_precision(x, plan)
        if full_plan is None:
            return plain(host, x)
        if rerun_has_side_effects(host):
            self._fall_back(x, *SIDE_EFFECTS)
            return plain(host, x)
        layer = _ChannelsLast(UnpatchedForward(host), x.dim()) if self._on_images else UnpatchedForward(host)
        tokens = x.movedim(1, -1) if self._on_images else x
        fingerprint = functools.partial(_adapters_in_use, host)
        if not self._is_token_wise(layer, tokens, (fingerprint(), host.training)):
            return plain(host, x)

        def run() -> Tensor:
            y = low_rank_layer(layer, tokens, plan=full_plan, fingerprint=fingerprint)
            return y.movedim(-1, 1) if self._on_images else y

        return self._as_one_operation(x, run)

    def _check_values(self, linears: list[nn.Linear]) -> None:
        """Raise RuntimeError if a part of the host has no values."""
        if any(part.weight.is_meta and not is_offloaded(part) for part in linears):
            raise RuntimeError(
                f"The adapter in {self.layer_name} has no values and cannot be trained, since the base model was "
                "offloaded before it was adapted. Do not offload the model for training; for inference, adapt it "
                "first."
            )

    def _trains_whole_weight(self, base: Any) -> bool:
        return bool(base.weight.requires_grad)

    def _base_layer(self, host: Any) -> Any:
        return host.get_base_layer() if isinstance(host, BaseTunerLayer) else host

    def __repr__(self) -> str:
        return f"lbpwht.LBPWHTStacked({', '.join(self.lbpwht_rule)})"


def _is_trained(host: Any, parts: list[_LoraParts] | None) -> bool:
    """Whether a parameter of the host is trained.

    Given the parts of its active LoRA adapters, only these and the base layer are examined, which is faster.
    """
    if parts:
        linears = (host.base_layer, *(part for lora_parts in parts for part in (lora_parts.down, lora_parts.up)))
        tensors = (tensor for part in linears for tensor in (part.weight, part.bias))
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if any(parameter.requires_grad for parameter in host.parameters()):
        return True
    # FSDP1 puts plain tensors in the place of parameters while a layer runs.
    attributes = (value for module in host.modules() for value in vars(module).values())
    return any(isinstance(value, Tensor) and value.requires_grad for value in attributes)


class _ChannelsLast(nn.Module):
    """A layer for (N, C, H, W) or (N, C, L), made a layer for (N, H, W, C) or (N, L, C)."""

    def __init__(self, layer: nn.Module, num_axes: int):
        super().__init__()
        self.layer = layer
        self.num_axes = num_axes

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3 and self.num_axes == 4:
            return self.layer(x.movedim(1, -1)[..., None])[..., 0].movedim(1, -1)
        return self.layer(x.movedim(-1, 1)).movedim(1, -1)


def _adapters_in_use(host: object) -> tuple[str, ...]:
    """The adapters that a host computes with. Merging changes weights, but not their version counters."""
    names = ("active_adapters", "disable_adapters", "merged_adapters")
    return tuple(str(getattr(host, name, None)) for name in names)


def _call_parts(layer: LBPWHTStacked, host: Any, x: Tensor, linears: list[nn.Linear], plan: BackwardPlan) -> Tensor:
    """The host's own forward pass, in which each linear part has a low-rank backward pass of its own."""
    base = linears[0]
    plan_of_factor = plan.with_precision(FULL)

    def forward(part: nn.Linear, z: Tensor) -> Tensor:
        if z.shape[:-1] != x.shape[:-1]:  # a hook has changed the shape of the tokens
            return F.linear(z, part.weight, part.bias)
        part_plan = plan if part is base else plan_of_factor
        if part.weight.shape[1] != base.weight.shape[1]:  # the second factor of LoRA, whose input has r features
            part_plan = replace(plan_of_factor, input_gradient=ExactProduct())
        return layer._as_one_operation(z, lambda: low_rank_linear(z, part.weight, part.bias, plan=part_plan))

    with ExitStack() as stack:
        for part in linears:
            stack.enter_context(replace_forward(part, functools.partial(forward, part)))
        output: Tensor = plain_forward(host)(host, x)
        return output


class _LoraParts(NamedTuple):
    """The modules of one active adapter of a LoRA layer."""

    down: nn.Linear
    up: nn.Linear
    dropout: nn.Module
    scaling: float


def _lora_parts(host: Any, x: Tensor) -> list[_LoraParts] | None:
    """The parts of each active adapter of a LoRA layer; [] for a plain layer, None for any other layer.

    Computing with these parts is faster than running the layer again.
    """
    if is_plain_linear(host):
        return []
    if plain_forward(host) is not lora.Linear.forward or not is_plain_linear(host.base_layer):
        return None
    if host.disable_adapters:
        return None if host.merged else []
    if host.merged:
        return []
    all_parts = []
    for name in host.active_adapters:
        if name not in host.lora_A:
            continue
        down, up, dropout = host.lora_A[name], host.lora_B[name], host.lora_dropout[name]
        plain = all(is_plain_linear(part) for part in (down, up)) and type(dropout) in (nn.Dropout, nn.Identity)
        if name in host.lora_variant or not plain:
            return None
        if down.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return None  # the layer casts its input and its output
        all_parts.append(_LoraParts(down, up, dropout, host.scaling[name]))
    return all_parts


def _branches(host: Any, x: Tensor, parts: list[_LoraParts]) -> list[Branch]:
    """The low-rank updates that these modules make."""
    branches = []
    for down, up, dropout, scaling in parts:
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        dropped_x = dropout(host._cast_input_dtype(x, down.weight.dtype)) if drops else None
        branches.append(Branch(down.weight, up.weight, up.bias, scaling, dropped_x))
    return branches


def _have_to_be_called(base: nn.Module, parts: list[_LoraParts], x: Tensor) -> bool:
    """Whether reading the weights of these modules, instead of calling them, would fail or have another effect."""
    if has_to_be_called_for(base, x):
        return True
    return any(
        has_to_be_called_for(down, x) or has_to_be_called_for(up, x) or has_to_be_called(dropout)
        for down, up, dropout, _ in parts
    )
