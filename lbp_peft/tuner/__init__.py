"""The PEFT method: configuration, layer, model. No mathematics in here."""

import peft

from .compat.registration import add_peft_type, check_peft_version, register

check_peft_version(peft.__version__)
add_peft_type()
register()
