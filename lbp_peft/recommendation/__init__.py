"""Which settings suit a model, its data and this machine: candidates are measured, and one is chosen."""

from .bounds import Bounds, BudgetError
from .candidates import CANDIDATES, Candidate
from .result import Recommendation
from .search import recommend

__all__ = ["CANDIDATES", "Bounds", "BudgetError", "Candidate", "Recommendation", "recommend"]
