import contextlib
import os

import pytest
from choices import deciding

from lbp_peft import projection

# No test may use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run on all cores at once, so each process uses one thread, as do the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def decide():
    """Fix choices of the heuristics until the end of the test, see [`choices.deciding`]."""
    with contextlib.ExitStack() as stack:
        yield lambda **answers: stack.enter_context(deciding(**answers))


@pytest.fixture(autouse=True)
def every_layer_is_low_rank(request, decide):
    """Have "auto" choose low-rank weight gradients and exact products for all layers.

    By itself it would leave the narrow layers of these tests exact. Tests of its own choice are marked `own_choice`.
    """
    if "own_choice" not in request.keywords:
        decide(use_low_rank=True, fastest_precision="full")


@pytest.fixture(params=["SeparableProjection", "DenseProjection"])
def way(request, decide):
    """A class that projects tokens, one of two: within a test, it projects all tokens."""
    decide(use_dense_projection=request.param == "DenseProjection")
    return getattr(projection, request.param)
