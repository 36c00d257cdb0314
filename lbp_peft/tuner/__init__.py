"""The PEFT method: its configuration, layers and model. This package contains no mathematics."""

import peft

from .compat.registration import add_peft_type, check_peft_version, register

check_peft_version(peft.__version__)
add_peft_type()
register()

# These imports come after the registration, since the modules refer to the PEFT type of the method.
from .config import LBPWHTConfig  # noqa: E402
from .layers.base import LBPWHTLayer  # noqa: E402
from .layers.conv1d import LBPWHTTransposedLinear  # noqa: E402
from .layers.conv1x1 import LBPWHTPointwiseConv  # noqa: E402
from .layers.linear import LBPWHTLinear  # noqa: E402
from .layers.recording import BackwardPass  # noqa: E402
from .model import LBPWHTModel  # noqa: E402
from .report import LayoutReport, exact_backward, layout_report  # noqa: E402
from .targets import targets_from  # noqa: E402
from .verify import LayoutCheck, verify_layout  # noqa: E402

__all__ = [
    "BackwardPass",
    "LBPWHTConfig",
    "LBPWHTLayer",
    "LBPWHTLinear",
    "LBPWHTModel",
    "LBPWHTPointwiseConv",
    "LBPWHTTransposedLinear",
    "LayoutCheck",
    "LayoutReport",
    "exact_backward",
    "layout_report",
    "targets_from",
    "verify_layout",
]
