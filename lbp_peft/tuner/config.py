"""The configuration of the method: its settings, and the bases and number formats that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from ..bases.base import Basis
from ..bases.basis_set import BasisSet
from ..bases.listed import ListedBasis
from ..bases.separable import WalshBasis
from ..calibration import CALIBRATED_SELECTIONS
from ..formats.products import AUTO, FULL, Precision
from ..formats.registry import FormatName
from .deprecation import accept_old_names
from .layers.rule import COMPRESSIBLE
from .validation.patterns import show
from .validation.settings import check_settings

GradInputDtype = Literal["auto", FormatName]
GradInputBasis = Literal["walsh", "adaptive"]
Selection = Literal["lp_l1", "lp_linf", "lhe", "klt"]
Pairs = list[tuple[int, int]]
Boundary = Literal["orthogonal", "reflect"]


@accept_old_names
@dataclass
class LBPWHTConfig(PeftConfig):
    """Configuration of low-rank backpropagation through linear layers (LBP-WHT, arXiv 2309.15275).

    Args:
        r: Walsh bases kept in each block of `block_size` x `block_size` patches for the weight gradient, 1 to
            block_size**2. It need not be a triangular or square number. 1, 3, 6, 10, 15, 21, 28, 36 are the paper's
            LP_L1-1 to LP_L1-8.
        grad_input_rank: Walsh bases kept in each block for the input gradient, 1 to block_size**2; the paper's setting
            is `grad_input_rank=r`. None: the input gradient is not low-rank. The error of a low-rank input gradient
            compounds from the last layer to the first; that of the weight gradient does not.
        grad_input_basis: The basis of a low-rank input gradient. "walsh": the first Walsh functions of the selection.
            "adaptive": in each backward pass and for each image, orthonormal patterns over the tokens that fit the
            gradient; `grad_input_rank` is then their number for each image (16 to 32 are useful), tokens outside the
            grid come in addition, and layers whose tokens lie on no known grid have a low-rank input gradient too.
        grad_input_energy: With grad_input_basis="adaptive", the share of the squared norm of each image's gradient that
            is to be kept, above 0 and at most 1: only as many of the `grad_input_rank` patterns are used as a batch
            needs for that. None: all are used. It has no effect under `torch.compile` and in transforms of
            `torch.func`.
        grad_input_dtype: The number format of the product g W in the input gradient. "full": the dtype of g, so that
            nothing is rounded. "bf16", "int8", "fp8": g and W are rounded to that format. "auto": among the formats
            that keep the direction of the gradient, the one that is fastest for the device and the shape. Layers so
            narrow that exact backpropagation is faster use that, with one warning; see docs/configuration.md. Where
            the input gradient is low-rank, "auto" means "full". If this product is in low precision, the two factors
            of the weight gradient are rounded to bfloat16.
        hadamard_size: The size of a Hadamard matrix that mixes blocks of outputs before g and W are rounded to 8 bits,
            a power of two; 0: none. It spreads outliers, and cancels in the product.
        compress_activations: What is saved in few bits for the backward pass in blocks with adapted layers: "all", or
            some of "activation" (the derivatives of activation functions, in 4 bits), "norm" (the normalised inputs of
            norms, in 8 bits), "attention" (query, key and value, in 8 bits) and "projection" (the projected inputs of
            adapted layers, in 8 bits). The forward pass is exact, and gradients have rounding errors. None: nothing.
            "gelu" is "activation"; "int8" is a deprecated name of ("activation", "norm").
        block_size: Order of the two-dimensional Walsh-Hadamard transform, a power of two, 128 at most.
        selection: The order of the bases (i, j): "lp_l1" by i + j, "lp_linf" by max(i, j). For ties, see
            [`lbp_peft.bases.walsh.basis_order`]. A list of pairs, such as `[(0, 0), (0, 1), (1, 0)]`: its first r, or
            all if there are fewer. "lhe" and "klt" are chosen for each layer by what it sees, in
            [`lbp_peft.calibrate`], which has to be called before training: "lhe" keeps the r Walsh functions that carry
            most of the weight gradient, and "klt" as many functions of any form. Both apply to the weight gradient
            only; a low-rank input gradient then has the bases of "lp_l1".
        selection_pattern: Selections that differ from `selection`, by module name suffix or regular expression.
        boundary: The treatment of grids that are not a multiple of block_size. "orthogonal": a true projection, exact
            at full rank. "reflect": padding as in the paper's reference code, which counts border patches twice.
        train_base_weight: True: the adapter is a trained copy of each target's weight and bias. False: it has no
            weights of its own and only makes the backward pass cheap.
        exact_forward: Whether the forward pass of a LoRA on which LBP-WHT is stacked gives LoRA's own bits. False: the
            base weight and LoRA's branch are summed and multiplied in one product where that is faster and the base
            weight has 32 bits. The result is as close to the exact one. The forward pass of all other layers is exact
            to the bit in either case.
        base_weights: Where a target's base weight is offloaded while the only adapter in use has a trained copy of it.
            "auto": to a file that is mapped into memory ("disk"), or for models on a GPU to the CPU's memory ("cpu").
            "resident": it stays where it is, so that weights are held twice. "dropped": it is not kept; the weight
            itself is trained, and whatever needs the base weight raises an error. The setting concerns only the running
            program and is not saved with the adapter. See docs/memory.md.
        rank_pattern: Ranks that differ from r, by module name suffix or regular expression, as LoRA's. For example
            `{"layers.11.mlp.fc2": 21}`. It changes r only, not `grad_input_rank`.
        grad_input_rank_pattern: Ranks that differ from grad_input_rank, likewise; None for an input gradient that is
            not low-rank.
        grid_size: (H, W) of the patch grid. None: it is found from the model and the input.
        num_prefix_tokens: Tokens before the patches ([CLS], distillation, registers). None: their number is found
            likewise.
        num_suffix_tokens: Tokens after the patches (detection tokens). None: their number is found likewise.
        target_modules: Names, a regular expression, or "all-linear". None: every linear layer in the blocks of the
            encoder that patches of the image pass through, never the head. One forward pass of a copy of the model,
            without data or memory, finds them; the model's structure where that is not possible.
        exclude_modules: Names or a regular expression of modules not to adapt.
        modules_to_save: Modules apart from the targets that are trained in full and saved, such as the classifier:
            names, or one name.
        layers_to_transform: Indices of the blocks to adapt; needs `target_modules` as a list.
        layers_pattern: Name of the list of blocks that `layers_to_transform` counts in.
        stack_on: Configuration of another PEFT method, such as a `LoraConfig`, whose adapter is put on the model first
            and whose training LBP-WHT then makes cheap; or several, by adapter name. Needs `train_base_weight=False`.
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
        default="walsh", metadata={"help": 'Basis of a low-rank input gradient: "walsh", or "adaptive" to each image.'}
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
    selection: Selection | Pairs = field(
        default="lp_l1", metadata={"help": '"lp_l1", "lp_linf", "lhe", "klt" or a list of pairs (i, j).'}
    )
    selection_pattern: dict[str, Selection | Pairs] = field(
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
        metadata={"help": 'Where base weights are offloaded: "auto", "resident", "cpu", "disk", or "dropped".'},
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
        if self.peft_type not in (None, PeftType.LBPWHT):
            raise ValueError(f"The peft_type of an LBPWHTConfig is LBPWHT, got {show(self.peft_type)}.")
        self.peft_type: Any = PeftType.LBPWHT
        self.check()

    def check(self) -> None:
        """Check all values, and convert those that may be written in several ways.

        Raises:
            ValueError: a value is of a wrong type or out of its range.
        """
        check_settings(self)

    def weight_basis(self, r: int, selection: Selection | Pairs | None = None) -> Basis:
        """The basis of the weight gradient of a layer of rank r, or its placeholder until calibration.

        Args:
            r: The layer's rank.
            selection: The layer's selection; None: that of all layers.
        """
        selection = self.selection if selection is None else selection
        if isinstance(selection, str) and selection in CALIBRATED_SELECTIONS:
            return CALIBRATED_SELECTIONS[selection](r, self.block_size, self.boundary)
        return self._walsh_basis(r, selection)

    def input_basis(self, rank: int | None, selection: Selection | Pairs | None = None) -> WalshBasis | None:
        """The Walsh functions of a layer's input gradient of this rank; None where it is not low-rank.

        Args:
            rank: The layer's rank for it.
            selection: The layer's selection; None: that of all layers.
        """
        selection = self.selection if selection is None else selection
        if isinstance(selection, str) and selection in CALIBRATED_SELECTIONS:
            selection = "lp_l1"
        return None if rank is None else self._walsh_basis(rank, selection)

    def _walsh_basis(self, r: int, selection: Selection | Pairs) -> WalshBasis:
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


def _plain(value: Any) -> Any:
    """A value as JSON represents it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
