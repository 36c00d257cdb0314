"""The bases that calibration chose, in the checkpoint of an adapter.

They are neither parameters nor buffers of the layers: a cast of the model would round them, and whatever wraps a model
for training would treat them as weights. They are written to the adapter's state dict, and taken out of it when it is
loaded.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..bases.base import Basis
from ..bases.calibrated import LeftOutBasis
from ..calibration import CalibratedSelection
from .compat.wrappers import without_wrappers
from .layers.base import LBPWHTLayer
from .validation.checkpoint import refuse_checkpoint

KEYS = ".lbpwht_basis."  # between the name of the layer and that of the tensor
_PREFIX = "base_model.model."


def calibrated_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of all bases that were calibrated for an adapter, by their keys in its checkpoint."""
    return {
        f"{name}{KEYS}{key}": tensor
        for name, layer in _calibrated_layers(model, adapter_name).items()
        for key, tensor in layer.lbpwht_rule[adapter_name].weight_basis.state().items()
    }


def take_bases(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> tuple[dict[LBPWHTLayer, Basis], dict[str, Tensor]]:
    """Split a checkpoint into the bases, by layer, and its other tensors. The layers are not changed.

    If the checkpoint is refused, an adapter that was only just created to hold it is removed again.

    Raises:
        ValueError: the tensors of a layer are not those of a basis that its settings could have chosen.
    """
    layers = _calibrated_layers(model, adapter_name)
    states: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state_dict.items():
        name, separator, tensor_name = key.partition(KEYS)
        layer_name = next((known for known in (name, name.removeprefix(_PREFIX)) if known in layers), None)
        if separator and layer_name is not None:
            states.setdefault(layer_name, {})[tensor_name] = tensor
        else:
            rest[key] = tensor
    bases = {}
    for name, state in states.items():
        selection = layers[name].lbpwht_rule[adapter_name].chosen_by
        assert selection is not None
        try:
            bases[layers[name]] = selection.restore(state)
        except ValueError as error:
            refuse_checkpoint(
                model,
                adapter_name,
                f"The basis of {name} in this checkpoint does not fit adapter {adapter_name!r}: {error}. Check that "
                "its adapter_config.json is the one that it was saved with.",
            )
    return bases, rest


def put_bases(model: nn.Module, bases: dict[LBPWHTLayer, Basis], adapter_name: str) -> None:
    """Make an adapter use these bases. A layer without a basis in a calibrated checkpoint counts as left out."""
    distinct: dict[Basis, Basis] = {}  # equal bases become one object, so that its matrices are made once
    for layer in _calibrated_layers(model, adapter_name).values() if bases else ():
        rule = layer.lbpwht_rule[adapter_name]
        if layer in bases:
            basis = distinct.setdefault(bases[layer], bases[layer])
            layer.lbpwht_rule[adapter_name] = replace(rule, weight_basis=basis)
        elif isinstance(rule.weight_basis, CalibratedSelection):
            left_out = LeftOutBasis("the checkpoint that was loaded has no basis for it")
            layer.lbpwht_rule[adapter_name] = replace(rule, weight_basis=left_out)


def _calibrated_layers(model: nn.Module, adapter_name: str) -> dict[str, LBPWHTLayer]:
    """The layers whose basis for an adapter is or will be calibrated, by their names in a state dict."""
    return {
        without_wrappers(name): module
        for name, module in model.named_modules()
        if isinstance(module, LBPWHTLayer)
        and adapter_name in module.lbpwht_rule
        and module.lbpwht_rule[adapter_name].chosen_by is not None
    }
