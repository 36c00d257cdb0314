"""What a user may choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from ..bases import BOUNDARIES, BasisSet
from ..precision import AUTO, FULL, PRECISIONS, Precision
from ..walsh import SELECTIONS, is_power_of_two


@dataclass
class LBPWHTConfig(PeftConfig):
    """Configuration of low-rank backpropagation through linear layers (LBP-WHT, arXiv 2309.15275).

    Args:
        r: Walsh bases kept in each block of `block_size` x `block_size` patches for the weight gradient, 1 to
            block_size**2. It need not be triangular or square. 1, 3, 6, 10, 15, 21, 28, 36 are the paper's LP_L1-1 to
            LP_L1-8.
        grad_input: The input gradient. "auto": exact, or exact up to the rounding of its product g W to few bits,
            whichever is faster for the device and the shape; a layer so narrow that exact backpropagation is faster
            altogether is left to it, with one warning. See docs/configuration.md. "full": exact. "int8", "bf16",
            "fp8": exact up to the rounding to that type. An int: low-rank, with a rank of its own; the paper's setting
            is `grad_input=r`. Its error compounds from the last layer to the first, that of the weight gradient does
            not. A pair, as in (10, "int8"): low-rank, and its product rounded. Beside a product in low precision the
            two factors of the weight gradient are rounded to bfloat16.
        rotation: Before g and W are rounded to 8 bits, mix blocks of so many outputs by a Hadamard matrix, a power of
            two; 0: not. It spreads outliers and cancels in the product.
        compress_activations: "int8": activation functions and norms between the adapted layers keep their inputs in 8
            bits for the backward pass, and run again there. Less memory, a little more time, gradients off by the
            rounding. None: they save what they always do.
        block_size: Order of the two-dimensional Walsh-Hadamard transform, a power of two.
        selection: Which bases (i, j) come first: "lp_l1" by i + j, "lp_linf" by max(i, j). Ties: see
            [`lbp_peft.walsh.basis_order`].
        boundary: On grids that are no multiple of block_size. "orthogonal": a true projection, exact at full rank.
            "reflect": as the paper's reference code, which counts border patches twice.
        train_base_weight: True: the adapter is a trained copy of each target's weight and bias. False: it has no
            weights of its own and only makes the backward pass cheap.
        rank_pattern: Ranks that differ from r, by module name suffix or regular expression, as LoRA's. For example
            `{"layers.11.mlp.fc2": 21}`. It changes r only, not `grad_input`.
        grid_size: (H, W) of the patch grid. None: found out from the model and the input.
        num_prefix_tokens: Tokens before the patches ([CLS], distillation, registers). None: found out.
        num_suffix_tokens: Tokens after the patches (detection tokens). None: found out.
        target_modules: Names, a regular expression, or "all-linear". None: every linear layer in the blocks of the
            encoder, never the head.
        exclude_modules: Names or a regular expression of modules not to adapt.
        modules_to_save: Modules apart from the targets that are trained in full and saved, such as the classifier.
        layers_to_transform: Indices of the blocks to adapt; needs `target_modules` as a list.
        layers_pattern: Name of the list of blocks that `layers_to_transform` counts in.
        stack_on: Configuration of another PEFT method, say a `LoraConfig`, whose adapter is put on the model first and
            whose training LBP-WHT then makes cheap; or several, by adapter name. Needs `train_base_weight=False`.
            Filled in when a stack is saved, so that its checkpoint is complete.
        stack_active: Which adapters of `stack_on` are active. None: the first.

    Raises:
        ValueError: a value is out of its range; the message says which are allowed.
    """

    r: int = field(default=10, metadata={"help": "Walsh bases kept per block for the weight gradient."})
    grad_input: str | int | tuple[int, str] = field(
        default=AUTO,
        metadata={"help": '"auto", "full" (exact), "int8", "bf16", "fp8", the rank of a low-rank one, or both.'},
    )
    rotation: int = field(default=0, metadata={"help": "Outputs mixed by a Hadamard matrix before rounding; 0: none."})
    compress_activations: str | None = field(
        default=None, metadata={"help": '"int8": activation functions and norms keep their inputs in 8 bits.'}
    )
    block_size: int = field(default=8, metadata={"help": "Order of the 2-D Walsh-Hadamard transform."})
    selection: str = field(default="lp_l1", metadata={"help": '"lp_l1" or "lp_linf".'})
    boundary: str = field(default="orthogonal", metadata={"help": '"orthogonal" or "reflect".'})
    train_base_weight: bool = field(
        default=True, metadata={"help": "Train a copy of each target's weight, or only make its backward pass cheap."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "{regular expression or suffix: r} where r differs."}
    )
    grid_size: tuple[int, int] | None = field(default=None, metadata={"help": "(H, W) of the patch grid."})
    num_prefix_tokens: int | None = field(default=None, metadata={"help": "Tokens before the patches."})
    num_suffix_tokens: int | None = field(default=None, metadata={"help": "Tokens after the patches."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": 'Names, a regular expression or "all-linear"; None for the whole encoder.'}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules not to adapt."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full and saved."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    stack_on: PeftConfig | dict[str, PeftConfig] | None = field(
        default=None, metadata={"help": "Configuration of the adapter beneath, such as a LoraConfig."}
    )
    stack_active: list[str] | None = field(default=None, metadata={"help": "Active adapters of stack_on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LBPWHT
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        for name in ("grid_size", "grad_input"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                setattr(self, name, tuple(getattr(self, name)))
        self._check_transform()
        self._check_layout()
        self._check_stack()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list of names; with a regular expression, write the "
                "layer indices into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give layers_to_transform too.")

    def weight_bases(self, r: int) -> BasisSet:
        """The bases of the weight gradient of a layer whose rank is r."""
        return BasisSet(r, self.block_size, self.selection, self.boundary)

    def input_bases(self) -> BasisSet | None:
        """The bases of the input gradient, None where it has all."""
        rank = self.grad_input[0] if isinstance(self.grad_input, tuple) else self.grad_input
        if isinstance(rank, str):
            return None
        return BasisSet(rank, self.block_size, self.selection, self.boundary)

    def input_precision(self) -> Precision:
        """Of the product in the input gradient."""
        name = self.grad_input[1] if isinstance(self.grad_input, tuple) else self.grad_input
        return Precision(name, self.rotation) if isinstance(name, str) else FULL

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        if self.stack_on:
            output["stack_on"] = {name: _plain(config.to_dict()) for name, config in self.stack_on.items()}
        return output

    def _check_stack(self) -> None:
        if self.stack_on is None:
            return
        if isinstance(self.stack_on, PeftConfig):
            self.stack_on = {"default": self.stack_on}
        if not isinstance(self.stack_on, dict) or not all(
            isinstance(c, (PeftConfig, dict)) for c in self.stack_on.values()
        ):
            raise ValueError(
                f"stack_on must be a PEFT configuration, or several by adapter name, got {self.stack_on!r}."
            )
        self.stack_on = {
            name: config if isinstance(config, PeftConfig) else PeftConfig.from_peft_type(**config)
            for name, config in self.stack_on.items()
        }
        if any(config.peft_type == self.peft_type or config.is_prompt_learning for config in self.stack_on.values()):
            raise ValueError(
                "stack_on must be a configuration of another method with adapters in layers, such as LoRA."
            )
        unknown = set(self.stack_active or []) - self.stack_on.keys()
        if unknown:
            raise ValueError(
                f"stack_active names {', '.join(sorted(unknown))}, but stack_on has {list(self.stack_on)}."
            )

    def _check_transform(self) -> None:
        if not _is_int(self.block_size) or not is_power_of_two(self.block_size):
            raise ValueError(f"block_size must be a power of two (the paper uses 8), got {self.block_size!r}.")
        self._check_rank("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            self._check_rank(f"rank_pattern[{pattern!r}]", rank)
        self._check_grad_input()
        if self.compress_activations not in (None, "int8"):
            raise ValueError(f'compress_activations must be "int8" or None, got {self.compress_activations!r}.')
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {self.boundary!r}.")

    def _check_grad_input(self) -> None:
        value = self.grad_input
        if _is_int(value):
            self._check_rank("grad_input", value)
        else:
            name = value
            if isinstance(value, tuple) and len(value) == 2:
                rank, name = value
                self._check_rank("the rank in grad_input", rank)
            if name not in (*PRECISIONS, AUTO):
                raise ValueError(
                    f"grad_input must be one of {', '.join(PRECISIONS)}, {AUTO}, a rank (an int), or a pair of a rank "
                    f"and one of these, got {value!r}."
                )
        if not _is_int(self.rotation) or (self.rotation and not is_power_of_two(self.rotation)):
            raise ValueError(f"rotation must be a power of two (16 to 128 are useful), or 0, got {self.rotation!r}.")

    def _check_rank(self, name: str, rank: Any) -> None:
        full = self.block_size**2
        if not _is_int(rank) or not 1 <= rank <= full:
            raise ValueError(f"{name} must be an int from 1 to block_size**2 = {full}, got {rank!r}.")

    def _check_layout(self) -> None:
        grid = self.grid_size
        if grid is not None and not (
            isinstance(grid, tuple) and len(grid) == 2 and all(_is_int(side) and side > 0 for side in grid)
        ):
            raise ValueError(f"grid_size must be two positive ints (height, width) in patches, got {grid!r}.")
        for name in ("num_prefix_tokens", "num_suffix_tokens"):
            number = getattr(self, name)
            if number is not None and (not _is_int(number) or number < 0):
                raise ValueError(f"{name} must be an int of at least 0, got {number!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
