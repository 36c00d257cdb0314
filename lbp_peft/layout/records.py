"""Records of what is known about the inputs of a model's layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bases.grids import TokenLayout
from ..transforms import outside_transforms
from .grid_reading import NoTokensError, SingleTokenError, UnknownLayoutError
from .positions import FIRST_TEXT, mix
from .recognition import read_layout
from .tracer import PositionTracer
from .trails import Origin


@dataclass(frozen=True)
class LayoutRecord:
    """What the tracer found about the input of one call of a layer.

    Attributes:
        layout: The layout of its tokens; None if it is not known.
        why_unknown: The reason why it is not known.
        remedy: What the user can do about it.
        origin: The name of the layer that its tokens are followed from, such as the patch embedding, or of the model's
            argument; "" if they are not followed.
        steps: The number of operations since then.
        text: The name of the input that the tokens are words of; "" for patches of an image.
        shape: The shape of the input, without channels.
        is_surprising: Whether the layer might have had a low-rank backward pass if the layout were known.
        source: The number of the input that the tokens come from.
    """

    layout: TokenLayout | None = None
    why_unknown: str = ""
    origin: str = ""
    steps: int = 0
    text: str = ""
    shape: tuple[int, ...] = ()
    is_surprising: bool = True
    source: int = 0
    remedy: str = UnknownLayoutError.remedy


NOT_TRACED = LayoutRecord(
    why_unknown="it was called in another way than in the forward pass in which the model was traced",
    remedy="Give the layers inputs of the same shapes in each pass with the same inputs, or set grid_size.",
)
CALLED_ALONE = LayoutRecord(why_unknown="it was called by itself, so that its input cannot be followed from an image")


def read_record(tracer: PositionTracer, texts: dict[int, str], x: Tensor, channels_axis: int) -> LayoutRecord:
    """The record of the input x of a layer in a pass that is being traced.

    Args:
        tracer: The tracer, which has to be paused.
        texts: Names of the model's texts, by their numbers as inputs.
        x: The layer's input.
        channels_axis: The axis of the channels in x.
    """
    trail, shape = tracer.trail(x), token_shape(x, channels_axis)
    if trail is None:
        why = "its tokens do not come from the model's input"
        return LayoutRecord(None, why, shape=shape, is_surprising=x.dim() > 2)
    lost = f" (positions were lost in {trail.lost_by!r})" if trail.lost_by else ""
    if not trail.is_certain and channels_axis == -1:
        why = "its input may have its channels along either of two axes"
        return LayoutRecord(None, why, shape=shape)
    if trail.positions is None:
        return LayoutRecord(None, f"it is not known where its tokens lie{lost}", shape=shape)
    record = record_of_positions(trail.positions, x, channels_axis)
    text = texts.get(record.source, "") if record.source >= FIRST_TEXT else ""
    why_unknown = record.why_unknown and record.why_unknown + lost
    origin = trail.origins.get(record.source, Origin(""))
    return replace(record, why_unknown=why_unknown, origin=origin.name, steps=origin.steps, text=text)


def record_of_positions(positions: Tensor, x: Tensor, channels_axis: int) -> LayoutRecord:
    """The record of an input x whose elements have these positions."""
    shape = token_shape(x, channels_axis)
    with outside_transforms(), torch.no_grad():
        try:
            recognised = read_layout(mix(positions, channels_axis).squeeze(channels_axis))
        except UnknownLayoutError as error:
            benign = (SingleTokenError, NoTokensError) if x.dim() == 2 else SingleTokenError
            is_surprising = not isinstance(error, benign)
            return LayoutRecord(None, str(error), shape=shape, is_surprising=is_surprising, remedy=error.remedy)
    return LayoutRecord(recognised.layout, shape=shape, source=recognised.source)


def positions_of_tokens(tracer: PositionTracer, x: Tensor, channels_axis: int) -> Tensor | None:
    """The position of each token of x, in its shape without channels."""
    positions = tracer.positions(x)
    return None if positions is None else mix(positions, channels_axis).squeeze(channels_axis)


def matching_record(records: list[LayoutRecord], number: int, shape: tuple[int, ...]) -> LayoutRecord:
    """The record of the same call in the traced pass, or else the only record with this number of tokens."""
    if number < len(records) and fits(records[number], shape):
        return records[number]
    others = {(r.layout, r.text): r for r in records if r.layout is not None and fits(r, shape)}
    return next(iter(others.values())) if len(others) == 1 else NOT_TRACED


def fits(record: LayoutRecord, shape: tuple[int, ...]) -> bool:
    """Whether an input has as many tokens along each axis as in a record; its shape is given without channels.

    The other axes run over images or windows, of which there may be fewer, as in stochastic depth.
    """
    layout = record.layout
    if layout is None:
        return True
    if len(shape) != len(record.shape):
        return False
    if layout.axes is None:
        return shape[1:] == record.shape[1:]
    return all(shape[axis] == record.shape[axis] for axis in layout.axes)


def num_tokens(shape: tuple[int, ...], axes: tuple[int, ...] | None = None) -> int:
    """The number of tokens along some axes of a shape without channels; None: along all axes but the first."""
    return math.prod(shape[1:] if axes is None else (shape[axis] for axis in axes if axis < len(shape)))


def token_shape(x: Tensor, channels_axis: int) -> tuple[int, ...]:
    """The shape of an input without its axis of channels."""
    shape = list(x.shape)
    del shape[channels_axis]
    return tuple(shape)
