"""Code that the example programs share: options, data, methods, the training loop, measurements and the report."""

import os

import huggingface_hub
import transformers

# Set before other modules import from transformers, which prints its fallbacks on import.
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers.logging.set_verbosity_error()
# It logs every failed attempt to reach the hub. The program itself reports what could not be loaded.
if "HF_HUB_VERBOSITY" not in os.environ:
    huggingface_hub.logging.set_verbosity_error()
