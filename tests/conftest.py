import os

import pytest

# Nothing in this suite may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run on all cores at once, so each process keeps to one; programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def every_layer_pays(request, monkeypatch):
    """The default, grad_input_dtype="auto", leaves narrow layers exact, and the layers of these tests are narrow.

    Here all pay, with exact products, but for tests of that choice, marked `own_choice`.
    """
    if "own_choice" not in request.keywords:
        monkeypatch.setattr("lbp_peft.tuner.layers.base.low_rank_pays", lambda *_: True)
        monkeypatch.setattr("lbp_peft.tuner.layers.base.fastest_precision", lambda *_: "full")


@pytest.fixture(params=["Projection", "OneMatrix"])
def way(request, monkeypatch):
    """Either class that projects tokens. Within the test they all are projected that way, whichever is faster."""
    from lbp_peft import projection

    monkeypatch.setattr(projection, "one_matrix_pays", lambda *_: request.param == "OneMatrix")
    return getattr(projection, request.param)
