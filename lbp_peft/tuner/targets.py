"""Finds the layers to adapt by following the patches of an image through one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import adaptable_layers, encoder_linears
from ..encoder_of_pass import PassedLayer, encoder_of_pass
from ..layout.inputs import assign_positions, merge_size, named_inputs
from ..layout.records import read_record
from ..layout.tracer import PositionTracer
from ..measure.undisturbed import undisturbed
from .layers.base import LBPWHTLayer


def targets_from(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """The layers that patches of an image pass through in the encoder, for `target_modules`.

    Without `target_modules`, the layers are chosen by the model's structure, before any image has been seen. This
    function runs one forward pass instead and follows the tokens. It returns the layers that

    - receive tokens of an image whose places are known, and more than one of each image, or words in a model of text,
    - run between the first and the last layer of the encoder's blocks: embeddings come before these, and heads,
      projectors and decoders after them. Blocks that the structure does not tell count as well, if there are several
      with layers in a module of the same class,
    - belong to the encoder: to the part that is given images and no text, if there is one, and not to a decoder. The
      name of a class tells a decoder or a head only after the other blocks, and if these have more weights.

    Unlike the default, it finds blocks that the structure does not reveal, and leaves out layers that would be exact.

    Args:
        model: The model, before `get_peft_model`. One forward pass is run in training mode; modes, buffers and random
            number generators are restored.
        batch: The model's keyword arguments.

    Returns:
        The names of the layers, in the order in which they run.

    Raises:
        ValueError: the model has LBP-WHT layers already, or no layer receives tokens whose places are known.
        TypeError: the batch is not a mapping of arguments.
    """
    if not isinstance(batch, Mapping) or not batch:
        raise TypeError('batch must be the keyword arguments of the model, such as {"pixel_values": pixel_values}.')
    if any(isinstance(module, LBPWHTLayer) for module in model.modules()):
        raise ValueError("The model has LBP-WHT layers already. Call targets_from before get_peft_model.")
    targets = encoder_of_pass(model, _layers_with_tokens(model, batch), set(encoder_linears(model)))
    if not targets:
        raise ValueError(
            "No layer of an encoder receives tokens whose places are known. Name the layers in target_modules, and the "
            "grid in grid_size."
        )
    return targets


def _layers_with_tokens(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, PassedLayer]:
    """The layers whose inputs are tokens with known places in all calls, by name, in the order of their first calls.

    Words count if no layer receives patches.
    """
    tracer = PositionTracer(model)
    kinds: dict[str, set[str]] = {}
    layers: dict[str, PassedLayer] = {}
    with undisturbed(model), torch.compiler.set_stance("force_eager"), ExitStack() as stack:
        model.train()
        texts = assign_positions(tracer, named_inputs(model, (), dict(batch)), merge_size(model))

        def note(name: str, axis: int, module: nn.Module, args: tuple) -> None:
            with tracer.paused(), torch.no_grad():
                kind = _kind_of_tokens(tracer, texts, args[0], axis) if args else ""
            kinds.setdefault(name, set()).add(kind)

        def note_sizes(name: str, axis: int, module: nn.Module, args: tuple, output: Tensor) -> None:
            if args:
                layers[name] = PassedLayer(name, args[0].shape[axis], output.shape[axis])

        for name, layer_type in adaptable_layers(model).items():
            layer, axis = model.get_submodule(name), layer_type.channels_axis
            stack.callback(layer.register_forward_pre_hook(partial(note, name, axis)).remove)
            stack.callback(layer.register_forward_hook(partial(note_sizes, name, axis)).remove)
        stack.enter_context(tracer)
        stack.enter_context(torch.enable_grad())  # as in training, since some models run other code without gradients
        model(**batch)
    of_images = {name: layers[name] for name, of_calls in kinds.items() if of_calls == {"patches"}}
    return of_images or {name: layers[name] for name, of_calls in kinds.items() if of_calls == {"words"}}


def _kind_of_tokens(tracer: PositionTracer, texts: dict[int, str], x: Tensor, channels_axis: int) -> str:
    """Whether an input is "patches", that an embedding has made of an image, or "words"; "" if it is neither."""
    record = read_record(tracer, texts, x, channels_axis)
    trail = tracer.trail(x)
    if record.layout is None or trail is None:
        return ""
    if record.text:
        return "words"
    origin = trail.origins.get(record.source)
    return "patches" if origin is not None and origin.is_layer else ""
