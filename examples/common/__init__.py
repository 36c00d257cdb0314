"""What the example programs share: options, data, methods, the training loop, measurements and the report."""

import os

import transformers

# Before other modules import from transformers, which tells every user at once what it falls back on.
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers.logging.set_verbosity_error()
