"""Recommends settings for a model, its data and a machine, by measuring candidates."""

from .bounds import Bounds, BudgetError
from .candidates import CANDIDATES, Candidate
from .result import Recommendation
from .search import recommend

__all__ = ["CANDIDATES", "Bounds", "BudgetError", "Candidate", "Recommendation", "recommend"]
