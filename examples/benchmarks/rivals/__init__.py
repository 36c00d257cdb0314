"""Other methods that save time or memory in the backward pass, for comparisons. They are not a part of the package.

Each file implements one method as its paper describes it, and says what the method keeps, what it approximates and
where the implementation differs from the paper. The forward pass of all methods is exact. The code is written for these
comparisons: it is short rather than fast, and adapts linear layers with inputs (B, L, C). Products in low precision are
computed in float32 from quantized values.

To add a method that changes linear layers, write a [`GradientRule`] (see linear.py) and add it to `RIVALS`.
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

# Each function takes a model, and settings by name, and returns the changed model. It raises ValueError or TypeError if
# the model or a setting does not suit the method.
RIVALS: dict[str, Callable[..., nn.Module]] = {
    "hosvd": with_rule(HOSVD),
    "hlq": with_rule(HLQ),
    "hot": with_rule(HOT),
    "instant": with_rule(INSTANT),
    "gradient-filter": with_rule(GradientFilter),
    "lowmemory-bp": with_low_memory_functions,
}
