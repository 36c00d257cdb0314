"""Finds the layers to adapt by following the patches of an image through one forward pass."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import adaptable_layers, encoder_linears
from ..encoder_of_pass import PassedLayer, encoder_of_pass, like_blocks
from ..layout.example_inputs import NUM_IMAGES, enlarged, example_inputs, parts_with_images
from ..layout.inputs import assign_positions, merge_size, named_inputs
from ..layout.records import read_record
from ..layout.residual import ResidualParts
from ..layout.tracer import PositionTracer
from ..layout.without_values import NEEDS_VALUES, WithoutValues
from ..measure.running import preserve_state
from .layers.base import LBPWHTLayer

_log = logging.getLogger(__name__)
_MOST_SECONDS = 5.0  # after which no further inputs are tried


def targets_from(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """The layers that patches of an image pass through in the encoder, for `target_modules`.

    Without `target_modules`, the layers are chosen before any image has been seen, by the model's structure and a pass
    of a copy without values, if the model's code can do without. This function runs one forward pass with a batch of
    yours instead. It returns the layers that

    - receive tokens of an image whose places are known, and more than one of each image, or words in a model of text,
    - run between the first and the last layer of the encoder's blocks: embeddings come before these, and heads,
      projectors and decoders after them. Blocks that the structure does not tell count as well, if there are several
      with layers in a module of the same class, or if they have a residual connection,
    - belong to the encoder: to the part that is given images and no text, if there is one, and not to a decoder. The
      name of a class tells a decoder or a head only after the other blocks, and if these have more weights.

    Unlike the default, it also finds single layers between blocks, and leaves out all layers that would be exact.

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
    seen = _follow(model, batch)
    targets = encoder_of_pass(model, seen.with_tokens(), set(encoder_linears(model)), seen.residual)
    if not targets:
        raise ValueError(
            "No layer of an encoder receives tokens whose places are known. Name the layers in target_modules, and the "
            "grid in grid_size."
        )
    return targets


def default_targets(model: nn.Module) -> list[str]:
    """The layers that are adapted if `target_modules` is None; none if there are no blocks of an encoder.

    They are those of the blocks that the model's structure shows, and one forward pass decides where it shows more. It
    is that of a copy without values, on inputs that are made for it, so that it needs no data and hardly any time, and
    leaves the model as it is. Layers in further blocks that patches pass through are added. Layers are left out whose
    input certainly holds no patches: one token of each image, or words where others receive patches. Layers that are
    not called, or whose tokens lie in an unknown order, as those of masked images do, stay.

    The structure alone decides where nothing is known of the model's inputs, where the model cannot run without values,
    and where a pass of a copy might have an effect on the model.

    Args:
        model: The model, before `get_peft_model`; adapters of other methods may be in it.
    """
    blocks = encoder_linears(model)
    if any(isinstance(module, LBPWHTLayer) for module in model.modules()):
        return blocks
    try:
        seen = seen_without_values(model, blocks)
        return blocks if seen is None else seen.targets(model, blocks)
    except Exception as error:  # nobody asked for this pass, so it must not fail
        _log.debug("The structure of %s decides which layers are adapted: %r", type(model).__name__, error)
        return blocks


@dataclass(frozen=True)
class _Seen:
    """What a forward pass shows about the layers of a model.

    Attributes:
        kinds: What each layer received in its calls, by name: "patches" that an embedding has made of an image,
            "words", "one token" of each image, or "" if none of these is certain.
        layers: The layers that were called, by name, in the order of their first calls.
        residual: The names of parts with a residual connection.
    """

    kinds: Mapping[str, Collection[str]]
    layers: Mapping[str, PassedLayer]
    residual: Collection[str]

    def within(self, part: str) -> _Seen:
        """The same of a model in which this one is the part of this name."""
        kinds = {f"{part}.{name}": found for name, found in self.kinds.items()}
        layers = {f"{part}.{name}": replace(layer, name=f"{part}.{name}") for name, layer in self.layers.items()}
        return _Seen(kinds, layers, {f"{part}.{name}" for name in self.residual})

    def and_also(self, other: _Seen) -> _Seen:
        """What this pass and another one, of another part of the model, show together."""
        return _Seen({**self.kinds, **other.kinds}, {**self.layers, **other.layers}, {*self.residual, *other.residual})

    def with_tokens(self) -> dict[str, PassedLayer]:
        """The layers whose inputs are patches in all calls; if there are none, words."""

        def of(kind: str) -> dict[str, PassedLayer]:
            return {name: layer for name, layer in self.layers.items() if self.kinds[name] == {kind}}

        return of("patches") or of("words")

    def without_tokens(self) -> set[str]:
        """The layers whose inputs are certain not to be patches, or not to be several words if there are no patches."""
        others = {"one token", "words"} if any("patches" in found for found in self.kinds.values()) else {"one token"}
        return {name for name, found in self.kinds.items() if found and others.issuperset(found)}

    def targets(self, model: nn.Module, blocks: list[str]) -> list[str]:
        """The layers to adapt by default.

        Args:
            model: The model.
            blocks: The names of the layers in the blocks that the structure shows.
        """
        tokens = self.with_tokens()
        if not tokens:
            return blocks
        chosen = set(blocks) - self.without_tokens()
        further = set(like_blocks(model, tokens.values(), blocks, self.residual)) - set(blocks)
        if further:
            chosen |= further.intersection(encoder_of_pass(model, tokens, set(blocks), self.residual))
        return [name for name, _ in model.named_modules() if name in chosen] or blocks


