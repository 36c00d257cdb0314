"""What the example programs share: options, data, methods, the training loop, measurements and the report."""

import os

import huggingface_hub
import transformers

# Before other modules import from transformers, which tells every user at once what it falls back on.
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers.logging.set_verbosity_error()
# It logs every failed attempt to reach the hub; the program says in the end what could not be loaded.
if "HF_HUB_VERBOSITY" not in os.environ:
    huggingface_hub.logging.set_verbosity_error()
