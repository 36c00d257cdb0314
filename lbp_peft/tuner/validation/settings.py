"""Checks the values in a configuration of LBP-WHT, and converts them to the types in use."""

from __future__ import annotations

import os
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bases.listed import ListedBasis
from ...bases.separable import BOUNDARIES
from ...bases.walsh import SELECTIONS, is_power_of_two
from ...calibration import CALIBRATED_SELECTIONS
from ...formats.products import AUTO
from ...formats.registry import FORMATS
from ..deprecation import warn_of_deprecation
from ..layers.offloading import BASE_WEIGHTS
from ..layers.rule import COMPRESSIBLE
from .names import is_module_name
from .patterns import IN_LAYERS_PATTERN, IN_RANK_PATTERN, check_pattern, show
from .stacked_settings import check_stack
from .values import are_names, as_int, is_int, is_one_of

if TYPE_CHECKING:
    from ..config import LBPWHTConfig

GRAD_INPUT_BASES = ("walsh", "adaptive")
_MAX_BLOCK_SIZE = 128  # Walsh functions on a block have block_size**2 values, and all of them together block_size**4


def check_settings(config: LBPWHTConfig) -> None:
    """Check all values, and convert those that may be written in several ways.

    Raises:
        ValueError: a value is of a wrong type or out of its range.
    """
    _check_inherited(config)
    for name in ("r", "grad_input_rank", "hadamard_size", "block_size", "num_prefix_tokens", "num_suffix_tokens"):
        setattr(config, name, as_int(getattr(config, name)))
    _check_ranks(config)
    _check_adaptive(config)
    _check_rounding(config)
    _check_selections(config)
    _check_layout(config)
    _check_base_weights(config)
    _check_modules(config)
    _check_layers(config)
    check_stack(config)


def _check_inherited(config: LBPWHTConfig) -> None:
    for name in ("base_model_name_or_path", "revision", "peft_version"):
        value = getattr(config, name)
        if isinstance(value, os.PathLike):
            setattr(config, name, os.fspath(value))
        elif value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a string or None, got {show(value)}.")
    if config.auto_mapping is not None and not isinstance(config.auto_mapping, dict):
        raise ValueError(f"auto_mapping must be a dict or None, got {show(config.auto_mapping)}.")
    for name in ("inference_mode", "train_base_weight", "exact_forward"):
        value = getattr(config, name)
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False, got {show(value)}.")
        setattr(config, name, bool(value))


# Ranks


def _check_ranks(config: LBPWHTConfig) -> None:
    size = config.block_size
    if not is_int(size) or not is_power_of_two(size) or size > _MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size must be a power of two up to {_MAX_BLOCK_SIZE} (the paper uses 8), got {show(size)}."
        )
    if not is_one_of(config.grad_input_basis, GRAD_INPUT_BASES):
        raise ValueError(
            f"grad_input_basis must be one of {', '.join(GRAD_INPUT_BASES)}, got {show(config.grad_input_basis)}."
        )
    has_limit = config.grad_input_basis != "adaptive"
    _check_rank(config, "r", config.r)
    if config.grad_input_rank is not None:
        _check_rank(config, "grad_input_rank", config.grad_input_rank, "None or ", has_limit)
    _check_rank_pattern(config, "rank_pattern")
    _check_rank_pattern(config, "grad_input_rank_pattern", "None or ", has_limit)


def _check_rank_pattern(config: LBPWHTConfig, name: str, or_none: str = "", has_limit: bool = True) -> None:
    ranks = getattr(config, name)
    if not isinstance(ranks, dict):
        raise ValueError(
            f"{name} must be a dict of ranks by module name or regular expression, {{}} for none, got {show(ranks)}."
        )
    setattr(config, name, {pattern: as_int(rank) for pattern, rank in ranks.items()})
    for pattern, rank in getattr(config, name).items():
        check_pattern(f"A key of {name}", pattern, IN_RANK_PATTERN)
        if rank is not None or not or_none:
            _check_rank(config, f"{name}[{show(pattern)}]", rank, or_none, has_limit)


