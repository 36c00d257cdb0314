"""Checks the recorded layouts of a model by changing pixels of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..bases.basis_set import BasisSet
from ..bases.packed import PackedLayout
from ..layout.positions import FIRST_TEXT, UNITS_PER_PIXEL, column_of, row_of, source_of
from ..ops.tokens import as_tokens
from ..projection import SeparableProjection
from .layers.base import LBPWHTLayer

# The places near which images are changed, as fractions of height and width.
_PLACES = ((0.03, 0.03), (0.03, 0.97), (0.97, 0.03), (0.53, 0.28))


@dataclass(frozen=True)
class LayoutCheck:
    """The result of [`verify_layout`]. Printed, it is a summary.

    Attributes:
        confirmed: Layers in which the tokens changed at the place of the changed pixels, and nowhere else.
        after_mixing: Layers in which most tokens change with any part of the image, because attention or a similar
            operation precedes them. Their layout follows from that of earlier layers.
        unknown: Layers without a known layout; their backward pass is exact.
        left_out: Linear layers that are not adapted although patches of an image pass through them on the way from the
            first adapted layer to the last one, as in a block that was not recognised or was excluded. Embeddings
            come before these layers, heads and decoders after them.
        problems: Descriptions of contradictions to the layouts; empty if there are none.
    """

    confirmed: tuple[str, ...]
    after_mixing: tuple[str, ...]
    unknown: tuple[str, ...]
    problems: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no contradictions to the layouts."""
        return not self.problems

    def __str__(self) -> str:
        counts = (("confirmed", self.confirmed), ("after mixing", self.after_mixing), ("unknown", self.unknown))
        lines = [f"{len(names)} layers {state}" for state, names in counts]
        lines += [f"not adapted, though patches pass through: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, *(self.problems or ["no contradictions"])])


def verify_layout(model: nn.Module, batch: Mapping[str, object]) -> LayoutCheck:
    """Change an image in a few places and check which tokens of the adapted layers change.

    The tokens that change must be those recorded at the changed place. Also, projecting the inputs of each layer onto
    all bases of its layout and lifting them back must reproduce the inputs, so that gradients at full rank are exact.

    Args:
        model: A model with LBP-WHT layers. Five forward passes are run in training mode; the modes, the buffers and the
            state of the random number generators are restored.
        batch: The model's keyword arguments, with images as a floating-point tensor, such as `pixel_values`
            (N, C, H, W).

    Raises:
        ValueError: there are no LBP-WHT layers, or the batch has no images.
    """
    layers = {m.layer_name: m for m in model.modules() if isinstance(m, LBPWHTLayer)}
    if not layers:
        raise ValueError("The model has no LBP-WHT layers: there is no layout to verify.")
    images = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()}
    name, image = max(images.items(), key=lambda item: item[1].dim(), default=("", None))
    if image is None or image.dim() < 4:
        raise ValueError("The batch has no images, as a tensor (N, C, H, W), whose places could be changed.")
    finder = next(iter(layers.values())).finder
    height, width = image.shape[-2:]
    with _training_mode(model), torch.random.fork_rng([image.device] if image.device.type == "cuda" else []):
        with finder.record_positions() as positions:
            before = _inputs(model, layers, batch)
        left_out = tuple(layer.name for layer in finder.left_out)
        all_positions = [
            *positions.of_outputs,
            *(p for of_layer in positions.of_inputs.values() for p in of_layer if p is not None),
        ]
        rows, columns = _lines(all_positions, row_of), _lines(all_positions, column_of)
        after = {}
        for down, across in _PLACES:
            pixel = _place_near(down, height, rows), _place_near(across, width, columns)
            changed = image.clone()
            changed[..., pixel[0], pixel[1]] += 10 * image.std() + 1
            after[pixel] = _inputs(model, layers, {**batch, name: changed})
    return replace(_compare(layers, before, after, positions.of_inputs), left_out=left_out)


