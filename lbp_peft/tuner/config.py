"""The configuration of the method."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

import numpy as np
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType

from ..bases.base import Basis
from ..bases.basis_set import BasisSet
from ..bases.listed import ListedBasis
from ..bases.separable import BOUNDARIES, WalshBasis
from ..bases.walsh import SELECTIONS, is_power_of_two
from ..calibration import CALIBRATED_SELECTIONS
from ..formats.products import AUTO, FULL, Precision
from ..formats.registry import FORMATS, FormatName
from .deprecation import accept_old_names, warn_of_deprecation
from .layers.rule import COMPRESSIBLE
from .layers.waiting import BASE_WEIGHTS
from .validation.names import check_adapter_name, is_module_name
from .validation.patterns import check_pattern, show

GRAD_INPUT_BASES = ("walsh", "adaptive")
_MAX_BLOCK_SIZE = 128  # whose Walsh functions have block_size**2 values, and whose bases block_size**4
# The regular expressions in which PEFT embeds those of a configuration.
_IN_RANK_PATTERN = r"(.*\.)?({})$"
_IN_LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."


GradInputDtype = Literal["auto", FormatName]
GradInputBasis = Literal["walsh", "adaptive"]
Selection = Literal["lp_l1", "lp_linf", "lhe", "klt"]
Boundary = Literal["orthogonal", "reflect"]


@accept_old_names
@dataclass
class LBPWHTConfig(PeftConfig):
    """Configuration of low-rank backpropagation through linear layers (LBP-WHT, arXiv 2309.15275).

    Args:
        r: Walsh bases kept in each block of `block_size` x `block_size` patches for the weight gradient, 1 to
            block_size**2. It need not be triangular or square. 1, 3, 6, 10, 15, 21, 28, 36 are the paper's LP_L1-1 to
            LP_L1-8.
        grad_input_rank: Walsh bases kept in each block for the input gradient, 1 to block_size**2; the paper's setting
            is `grad_input_rank=r`. None: the input gradient is not low-rank. The error of a low-rank input gradient
            compounds from the last layer to the first, that of the weight gradient does not.
        grad_input_basis: The basis of a low-rank input gradient. "walsh": the first Walsh functions of the selection.
            "adaptive": in each backward pass and for each image, orthonormal patterns over the tokens that fit the
            gradient; `grad_input_rank` is then their number for each image (16 to 32 are useful), tokens outside the
            grid come in addition, and layers whose tokens lie on no known grid have a low-rank input gradient too.
        grad_input_energy: With grad_input_basis="adaptive", the share of the squared norm of each image's gradient that
            is to be kept, above 0 and at most 1: of the `grad_input_rank` patterns, only as many are used as a batch
            needs for it. None: all are used. It has no effect under `torch.compile` and in transforms of `torch.func`.
        grad_input_dtype: Number format of the product g W in the input gradient. "full": that of g, nothing is rounded.
            "bf16", "int8", "fp8": g and W are rounded to that format. "auto": the fastest for the device and the shape
            of those that keep the gradient's direction, and exact backpropagation, with one warning, for layers so
            narrow that it is faster altogether; see docs/configuration.md. Where the input gradient is low-rank,
            "auto" means "full". Beside a product in low precision the two factors of the weight gradient are rounded
            to bfloat16.
        hadamard_size: The size of a Hadamard matrix that mixes blocks of outputs before g and W are rounded to 8 bits,
            a power of two; 0: none. It spreads outliers, and cancels in the product.
        compress_activations: What is saved in few bits for the backward pass in blocks with adapted layers: "all", or
            some of "activation" (the derivatives of activation functions, in 4 bits), "norm" (the normalised inputs of
            norms, in 8 bits), "attention" (query, key and value, in 8 bits) and "projection" (the projected inputs of
            adapted layers, in 8 bits). The forward pass is exact, and gradients have rounding errors. None: nothing.
            "gelu" is "activation"; "int8" is a deprecated name of ("activation", "norm").
        block_size: Order of the two-dimensional Walsh-Hadamard transform, a power of two, 128 at most.
        selection: The order of the bases (i, j): "lp_l1" by i + j, "lp_linf" by max(i, j). For ties, see
            [`lbp_peft.bases.walsh.basis_order`]. A list of pairs, as `[(0, 0), (0, 1), (1, 0)]`: its first r, or all.
            "lhe" and "klt" are chosen for each layer by what it sees, in [`lbp_peft.calibrate`], which has to be called
            before training: "lhe" keeps the r Walsh functions that carry most of the weight gradient, "klt" as many
            functions of any form. They concern the weight gradient; a low-rank input gradient then has the bases of
            "lp_l1".
        selection_pattern: Selections that differ from it, by module name suffix or regular expression.
        boundary: The treatment of grids that are not a multiple of block_size. "orthogonal": a true projection, exact
            at full rank. "reflect": that of the paper's reference code, which counts border patches twice.
        train_base_weight: True: the adapter is a trained copy of each target's weight and bias. False: it has no
            weights of its own and only makes the backward pass cheap.
        exact_forward: Whether the forward pass of a LoRA that is stacked on gives LoRA's own bits. False: where that is
            faster, and its base weight has 32 bits, its two branches are one product with the sum of their weights,
            which is as close to the exact result. It has no effect otherwise: the forward pass of all other layers is
            exact to the bit.
        base_weights: Where a target's base weight waits while one adapter is trained that has a copy of it. "auto": in
            a file that is mapped into memory ("disk"), or for models on a GPU in the CPU's memory ("cpu").
            "resident": where it is, so that weights are held twice. "dropped": nowhere; the weight itself is trained,
            and whatever needs the base weight raises an error. It concerns only the running program and is not saved
            with the adapter. See docs/memory.md.
        rank_pattern: Ranks that differ from r, by module name suffix or regular expression, as LoRA's. For example
            `{"layers.11.mlp.fc2": 21}`. It changes r only, not `grad_input_rank`.
        grad_input_rank_pattern: Ranks that differ from grad_input_rank, likewise; None for an input gradient that is
            not low-rank.
        grid_size: (H, W) of the patch grid. None: found out from the model and the input.
        num_prefix_tokens: Tokens before the patches ([CLS], distillation, registers). None: found out.
        num_suffix_tokens: Tokens after the patches (detection tokens). None: found out.
        target_modules: Names, a regular expression, or "all-linear". None: every linear layer in the blocks of the
            encoder, never the head.
        exclude_modules: Names or a regular expression of modules not to adapt.
        modules_to_save: Modules apart from the targets that are trained in full and saved, such as the classifier:
            names, or one name.
        layers_to_transform: Indices of the blocks to adapt; needs `target_modules` as a list.
        layers_pattern: Name of the list of blocks that `layers_to_transform` counts in.
        stack_on: Configuration of another PEFT method, say a `LoraConfig`, whose adapter is put on the model first and
            whose training LBP-WHT then makes cheap; or several, by adapter name. Needs `train_base_weight=False`.
            Filled in when a stack is saved, so that its checkpoint is complete.
        stack_active: Which adapters of `stack_on` are active. None: the first.

    Raises:
        ValueError: a value is of a wrong type or out of its range; the message says which are allowed. Values of a
            checkpoint's `adapter_config.json` are checked in the same way.
    """

    r: int = field(default=10, metadata={"help": "Walsh bases kept per block for the weight gradient."})
    grad_input_rank: int | None = field(
        default=None, metadata={"help": "Walsh bases kept per block for the input gradient; None: it is not low-rank."}
    )
    grad_input_basis: GradInputBasis = field(
        default="walsh", metadata={"help": 'Of a low-rank input gradient: "walsh", or "adaptive" to each image.'}
    )
    grad_input_energy: float | None = field(
        default=None, metadata={"help": "Share of the gradient's energy that an adaptive basis has to keep, up to 1."}
    )
    grad_input_dtype: GradInputDtype = field(
        default="auto",
        metadata={"help": 'Format of the product in the input gradient: "auto", "full", "bf16", "int8" or "fp8".'},
    )
    hadamard_size: int = field(
        default=0, metadata={"help": "Outputs mixed by a Hadamard matrix before rounding; 0: none."}
    )
    compress_activations: str | tuple[str, ...] | None = field(
        default=None,
        metadata={"help": '"all", or some of "activation", "norm", "attention", "projection", to keep in few bits.'},
    )
    block_size: int = field(default=8, metadata={"help": "Order of the 2-D Walsh-Hadamard transform."})
    selection: Selection | list[tuple[int, int]] = field(
        default="lp_l1", metadata={"help": '"lp_l1", "lp_linf", "lhe", "klt" or a list of pairs (i, j).'}
    )
    selection_pattern: dict[str, Selection | list[tuple[int, int]]] = field(
        default_factory=dict, metadata={"help": "{regular expression or suffix: selection} where selection differs."}
    )
    boundary: Boundary = field(default="orthogonal", metadata={"help": '"orthogonal" or "reflect".'})
    train_base_weight: bool = field(
        default=True, metadata={"help": "Train a copy of each target's weight, or only make its backward pass cheap."}
    )
    exact_forward: bool = field(
        default=False,
        metadata={"help": "Keep the bits of LoRA's forward pass in a stack, where one product is faster."},
    )
    base_weights: str = field(
        default="auto",
        metadata={"help": 'Where base weights wait: "auto", "resident", "cpu", "disk", or "dropped".'},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "{regular expression or suffix: r} where r differs."}
    )
    grad_input_rank_pattern: dict[str, int | None] = field(
        default_factory=dict, metadata={"help": "{regular expression or suffix: rank} where grad_input_rank differs."}
    )
    grid_size: tuple[int, int] | None = field(default=None, metadata={"help": "(H, W) of the patch grid."})
    num_prefix_tokens: int | None = field(default=None, metadata={"help": "Tokens before the patches."})
    num_suffix_tokens: int | None = field(default=None, metadata={"help": "Tokens after the patches."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": 'Names, a regular expression or "all-linear"; None for the whole encoder.'}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules not to adapt."})
    modules_to_save: list[str] | str | None = field(default=None, metadata={"help": "Modules trained in full."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    stack_on: PeftConfig | dict[str, PeftConfig] | None = field(
        default=None, metadata={"help": "Configuration of the adapter beneath, such as a LoraConfig."}
    )
    stack_active: list[str] | str | None = field(default=None, metadata={"help": "Active adapters of stack_on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.peft_type
        if given not in (None, PeftType.LBPWHT):
            raise ValueError(f"The peft_type of an LBPWHTConfig is LBPWHT, got {show(given)}.")
        self.peft_type: Any = PeftType.LBPWHT
        self.check()

    def check(self) -> None:
        """Check all values, and convert those that may be written in several ways to the type in use.

        Raises:
            ValueError: a value is of a wrong type or out of its range.
        """
        self._check_inherited()
        for name in (
            "r", "grad_input_rank", "hadamard_size", "block_size", "num_prefix_tokens", "num_suffix_tokens"
        ):  # fmt: skip
            setattr(self, name, _as_int(getattr(self, name)))
        if isinstance(self.grid_size, (list, tuple)):  # JSON has no tuples
            self.grid_size = tuple(_as_int(side) for side in self.grid_size)
        self._check_transform()
        self._check_layout()
        self._check_base_weights()
        self._check_modules()
        self._check_layers()
        self._check_stack()

    def weight_basis(self, r: int, selection: Any = None) -> Basis:
        """The basis of the weight gradient of a layer of rank r, or what stands in its place until calibration.

        Args:
            r: The layer's rank.
            selection: The layer's selection; None: that of all layers.
        """
        selection = self.selection if selection is None else selection
        if isinstance(selection, str) and selection in CALIBRATED_SELECTIONS:
            return CALIBRATED_SELECTIONS[selection](r, self.block_size, self.boundary)
        return self._walsh_basis(r, selection)

    def input_basis(self, rank: int | None, selection: Any = None) -> WalshBasis | None:
        """The Walsh functions of a layer's input gradient of this rank; None where it is not low-rank.

        Args:
            rank: The layer's rank for it.
            selection: The layer's selection; None: that of all layers.
        """
        selection = self.selection if selection is None else selection
        if isinstance(selection, str) and selection in CALIBRATED_SELECTIONS:
            selection = "lp_l1"
        return None if rank is None else self._walsh_basis(rank, selection)

    def _walsh_basis(self, r: int, selection: Any) -> WalshBasis:
        if isinstance(selection, str):
            return BasisSet(r, self.block_size, selection, self.boundary)
        return ListedBasis(tuple(selection[:r]), self.block_size, self.boundary)

    def input_precision(self, rank: int | None) -> Precision:
        """The precision of the product in the input gradient of a layer with this rank for it."""
        if rank is not None and self.grad_input_dtype == AUTO:
            return FULL
        return Precision(self.grad_input_dtype, self.hadamard_size)

    def compressed_words(self) -> tuple[str, ...]:
        """What is saved in few bits for the backward pass: some of [`COMPRESSIBLE`]."""
        value = self.compress_activations
        if isinstance(value, str):
            return COMPRESSIBLE
        return value or ()

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        del output["base_weights"]  # a setting of the machine, not of the adapter
        if self.stack_on:
            output["stack_on"] = {name: _plain(config.to_dict()) for name, config in self.stack_on.items()}
        return output

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's method; if a value in the file is refused, the message names the checkpoint."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, ValueError) as error:
            if str(error).startswith("Can't find"):
                raise
            where = "/".join(part for part in (str(pretrained_model_name_or_path), subfolder) if part)
            raise ValueError(f"The adapter_config.json of {where} cannot be used: {error}") from error

    def _check_inherited(self) -> None:
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a string or None, got {show(value)}.")
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, dict):
            raise ValueError(f"auto_mapping must be a dict or None, got {show(self.auto_mapping)}.")
        for name in ("inference_mode", "train_base_weight", "exact_forward"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"{name} must be True or False, got {show(value)}.")
            setattr(self, name, bool(value))

    def _check_base_weights(self) -> None:
        if not _is_one_of(self.base_weights, BASE_WEIGHTS):
            raise ValueError(f"base_weights must be one of {', '.join(BASE_WEIGHTS)}, got {show(self.base_weights)}.")
        if not self.train_base_weight and self.base_weights not in ("auto", "resident"):
            raise ValueError(
                f"base_weights={show(self.base_weights)} says where base weights wait while copies of them are "
                "trained. With train_base_weight=False they are in use themselves: leave it out."
            )

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif value is not None:
                if not _are_names(value):
                    raise ValueError(
                        f"{name} must be names of modules, a regular expression or None, got {show(value)}."
                    )
                setattr(self, name, set(value))
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty. None adapts every linear layer in the blocks of the encoder.")
        saved = self.modules_to_save
        if saved is not None:
            names = [saved] if isinstance(saved, str) else saved
            if not _are_names(names) or not all(map(is_module_name, names)):
                raise ValueError(f"modules_to_save must be names of modules or None, got {show(saved)}.")
            self.modules_to_save = sorted(names) if isinstance(names, (set, frozenset)) else list(names)

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if layers is not None:
            indices = layers if isinstance(layers, (list, tuple, set, frozenset, range)) else [layers]
            indices = [_as_int(index) for index in indices]
            if not indices or not all(_is_int(index) and index >= 0 for index in indices):
                raise ValueError(
                    f"layers_to_transform must be the index of a block, counted from 0, or several, or None for all "
                    f"blocks, got {show(layers)}."
                )
            self.layers_to_transform = indices[0] if isinstance(layers, Integral) else indices
        if pattern is not None and pattern != "":
            if not isinstance(pattern, str) and not _are_names(pattern):
                raise ValueError(
                    f"layers_pattern must be the name of a list of blocks, or several, got {show(pattern)}."
                )
            for one in [pattern] if isinstance(pattern, str) else pattern:
                check_pattern("layers_pattern", one, _IN_LAYERS_PATTERN)
            if not isinstance(pattern, str):
                self.layers_pattern = list(pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list of names; with a regular expression, write the "
                "layer indices into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give layers_to_transform too.")

    def _check_stack(self) -> None:
        if isinstance(self.stack_active, str):
            self.stack_active = [self.stack_active]
        if self.stack_active is not None and not (
            isinstance(self.stack_active, (list, tuple)) and all(isinstance(name, str) for name in self.stack_active)
        ):
            raise ValueError(f"stack_active must be names of adapters of stack_on, got {show(self.stack_active)}.")
        if self.stack_on is None:
            if self.stack_active:
                raise ValueError("stack_active says which adapters of stack_on are active: give stack_on too.")
            return
        if isinstance(self.stack_on, PeftConfig):
            self.stack_on = {"default": self.stack_on}
        if (
            not isinstance(self.stack_on, dict)
            or not self.stack_on
            or not all(isinstance(config, (PeftConfig, dict)) for config in self.stack_on.values())
        ):
            raise ValueError(
                f"stack_on must be a PEFT configuration, or several by adapter name, got {show(self.stack_on)}."
            )
        for name in self.stack_on:
            check_adapter_name(name, "stack_on")
        self.stack_on = {name: _config_beneath(name, config) for name, config in self.stack_on.items()}
        unknown = set(self.stack_active or []) - self.stack_on.keys()
        if unknown:
            raise ValueError(
                f"stack_active names {', '.join(sorted(unknown))}, but stack_on has {list(self.stack_on)}."
            )

    def _check_transform(self) -> None:
        size = self.block_size
        if not _is_int(size) or not is_power_of_two(size) or size > _MAX_BLOCK_SIZE:
            raise ValueError(
                f"block_size must be a power of two up to {_MAX_BLOCK_SIZE} (the paper uses 8), got {show(size)}."
            )
        if not _is_one_of(self.grad_input_basis, GRAD_INPUT_BASES):
            raise ValueError(
                f"grad_input_basis must be one of {', '.join(GRAD_INPUT_BASES)}, got {show(self.grad_input_basis)}."
            )
        has_limit = self.grad_input_basis != "adaptive"
        self._check_rank("r", self.r)
        if self.grad_input_rank is not None:
            self._check_rank("grad_input_rank", self.grad_input_rank, "None or ", has_limit)
        self._check_rank_pattern("rank_pattern")
        self._check_rank_pattern("grad_input_rank_pattern", "None or ", has_limit)
        self._check_adaptive()
        if not _is_one_of(self.grad_input_dtype, [AUTO, *FORMATS]):
            raise ValueError(
                f"grad_input_dtype must be one of {AUTO}, {', '.join(FORMATS)}, got {show(self.grad_input_dtype)}."
            )
        if not _is_int(self.hadamard_size) or (self.hadamard_size and not is_power_of_two(self.hadamard_size)):
            raise ValueError(
                f"hadamard_size must be a power of two (16 to 128 are useful), or 0, got {show(self.hadamard_size)}."
            )
        self.compress_activations = _checked_words(self.compress_activations)
        if not _is_one_of(self.boundary, BOUNDARIES):
            raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {show(self.boundary)}.")
        self.selection = self._checked_selection("selection", self.selection)
        if not isinstance(self.selection_pattern, dict):
            raise ValueError(
                "selection_pattern must be a dict of selections by module name or regular expression, {} for none, got "
                f"{show(self.selection_pattern)}."
            )
        for pattern in self.selection_pattern:
            check_pattern("A key of selection_pattern", pattern, _IN_RANK_PATTERN)
        self.selection_pattern = {
            pattern: self._checked_selection(f"selection_pattern[{show(pattern)}]", selection)
            for pattern, selection in self.selection_pattern.items()
        }

    def _checked_selection(self, name: str, value: Any) -> Any:
        """A selection's name, or pairs of ints in a list; JSON has them as lists of lists."""
        if isinstance(value, (list, tuple)) and value:
            pairs = [tuple(map(_as_int, pair)) if isinstance(pair, (list, tuple)) else pair for pair in value]
            if all(isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_int, pair)) for pair in pairs):
                try:
                    ListedBasis(tuple(pairs), self.block_size, self.boundary)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                return pairs
        elif _is_one_of(value, [*SELECTIONS, *CALIBRATED_SELECTIONS]):
            return value
        raise ValueError(
            f"{name} must be one of {', '.join((*SELECTIONS, *CALIBRATED_SELECTIONS))}, or a list of pairs (i, j), got "
            f"{show(value)}."
        )

    def _check_adaptive(self) -> None:
        is_adaptive, energy = self.grad_input_basis == "adaptive", self.grad_input_energy
        if is_adaptive and self.grad_input_rank is None and not any(self.grad_input_rank_pattern.values()):
            raise ValueError(
                'grad_input_basis="adaptive" needs grad_input_rank, the number of patterns for each image. Useful are '
                "16 to 32."
            )
        if energy is None:
            return
        if not isinstance(energy, Real) or isinstance(energy, (bool, np.bool_)) or not 0 < energy <= 1:
            raise ValueError(f"grad_input_energy must be None or a number above 0 and at most 1, got {show(energy)}.")
        if not is_adaptive:
            raise ValueError('grad_input_energy needs grad_input_basis="adaptive", since Walsh functions are fixed.')
        self.grad_input_energy = float(energy)

    def _check_rank_pattern(self, name: str, or_none: str = "", has_limit: bool = True) -> None:
        given = getattr(self, name)
        if not isinstance(given, dict):
            raise ValueError(
                f"{name} must be a dict of ranks by module name or regular expression, {{}} for none, got "
                f"{show(given)}."
            )
        setattr(self, name, {pattern: _as_int(rank) for pattern, rank in given.items()})
        for pattern, rank in getattr(self, name).items():
            check_pattern(f"A key of {name}", pattern, _IN_RANK_PATTERN)
            if rank is not None or not or_none:
                self._check_rank(f"{name}[{show(pattern)}]", rank, or_none, has_limit)

    def _check_rank(self, name: str, rank: object, or_none: str = "", has_limit: bool = True) -> None:
        """Check a rank, which is at most the number of functions of a block if it has a limit."""
        full = self.block_size**2
        if not has_limit and not (_is_int(rank) and rank >= 1):
            raise ValueError(f"{name} must be {or_none}an int of at least 1, got {show(rank)}.")
        if has_limit and not (_is_int(rank) and 1 <= rank <= full):
            raise ValueError(f"{name} must be {or_none}an int from 1 to block_size**2 = {full}, got {show(rank)}.")

    def _check_layout(self) -> None:
        grid = self.grid_size
        if grid is not None and not (
            isinstance(grid, tuple) and len(grid) == 2 and all(_is_int(side) and side > 0 for side in grid)
        ):
            raise ValueError(f"grid_size must be two positive ints (height, width) in patches, got {show(grid)}.")
        for name in ("num_prefix_tokens", "num_suffix_tokens"):
            number = getattr(self, name)
            if number is not None and (not _is_int(number) or number < 0):
                raise ValueError(f"{name} must be an int of at least 0, got {show(number)}.")