def _check_rank(config: LBPWHTConfig, name: str, rank: object, or_none: str = "", has_limit: bool = True) -> None:
    """Check a rank, which is at most the number of functions of a block if it has a limit."""
    full = config.block_size**2
    if not has_limit and not (is_int(rank) and rank >= 1):
        raise ValueError(f"{name} must be {or_none}an int of at least 1, got {show(rank)}.")
    if has_limit and not (is_int(rank) and 1 <= rank <= full):
        raise ValueError(f"{name} must be {or_none}an int from 1 to block_size**2 = {full}, got {show(rank)}.")


def _check_adaptive(config: LBPWHTConfig) -> None:
    is_adaptive, energy = config.grad_input_basis == "adaptive", config.grad_input_energy
    if is_adaptive and config.grad_input_rank is None and not any(config.grad_input_rank_pattern.values()):
        raise ValueError(
            'grad_input_basis="adaptive" needs grad_input_rank, the number of patterns for each image. 16 to 32 '
            "are useful."
        )
    if energy is None:
        return
    if not isinstance(energy, Real) or isinstance(energy, (bool, np.bool_)) or not 0 < energy <= 1:
        raise ValueError(f"grad_input_energy must be None or a number above 0 and at most 1, got {show(energy)}.")
    if not is_adaptive:
        raise ValueError('grad_input_energy needs grad_input_basis="adaptive", since Walsh functions are fixed.')
    config.grad_input_energy = float(energy)


# Number formats


def _check_rounding(config: LBPWHTConfig) -> None:
    if not is_one_of(config.grad_input_dtype, [AUTO, *FORMATS]):
        raise ValueError(
            f"grad_input_dtype must be one of {AUTO}, {', '.join(FORMATS)}, got {show(config.grad_input_dtype)}."
        )
    if not is_int(config.hadamard_size) or (config.hadamard_size and not is_power_of_two(config.hadamard_size)):
        raise ValueError(
            f"hadamard_size must be a power of two (16 to 128 are useful), or 0, got {show(config.hadamard_size)}."
        )
    config.compress_activations = _validate_compression(config.compress_activations)


def _validate_compression(value: object) -> str | tuple[str, ...] | None:
    """Check a value of compress_activations, and return None, "all", or words in their usual order."""
    if value is None or is_one_of(value, ["all"]):
        return "all" if value else None
    if is_one_of(value, ["int8"]):
        warn_of_deprecation(
            'LBPWHTConfig: compress_activations="int8" is deprecated. It now means ("activation", "norm"), which takes '
            'less memory and less time: write that, or "all".'
        )
        return "activation", "norm"
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple, set, frozenset)):
        words = [None]
    chosen = {"activation" if word == "gelu" else word for word in words if isinstance(word, str)}
    if len(words) == 0 or not all(isinstance(word, str) for word in words) or not chosen <= set(COMPRESSIBLE):
        raise ValueError(
            f'compress_activations must be "all", some of {", ".join(COMPRESSIBLE)}, or None, got {show(value)}.'
        )
    return tuple(word for word in COMPRESSIBLE if word in chosen)


# Selections of bases


def _check_selections(config: LBPWHTConfig) -> None:
    if not is_one_of(config.boundary, BOUNDARIES):
        raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {show(config.boundary)}.")
    config.selection = _validate_selection(config, "selection", config.selection)
    if not isinstance(config.selection_pattern, dict):
        raise ValueError(
            "selection_pattern must be a dict of selections by module name or regular expression, {} for none, got "
            f"{show(config.selection_pattern)}."
        )
    for pattern in config.selection_pattern:
        check_pattern("A key of selection_pattern", pattern, IN_RANK_PATTERN)
    config.selection_pattern = {
        pattern: _validate_selection(config, f"selection_pattern[{show(pattern)}]", selection)
        for pattern, selection in config.selection_pattern.items()
    }


