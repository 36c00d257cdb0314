"""Registers the method with PEFT."""

from __future__ import annotations

import peft
from packaging.version import Version

# The releases that were tested. PEFT's tuner internals, on which every method builds, change between minor releases.
LOWEST_PEFT, BELOW_PEFT = "0.21.0", "0.22"

NAME = "lbpwht"


def check_peft_version(version: str) -> None:
    """Raise ImportError if a version of PEFT is outside the tested range."""
    if not Version(LOWEST_PEFT) <= Version(version) < Version(BELOW_PEFT):
        raise ImportError(
            f"lbp-peft works with peft >={LOWEST_PEFT},<{BELOW_PEFT}, found {version}. "
            f'Run: pip install "peft>={LOWEST_PEFT},<{BELOW_PEFT}"'
        )


def add_peft_type() -> None:
    """Add the member LBPWHT to `PeftType`. Other packages may add members of their own."""
    from aenum import extend_enum
    from peft.utils.peft_types import PeftType

    if NAME.upper() not in PeftType.__members__:
        extend_enum(PeftType, NAME.upper(), NAME.upper())


def register() -> None:
    """Enter the method into PEFT's registry. Further calls have no effect."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    from ..config import LBPWHTConfig
    from ..model import LBPWHTModel
    from .mixed import extend_mixed_models
    from .stacked_on_top import patch_get_base_layer

    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft.PeftType[NAME.upper()])
    if registered is None:
        register_peft_method(name=NAME, config_cls=LBPWHTConfig, model_cls=LBPWHTModel, is_mixed_compatible=True)
        extend_mixed_models()
        patch_get_base_layer()
    elif registered is not LBPWHTConfig:
        raise ImportError(
            f"Another package has registered {registered.__module__}.{registered.__qualname__} with PEFT as "
            f"{NAME.upper()}. Import only one of the two."
        )
