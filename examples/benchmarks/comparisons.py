"""Sets of methods that are measured together, by a name that stands for all of them.

    python examples/benchmarks/training_step.py --methods comparison memory

The methods are written as methods.py describes.
"""

from __future__ import annotations

from collections.abc import Iterable

_ADAPTIVE = tuple(f"grad_input_basis=adaptive,grad_input_rank={rank}" for rank in (16, 24, 32))
_LOW_RANK = ("r=10", *(f"r=10,{setting}" for setting in (*_ADAPTIVE, "grad_input_rank=10")))

# LoRA and methods that make it cheaper; LBP-WHT with each kind of input gradients, alone and on LoRA.
COMPARISON = (
    "full",
    "lora-qv",
    "lora-all",
    "lora-fa",
    "velora",
    "lora-one-product",
    *(f"lbp-wht:{settings}" for settings in _LOW_RANK),
    "lbp-wht:r=10,grad_input_dtype=full",
    *(f"lora-all+lbp-wht:{settings}" for settings in _LOW_RANK),
)
COMPILED = tuple(f"{method}+compile" for method in COMPARISON)
# What takes less memory, with its price in time.
MEMORY = (
    "full",
    "full+checkpointing",
    "full+checkpointing:every=2",
    "lora-all",
    "lora-all+checkpointing",
    "lora-fa",
    "velora",
    "lbp-wht:r=10",
    "lbp-wht:r=10,compress_activations=all",
    "lbp-wht:r=10+checkpointing",
    "lbp-wht:r=10+checkpointing:every=2",
    "lbp-wht:r=10,compress_activations=all+checkpointing",
    "lora-all+lbp-wht:r=10",
    "lora-all+lbp-wht:r=10,compress_activations=all",
    "lora-all+lbp-wht:r=10+checkpointing",
    "lora-all+lbp-wht:r=10+checkpointing:every=2",
    "lora-all+lbp-wht:r=10,compress_activations=all+checkpointing",
)
SETS = {"comparison": COMPARISON, "compiled": COMPILED, "memory": MEMORY}


def expanded(names: Iterable[str]) -> list[str]:
    """The methods, with each name of a set replaced by its methods, and each method once."""
    return list(dict.fromkeys(method for name in names for method in SETS.get(name, (name,))))