def _lines(all_positions: list[Tensor], coordinate: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
    """The rows, or the columns, at which tokens of images lie, in pixels, for each of several tensors of positions."""
    lines = (
        coordinate(p[(p >= 0) & (source_of(p) < FIRST_TEXT)]).unique().cpu().numpy() / UNITS_PER_PIXEL
        for p in all_positions
    )
    return list({values.tobytes(): values for values in lines if len(values) > 1}.values())


def _place_near(fraction: float, size: int, line_sets: list[np.ndarray]) -> int:
    """The row or column of pixels, near a fraction of the image's size, at which tokens lie.

    A token is recorded at a place within its patch. Another place of the patch may be nearer to the place of the next
    token: to that of a copy which nearest-neighbour upsampling made of this token, or to the corner of the next patch.

    Args:
        fraction: The fraction.
        size: The height or width of the image.
        line_sets: The rows or columns at which tokens of several layers lie; tokens should lie there in all layers.
    """
    places = np.arange(size)
    far = np.zeros(size)
    for lines in line_sets:
        far += np.abs(places[:, None] - lines).min(axis=1) / np.diff(lines).min()
    target = fraction * size
    is_near = np.abs(places - target) <= max(size / 6, 1)
    return int(min(places[is_near], key=lambda place: (round(float(far[place]), 6), abs(place - target))))


def _inputs(model: nn.Module, layers: dict[str, LBPWHTLayer], batch: Mapping[str, object]) -> dict[str, list[Tensor]]:
    """The inputs of each layer in one forward pass, with the same random numbers in each pass."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    hosts = {id(m): m for m in model.modules()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            host = next((m for m in hosts.values() if getattr(m, "low_rank_backward", None) is layer), layer)

            def note(module: nn.Module, args: tuple, name: str = name) -> None:
                inputs[name].append(args[0].detach())

            stack.callback(host.register_forward_pre_hook(note).remove)
        torch.manual_seed(0)
        with torch.enable_grad():  # as in training, since some models run other code without gradients
            model(**batch)
    return inputs


def _compare(
    layers: dict[str, LBPWHTLayer],
    before: dict[str, list[Tensor]],
    after: dict[tuple[int, int], dict[str, list[Tensor]]],
    positions: dict[str, list[Tensor | None]],
) -> LayoutCheck:
    """Compare the changes in the inputs of all layers with the recorded positions.

    Args:
        layers: The layers, by name.
        before: The inputs of each layer, call by call.
        after: The same after the change of a pixel, by the pixel.
        positions: The recorded positions of the tokens of these inputs.
    """
    confirmed, mixed, unknown, problems = [], [], [], []
    for name, layer in layers.items():
        places = [p for p in positions.get(name, []) if p is not None]
        if len(places) != len(before[name]) or not places:
            unknown.append(name)
            continue
        if why := _why_not_identity(layer, before[name]):
            problems.append(f"{name}: {why}")
        axis = layer._channels_axis(before[name][0])
        states = set()
        for pixel, inputs in after.items():
            for x, y, place in zip(before[name], inputs[name], places, strict=True):
                states.add(_compare_tokens(x, y, place, axis, pixel))
        if wrong := states - {"confirmed", "mixed", "unchanged"}:
            problems.append(f"{name}: {wrong.pop()}")
        elif "confirmed" in states:
            confirmed.append(name)
        else:
            mixed.append(name)
    return LayoutCheck(tuple(confirmed), tuple(mixed), tuple(unknown), tuple(problems))


def _compare_tokens(x: Tensor, y: Tensor, places: Tensor, channels_axis: int, pixel: tuple[int, int]) -> str:
    """Compare the places of the tokens that differ with the pixel that was changed.

    Returns:
        "confirmed", "mixed" (most tokens differ), "unchanged", or a description of the contradiction.
    """
    change = (y - x).abs().amax(channels_axis)
    differing = (change > 1e-3 * change.max()) & (change > 0)
    if not bool(differing.any()):
        return "unchanged"
    if differing.sum() > 0.5 * differing.numel() or not bool((places[differing] >= 0).all()):
        return "mixed"
    # The tokens of the grid that are nearest to the pixel, among all places that occur.
    nearest = places >= 0
    for coordinate, changed in ((row_of, pixel[0]), (column_of, pixel[1])):
        lines = coordinate(places[places >= 0]).unique()
        nearest &= coordinate(places) == lines[(lines - UNITS_PER_PIXEL * changed).abs().argmin()]
    if bool((nearest & differing).any()):
        return "confirmed"
    row, column = (int(coordinate(places[differing])[0]) // UNITS_PER_PIXEL for coordinate in (row_of, column_of))
    return f"the pixel {pixel} was changed, but the tokens that changed are recorded at ({row}, {column})"


def _why_not_identity(layer: LBPWHTLayer, inputs: list[Tensor]) -> str:
    """The reason why projecting onto all bases of the recorded layout changes the input; "" if it does not."""
    backward_pass = layer.last_backward
    rule = next(iter(layer.lbpwht_rule.values()))
    if backward_pass is None or backward_pass.layout is None or backward_pass.why_exact:
        return ""
    x = inputs[-1].movedim(layer._channels_axis(inputs[-1]), -1)
    tokens = as_tokens(x, backward_pass.layout).double()
    if not isinstance(rule.weight_basis, BasisSet) or rule.weight_basis.boundary != "orthogonal":
        return ""
    if tokens.shape[1] != backward_pass.layout.num_tokens:
        return "its input does not have the recorded number of tokens"
    basis = replace(rule.weight_basis, r=rule.weight_basis.block_size**2)
    parts = backward_pass.layout.parts if isinstance(backward_pass.layout, PackedLayout) else (backward_pass.layout,)
    lengths = [part.num_tokens for part in parts]
    for part, of_part in zip(parts, tokens.split(lengths, dim=1), strict=True):
        whole = SeparableProjection(part, basis, torch.float64, tokens.device)
        error = (whole.lift(whole.project(of_part)) - of_part).norm() / of_part.norm().clamp(min=1e-30)
        if error >= 1e-6:
            return f"projecting its input onto all bases changes it by {float(error):.1e}"
    return ""


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