def seen_without_values(model: nn.Module, blocks: list[str]) -> _Seen | None:
    """What a pass of a copy of a model shows, on inputs made for it; None if none can be made or the copy cannot run.

    Where no inputs can be made for the whole model, for instance since its words have as many places for an image as it
    has tokens, its parts that take images alone are run instead.

    Args:
        model: The model.
        blocks: The names of the layers in the blocks that the structure shows.
    """
    seen = _seen_without_values(model, blocks)
    if seen is not None:
        return seen
    for part in parts_with_images(model):
        of_part = [name.removeprefix(f"{part}.") for name in blocks if name.startswith(f"{part}.")]
        seen_in_part = _seen_without_values(model.get_submodule(part), of_part)
        if seen_in_part is not None:
            seen_in_part = seen_in_part.within(part)
            seen = seen_in_part if seen is None else seen.and_also(seen_in_part)
    return seen


def _seen_without_values(model: nn.Module, blocks: list[str]) -> _Seen | None:
    """[`seen_without_values`] of a model as a whole."""
    mode, seen = WithoutValues(), None
    try:
        seen = _follow_a_copy(model, mode, blocks)
    except Exception as error:  # in any code of the model's; the structure then decides
        _log.debug("The structure of %s decides which layers are adapted: %r", type(model).__name__, error)
    if mode.has_leaked:
        warnings.warn(
            f"To choose the layers to adapt, LBP-WHT ran a copy of {type(model).__name__} on tensors without values, "
            "and code outside the model has kept some of these, for instance in a cache. Where they are used, training "
            "raises an error. Clear the cache, or name the layers in target_modules: then there is no such run.",
            stacklevel=2,
        )
    return seen


def _follow_a_copy(model: nn.Module, mode: WithoutValues, blocks: list[str]) -> _Seen | None:
    began, copied = time.monotonic(), None
    with torch.device("cpu"):  # where tensors without values seem to be
        for inputs in example_inputs(model):
            if time.monotonic() - began > _MOST_SECONDS:
                return None
            copied = copied or mode.copy_of(model)
            if (seen := _follow_copy(copied, mode, inputs)) is None:
                continue
            if seen.without_tokens() & set(blocks) and (larger := enlarged(inputs)) is not None:
                seen = _follow_copy(copied, mode, larger) or seen
            return seen
    return None


def _follow_copy(copied: nn.Module, mode: WithoutValues, inputs: Mapping[str, Tensor]) -> _Seen | None:
    """What a pass of a copy without values shows; None if it does not take these inputs."""
    try:
        return _follow(copied, {name: mode.of(value) for name, value in inputs.items()}, NUM_IMAGES, mode.running())
    except NEEDS_VALUES:  # with other inputs as well
        raise
    except Exception as error:
        _log.debug("%s does not take %s: %r", type(copied).__name__, list(inputs), error)
        return None


def _follow(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_images: int | None = None,
    context: AbstractContextManager[None] | None = None,
) -> _Seen:
    """What one forward pass in training mode shows. Afterwards the model is as before.

    Args:
        model: The model.
        batch: Its keyword arguments.
        num_images: The number of images, or texts, in the batch; None: it does not matter which layers receive one
            token of each.
        context: A context that the pass needs.
    """
    tracer = PositionTracer(model)
    kinds: dict[str, set[str]] = {}
    layers: dict[str, PassedLayer] = {}
    with preserve_state(model), torch.compiler.set_stance("force_eager"), ExitStack() as stack:
        model.train()
        texts = assign_positions(tracer, named_inputs(model, (), dict(batch)), merge_size(model))

        def note(name: str, axis: int, module: nn.Module, args: tuple) -> None:
            with tracer.pause(), torch.no_grad():
                kind = _kind_of_tokens(tracer, texts, args[0], axis) if args else ""
                if not kind and num_images and args and args[0].numel() <= num_images * args[0].shape[axis]:
                    kind = "one token"
            kinds.setdefault(name, set()).add(kind)

        def note_sizes(name: str, axis: int, module: nn.Module, args: tuple, output: Tensor) -> None:
            if args:
                layers.setdefault(name, PassedLayer(name, args[0].shape[axis], output.shape[axis]))

        found = adaptable_layers(model)
        for name, layer_type in found.items():
            layer, axis = model.get_submodule(name), layer_type.channels_axis
            stack.callback(layer.register_forward_pre_hook(partial(note, name, axis)).remove)
            stack.callback(layer.register_forward_hook(partial(note_sizes, name, axis)).remove)
        stack.enter_context(tracer)
        residual = stack.enter_context(ResidualParts(model, _parts_with_several(found)))  # sees the model's code alone
        stack.enter_context(torch.enable_grad())  # as in training, since some models run other code without gradients
        if context is not None:
            stack.enter_context(context)
        model(**batch)
    return _Seen(kinds, layers, residual.found)


def _parts_with_several(names: Iterable[str]) -> list[str]:
    """The names of the parts of a model that contain several of its layers."""
    counts = Counter(name[:place] for name in names for place, character in enumerate(name) if character == ".")
    return [part for part, count in counts.items() if count > 1]


def _kind_of_tokens(tracer: PositionTracer, texts: dict[int, str], x: Tensor, channels_axis: int) -> str:
    """What the input of a layer is, see [`_Seen`]."""
    record = read_record(tracer, texts, x, channels_axis)
    trail = tracer.trail(x)
    if record.layout is None or trail is None:
        return ""
    if record.text:
        return "words"
    origin = trail.origins.get(record.source)
    return "patches" if origin is not None and origin.is_layer else ""
