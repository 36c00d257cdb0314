import contextlib
import os

import pytest
from choices import deciding

from lbp_peft import projection
from lbp_peft.tuner import inject

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


@pytest.fixture(autouse=True, scope="session")
def targets_of_like_models_are_found_once():
    """Follow patches through one of the many models of transformers that are built alike, to save time.

    tests/models/test_targets.py calls the function itself.
    """
    find, found = inject.default_targets, {}

    def find_once(model):
        key = structure_of(model)
        if key is None:
            return find(model)
        if key not in found:
            found[key] = find(model)
        return list(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inject, "default_targets", find_once)
        yield


def structure_of(model):
    """All that the default targets of a model of transformers depend on; None for other models, or with hooks."""
    modules = dict(model.named_modules())
    if not hasattr(model, "config") or any(m._forward_hooks or m._forward_pre_hooks for m in modules.values()):
        return None
    if any("forward" in vars(module) for module in modules.values()):
        return None
    shapes = tuple((name, parameter.shape) for name, parameter in model.named_parameters())
    return type(model), str(model.config), tuple((name, type(module)) for name, module in modules.items()), shapes


@pytest.fixture(params=["SeparableProjection", "DenseProjection"])
def way(request, decide):
    """A class that projects tokens, one of two: within a test, it projects all tokens."""
    decide(use_dense_projection=request.param == "DenseProjection")
    return getattr(projection, request.param)
