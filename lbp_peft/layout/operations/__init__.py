"""Rules for how each operation of PyTorch changes positions, by the operation's name.

A rule takes the operation's own arguments and returns the positions of the result. To support another operation, add a
rule to one of these modules. Positions are lost in an operation without a rule, which costs speed but never
correctness.
"""

from . import elementwise, indexing, products, shapes, spatial  # noqa: F401  They register their rules.
from .registry import RULES, RULES_BY_RESULT

__all__ = ["RULES", "RULES_BY_RESULT"]
