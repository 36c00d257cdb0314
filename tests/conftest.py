import contextlib
import os

import pytest
from choices import deciding

from lbp_peft import projection

# Nothing in this suite may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run on all cores at once, so each process keeps to one; programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def decide():
    """Fixes choices of the heuristics until the end of the test: see [`choices.deciding`]."""
    with contextlib.ExitStack() as stack:
        yield lambda **answers: stack.enter_context(deciding(**answers))


@pytest.fixture(autouse=True)
def every_layer_pays(request, decide):
    """The default, grad_input_dtype="auto", leaves narrow layers exact, and the layers of these tests are narrow.

    Here all pay, with exact products, but for tests of that choice, marked `own_choice`.
    """
    if "own_choice" not in request.keywords:
        decide(use_low_rank=True, fastest_precision="full")


@pytest.fixture(params=["SeparableProjection", "DenseProjection"])
def way(request, decide):
    """Either class that projects tokens. Within the test they all are projected that way, whichever is faster."""
    decide(use_dense_projection=request.param == "DenseProjection")
    return getattr(projection, request.param)
