"""The mathematics of calibration: bases chosen by a layer's inputs and gradients, and ranks chosen by a budget."""

from .allocation import Option, allocate
from .selections import CALIBRATED_SELECTIONS, CalibratedSelection
from .statistics import TokenStatistics

__all__ = ["CALIBRATED_SELECTIONS", "CalibratedSelection", "Option", "TokenStatistics", "allocate"]