def _validate_selection(config: LBPWHTConfig, name: str, value: object) -> Any:
    """Check a selection, and return its name or a list of pairs of ints, which are lists in JSON."""
    if isinstance(value, (list, tuple)) and value:
        pairs = [tuple(map(as_int, pair)) if isinstance(pair, (list, tuple)) else pair for pair in value]
        if all(isinstance(pair, tuple) and len(pair) == 2 and all(map(is_int, pair)) for pair in pairs):
            try:
                ListedBasis(tuple(pairs), config.block_size, config.boundary)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            return pairs
    elif is_one_of(value, [*SELECTIONS, *CALIBRATED_SELECTIONS]):
        return value
    raise ValueError(
        f"{name} must be one of {', '.join((*SELECTIONS, *CALIBRATED_SELECTIONS))}, or a list of pairs (i, j), got "
        f"{show(value)}."
    )


# The layout of tokens


def _check_layout(config: LBPWHTConfig) -> None:
    if isinstance(config.grid_size, (list, tuple)):  # JSON has no tuples
        config.grid_size = tuple(as_int(side) for side in config.grid_size)
    grid = config.grid_size
    if grid is not None and not (
        isinstance(grid, tuple) and len(grid) == 2 and all(is_int(side) and side > 0 for side in grid)
    ):
        raise ValueError(f"grid_size must be two positive ints (height, width) in patches, got {show(grid)}.")
    for name in ("num_prefix_tokens", "num_suffix_tokens"):
        number = getattr(config, name)
        if number is not None and (not is_int(number) or number < 0):
            raise ValueError(f"{name} must be an int of at least 0, got {show(number)}.")


# Weights, modules and layers


def _check_base_weights(config: LBPWHTConfig) -> None:
    if not is_one_of(config.base_weights, BASE_WEIGHTS):
        raise ValueError(f"base_weights must be one of {', '.join(BASE_WEIGHTS)}, got {show(config.base_weights)}.")
    if not config.train_base_weight and config.base_weights not in ("auto", "resident"):
        raise ValueError(
            f"base_weights={show(config.base_weights)} says where base weights are offloaded while copies of them "
            "are trained. With train_base_weight=False they are in use themselves: leave it out."
        )


def _check_modules(config: LBPWHTConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            check_pattern(name, value)
        elif value is not None:
            if not are_names(value):
                raise ValueError(f"{name} must be names of modules, a regular expression or None, got {show(value)}.")
            setattr(config, name, set(value))
    if config.target_modules is not None and not config.target_modules:
        raise ValueError("target_modules is empty. None adapts every linear layer in the blocks of the encoder.")
    saved = config.modules_to_save
    if saved is not None:
        names = [saved] if isinstance(saved, str) else saved
        if not are_names(names) or not all(map(is_module_name, names)):
            raise ValueError(f"modules_to_save must be names of modules or None, got {show(saved)}.")
        config.modules_to_save = sorted(names) if isinstance(names, (set, frozenset)) else list(names)


def _check_layers(config: LBPWHTConfig) -> None:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if layers is not None:
        indices = layers if isinstance(layers, (list, tuple, set, frozenset, range)) else [layers]
        indices = [as_int(index) for index in indices]
        if not indices or not all(is_int(index) and index >= 0 for index in indices):
            raise ValueError(
                f"layers_to_transform must be the index of a block, counted from 0, or several, or None for all "
                f"blocks, got {show(layers)}."
            )
        config.layers_to_transform = indices[0] if isinstance(layers, Integral) else indices
    if pattern is not None and pattern != "":
        if not isinstance(pattern, str) and not are_names(pattern):
            raise ValueError(f"layers_pattern must be the name of a list of blocks, or several, got {show(pattern)}.")
        for expression in [pattern] if isinstance(pattern, str) else pattern:
            check_pattern("layers_pattern", expression, IN_LAYERS_PATTERN)
        if not isinstance(pattern, str):
            config.layers_pattern = list(pattern)
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError(
            "layers_to_transform needs target_modules as a list of names; with a regular expression, write the "
            "layer indices into the expression."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern says where layers_to_transform counts: give layers_to_transform too.")
