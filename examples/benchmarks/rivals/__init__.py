"""Other methods that make the backward pass cheaper or smaller, to measure LBP-WHT against; no part of the package.

Each file holds one method as its paper describes it, and says what it keeps, what it approximates and where it differs
from the paper. The forward pass of all of them is exact. They are written for these comparisons: short rather than
fast, on linear layers with inputs (B, L, C). Low-precision products are computed in float32 on rounded values.

To add one that changes linear layers, write a [`BackwardRule`] (see linear.py) and name it in `RIVALS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .gradient_filter import GradientFilter
from .hlq import HLQ
from .hosvd import HOSVD
from .hot import HOT
from .instant import INSTANT
from .linear import with_rule
from .lowmemory_bp import with_low_memory_functions

# From a model, and settings by name, to the model; ValueError or TypeError: the model or a setting does not fit.
RIVALS: dict[str, Callable[..., nn.Module]] = {
    "hosvd": with_rule(HOSVD),
    "hlq": with_rule(HLQ),
    "hot": with_rule(HOT),
    "instant": with_rule(INSTANT),
    "gradient-filter": with_rule(GradientFilter),
    "lowmemory-bp": with_low_memory_functions,
}
