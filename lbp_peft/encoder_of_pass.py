"""Which of the layers that a forward pass shows belong to the encoder, though its structure may not tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .encoder import of_the_encoder


@dataclass(frozen=True)
class PassedLayer:
    """A layer that patches of an image pass through.

    Attributes:
        name: The layer's name.
        in_features: C_in.
        out_features: C_out.
    """

    name: str
    in_features: int
    out_features: int


def encoder_of_pass(
    model: nn.Module,
    passed: Mapping[str, PassedLayer | None],
    blocks: Collection[str],
    residual: Collection[str] = (),
) -> list[str]:
    """Those of the layers that patches pass through that belong to the encoder.

    They run between the first and the last layer of its blocks: of the blocks that are known, and of parts before and
    after them that are like blocks ([`like_blocks`]). Before known blocks, the name of a class decides nothing. After
    them it tells decoders and heads, unless these have more weights than all the blocks.

    Args:
        model: The model.
        passed: The layers that patches pass through, by name, in the order in which they run; None is enough for those
            in known blocks.
        blocks: The names of the layers in the blocks that are known. If there are none, the parts that are like blocks
            take their place; if there are none of these either, all layers outside decoders and heads are taken.
        residual: The names of parts with a residual connection, see [`lbp_peft.layout.residual.ResidualParts`].
    """
    names = list(passed)
    others = [layer for layer in passed.values() if layer is not None and layer.name not in blocks]
    places = [place for place, name in enumerate(names) if name in blocks]
    like = like_blocks(model, others, [names[place] for place in places], residual)
    if not places:
        blocks = set(of_the_encoder(model, like))
        places = [place for place, name in enumerate(names) if name in blocks]
    if not places:
        return of_the_encoder(model, names)
    before = set(names[: places[-1]])
    found = of_the_encoder(model, [name for name in names if name in blocks or name in like], before)
    of_decoders = set(of_the_encoder(model, like, names)) - set(found)
    if _num_weights(model, of_decoders) > _num_weights(model, found):
        found, before = [*found, *of_decoders], set(names)
    places = [place for place, name in enumerate(names) if name in found]
    return of_the_encoder(model, names[places[0] : places[-1] + 1], before) if places else []


def left_out(model: nn.Module, passed: Mapping[str, PassedLayer | None]) -> list[str]:
    """The layers of the encoder that are not adapted, projections aside.

    Args:
        model: The model.
        passed: The layers that patches pass through, by name, in the order in which they run; None if it is adapted.
    """
    adapted = {name for name, layer in passed.items() if layer is None}
    places = [place for place, layer in enumerate(passed.values()) if layer is None]
    between = list(passed.values())[places[0] : places[-1]] if places else []
    found = dict.fromkeys(without_projections(layer for layer in between if layer is not None))
    others = [layer for layer in passed.values() if layer is not None]
    if set(like_blocks(model, others, adapted)) - {layer.name for layer in found}:
        also = (passed[name] for name in encoder_of_pass(model, passed, adapted))
        found |= dict.fromkeys(without_projections(layer for layer in also if layer is not None))
    names = {layer.name for layer in found}
    return [name for name in passed if name in names]


def without_projections(layers: Iterable[PassedLayer]) -> list[PassedLayer]:
    """Layers without projections: single layers, and siblings that map patches to another width."""
    siblings: dict[str, list[PassedLayer]] = {}
    for layer in layers:
        siblings.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    groups = [group for group in siblings.values() if len(group) > 1]
    kept = [group for group in groups if group[0].in_features == group[-1].out_features]
    return [layer for group in kept for layer in group]


def like_blocks(
    model: nn.Module, layers: Iterable[PassedLayer], blocks: Iterable[str], residual: Collection[str] = ()
) -> list[str]:
    """The names of those layers that are in parts of blocks, as far as a pass can tell.

    Such a part has several layers, the last of which has the width of the first, and there is another one like it, or
    one with the same class in the blocks that are known, or a residual connection around it. Heads, projectors and
    embeddings have neither a second part like it nor such a connection.

    Args:
        model: The model.
        layers: Layers that patches of an image pass through.
        blocks: The names of the layers in the blocks that are known.
        residual: The names of parts with a residual connection.
    """
    blocks = list(blocks)
    around = {part for part in residual if not any(name.startswith(f"{part}.") for name in blocks)}
    parts: dict[str, list[PassedLayer]] = {}
    for layer in without_projections(layers):
        parts.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    kinds = {part: _kind(model, part, within) for part, within in parts.items()}
    counts = Counter(kinds.values())
    counts.update({_kind(model, name.rpartition(".")[0]) for name in blocks})
    return [
        layer.name
        for part, within in parts.items()
        if counts[kinds[part]] > 1 or any(f"{part}.".startswith(f"{other}.") for other in around)
        for layer in within
    ]


def _kind(model: nn.Module, part: str, layers: Iterable[PassedLayer] = ()) -> Hashable:
    """The class of a part of a model and, if that is a mere container, the sizes of its layers."""
    kind = type(model.get_submodule(part))
    is_container = issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return kind, tuple((layer.in_features, layer.out_features) for layer in layers) if is_container else ()


def _num_weights(model: nn.Module, names: Iterable[str]) -> int:
    return sum(parameter.numel() for name in names for parameter in model.get_submodule(name).parameters())


def without_patches(kinds: Mapping[str, Collection[str]]) -> list[str]:
    """The names of adapted layers in blocks without a layer that receives patches, where other blocks have some.

    Args:
        kinds: What each adapted layer received in its calls: "patches", "words", "one token" of each image, or "" if
            that is not known.
    """
    lists: dict[str, set[str]] = {}
    for name, found in kinds.items():
        lists.setdefault(_list_around(name), set()).update(found)
    if not any("patches" in found for found in lists.values()):
        return []
    return [name for name in kinds if lists[_list_around(name)] and lists[_list_around(name)] <= {"words", "one token"}]


def _list_around(name: str) -> str:
    """The name of the outermost list of blocks that a layer is in, or else of the module that holds it."""
    match = re.match(r"(.*?)\.?\b\d+\.", name)
    return match[1] if match else name.rpartition(".")[0]