def _checked_words(value: Any) -> str | tuple[str, ...] | None:
    """A value of compress_activations in its normal form: None, "all", or words in their usual order."""
    if value is None or _is_one_of(value, ["all"]):
        return "all" if value else None
    if _is_one_of(value, ["int8"]):
        warn_of_deprecation(
            'LBPWHTConfig: compress_activations="int8" is deprecated. It now means ("activation", "norm"), which takes '
            'less memory and less time: write that, or "all".'
        )
        return "activation", "norm"
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple, set, frozenset)):
        words = [None]
    found = {"activation" if word == "gelu" else word for word in words if isinstance(word, str)}
    if len(words) == 0 or not all(isinstance(word, str) for word in words) or not found <= set(COMPRESSIBLE):
        raise ValueError(
            f'compress_activations must be "all", some of {", ".join(COMPRESSIBLE)}, or None, got {show(value)}.'
        )
    return tuple(word for word in COMPRESSIBLE if word in found)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_int(value: Any) -> Any:
    """An int if the value is an integer of any type, such as NumPy's; otherwise the value unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _is_one_of(value: object, allowed: Iterable[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) and name for name in value)


def _config_beneath(name: str, given: PeftConfig | dict[str, Any]) -> PeftConfig:
    """The configuration of an adapter that LBP-WHT is stacked on; a checkpoint holds it as a dict.

    Raises:
        ValueError: the configuration is invalid, or of a method that LBP-WHT cannot be stacked on, or has a value that
            must not come from a file.
    """
    field = f"stack_on[{name!r}]"
    kind = given.get("peft_type") if isinstance(given, dict) else given.peft_type
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(one.value for one in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"{field} has the peft_type {show(kind)}, which PEFT does not know. It knows {known}.")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    # X-LoRA's configuration names folders and repositories to load further adapters from.
    if kind in (PeftType.LBPWHT, PeftType.XLORA) or not issubclass(tuner, BaseTuner):
        raise ValueError(
            "stack_on must be a configuration of another method with adapters in layers, such as LoRA, and not of "
            f"{PeftType(kind).value}."
        )
    if isinstance(given, dict):
        if given.get("megatron_config"):
            raise ValueError(
                f"{field} has a megatron_config, with which PEFT imports whatever module megatron_core names. LBP-WHT "
                "does not adapt Megatron's layers: leave both out."
            )
        try:
            config = PeftConfig.from_peft_type(**given)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{field} is not a valid configuration of {PeftType(kind).value}: {error}") from error
    else:
        config = given
        if not isinstance(config, PEFT_TYPE_TO_CONFIG_MAPPING[kind]):
            wanted = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__
            raise ValueError(f"{field} must be a {wanted} for the peft_type {kind}, got a {type(config).__name__}.")
    _check_patterns_beneath(field, config)
    return config


def _check_patterns_beneath(field: str, config: PeftConfig) -> None:
    """Refuse regular expressions that could take forever to match, and names that PEFT would read as expressions."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(value := getattr(config, name, None), str) and value:
            check_pattern(f"{field}.{name}", value)
    patterns = getattr(config, "layers_pattern", None) or []
    for one in [patterns] if isinstance(patterns, str) else patterns:
        check_pattern(f"{field}.layers_pattern", one, _IN_LAYERS_PATTERN)
    for name, value in vars(config).items():  # rank_pattern, alpha_pattern and their like
        if name.endswith("_pattern") and isinstance(value, dict):
            for pattern in value:
                check_pattern(f"A key of {field}.{name}", pattern, _IN_RANK_PATTERN)
    saved = getattr(config, "modules_to_save", None) or []
    if not _are_names(saved) or not all(map(is_module_name, saved)):
        raise ValueError(f"{field}.modules_to_save must be names of modules or None, got {show(saved)}.")


def _plain(value: Any) -> Any:
    """A value as JSON represents it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
