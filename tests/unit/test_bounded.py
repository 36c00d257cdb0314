"""What is kept from step to step does not grow with the number of image sizes and adapters."""

from __future__ import annotations

import copy
import pickle
import threading

import models
import pytest
import reference
import torch
from peft import LoKrConfig, get_peft_model

from lbp_peft import LBPWHTConfig, projection
from lbp_peft.bases import separable as bases
from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.grids import TokenLayout, TokenOrder
from lbp_peft.bounded import BoundedCache
from lbp_peft.formats import weight_cache
from lbp_peft.tuner.patches.forward_patch import _patched_class


def test_the_oldest_entry_goes():
    cache = BoundedCache(2)
    cache["a"], cache["b"] = 1, 2
    cache["a"] = 3  # no new entry
    assert cache == {"a": 3, "b": 2}
    cache["c"] = 4
    assert cache == {"b": 2, "c": 4}


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_keep_entries_and_limit(again):
    cache = BoundedCache(70)
    for number in range(100):
        cache[number] = number
    found = again(cache)
    assert found == cache and len(found) == found.limit == 70
    found["new"] = 0
    assert len(found) == 70 and "new" not in cache


def test_threads_may_fill_it_together():
    cache = BoundedCache(3)
    failures = []

    def fill():
        try:
            for number in range(2000):
                cache[number % 7] = number
                cache.get(number % 5)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(cache) == 3


@pytest.mark.parametrize("boundary", ["orthogonal", "reflect"])
def test_matrices_of_ever_new_grids_are_dropped(boundary):
    """Texts have many lengths and images many sizes; a matrix that was dropped is made again with the same values."""
    chosen, device = BasisSet(3, 4, boundary=boundary), torch.device("cpu")
    tokens = torch.randn(1, 64, 2, generator=torch.Generator().manual_seed(0))
    for strides in ((), ((2, 2),)):

        def layout_of(grid, strides=strides):
            return TokenLayout(grid, order=TokenOrder(reference.unrolled(grid, strides)) if strides else None)

        layout = layout_of((8, 8))
        first = [kind(layout, chosen, tokens.dtype, device).project(tokens) for kind in KINDS]
        for height in range(4, 30):
            for width in range(4, 24, 4):
                sides = (2 * height, 2 * width) if strides else (height, width)
                for kind in KINDS:
                    made = kind(layout_of(sides), chosen, tokens.dtype, device)
                    if kind is projection.DenseProjection and height > 12:
                        continue
                    made.project(torch.zeros(1, sides[0] * sides[1], 1))
        for kept in (bases._matrices, bases._wholes, bases._orders):
            assert len(kept) <= kept.limit
        again = [kind(layout, chosen, tokens.dtype, device).project(tokens) for kind in KINDS]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


KINDS = (projection.SeparableProjection, projection.DenseProjection)


@pytest.mark.parametrize("function", [
    bases.axis_blocks, bases.num_bases, bases.grid_bases, weight_cache._weights_of_rows,
    _patched_class,
])  # fmt: skip
def test_what_functions_remember_is_bounded(function):
    assert function.cache_info().maxsize is not None


def test_what_was_tried_out_with_every_set_of_adapters_is_bounded():
    beneath = {f"a{i}": LoKrConfig(r=2, target_modules=["q_proj"]) for i in range(20)}
    config = LBPWHTConfig(r=3, grad_input_dtype="full", train_base_weight=False, stack_on=beneath)
    model = get_peft_model(models.tiny_vit(), config).train()
    for name in beneath:
        model.stacked_on.set_adapter(name)
        model(pixel_values=models.images()).logits.sum().backward()
    records = [layer._why_not_token_wise for layer in models.layers_of(model).values()]
    assert any(records) and max(map(len, records)) <= records[0].limit < 20
