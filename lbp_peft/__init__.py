"""Low-rank backpropagation for Vision Transformers as a PEFT method.

Importing the package registers the method with PEFT:

    from peft import get_peft_model
    from lbp_peft import LBPWHTConfig

    model = get_peft_model(vit, LBPWHTConfig(r=10, modules_to_save=["classifier"]))
"""

from . import measure, tuner  # importing tuner registers the method
from .bases.base import Basis
from .bases.basis_set import BasisSet
from .bases.calibrated import CalibratedBasis, NotCalibratedError
from .bases.dense import DenseBasis
from .bases.grids import LayoutError, TokenLayout
from .bases.listed import ListedBasis
from .calibration_callback import CalibrationCallback
from .callback import LBPWHTCallback
from .formats.products import Precision
from .layer_types import LayerType, register_layer_type
from .layout import GridMismatchError
from .measure.gradients import GradientQuality, gradient_quality
from .ops.adaptive import AdaptiveBasis
from .ops.branches import Branch
from .ops.linear import low_rank_linear
from .ops.plan import BackwardPlan, ExactProduct, FixedBasis, InputGradient
from .recommendation import BudgetError, Candidate, Recommendation, recommend
from .recommendation.ranks import RankAllocation, allocate_ranks
from .tuner.calibrate import Calibration, calibrate
from .tuner.config import LBPWHTConfig
from .tuner.layers.base import LBPWHTLayer
from .tuner.layers.linear import LBPWHTLinear
from .tuner.model import LBPWHTModel
from .tuner.report import LayoutReport, exact_backward, layout_report
from .tuner.targets import targets_from
from .tuner.verify import LayoutCheck, verify_layout
from .warm_up_callback import ExactWarmUpCallback

__version__ = "0.1.0"  # the only place; pyproject.toml reads it from here

__all__ = [
    "AdaptiveBasis",
    "BackwardPlan",
    "Basis",
    "BasisSet",
    "Branch",
    "BudgetError",
    "CalibratedBasis",
    "Calibration",
    "CalibrationCallback",
    "Candidate",
    "DenseBasis",
    "ExactProduct",
    "ExactWarmUpCallback",
    "FixedBasis",
    "GradientQuality",
    "GridMismatchError",
    "InputGradient",
    "LBPWHTCallback",
    "LBPWHTConfig",
    "LBPWHTLayer",
    "LBPWHTLinear",
    "LBPWHTModel",
    "LayerType",
    "LayoutCheck",
    "LayoutError",
    "LayoutReport",
    "ListedBasis",
    "NotCalibratedError",
    "Precision",
    "RankAllocation",
    "Recommendation",
    "TokenLayout",
    "allocate_ranks",
    "calibrate",
    "exact_backward",
    "gradient_quality",
    "layout_report",
    "low_rank_linear",
    "measure",
    "recommend",
    "register_layer_type",
    "targets_from",
    "tuner",
    "verify_layout",
]
