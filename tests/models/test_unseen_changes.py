"""Tokens, and tables that order them, that are changed behind PyTorch: by NumPy, DLPack, or an extension."""

import warnings

import numpy as np
import pytest
import torch
from arranged import SIDE, Net, adapted, found
from models import images, layers_of

from lbp_peft import layout_report
from lbp_peft.layout import contents
from lbp_peft.layout.tracer import PositionTracer

ORDER = np.random.RandomState(0).permutation(SIDE**2)


class Ordered(Net):
    """A model that puts its tokens in the order that a buffer holds."""

    def __init__(self, order):
        super().__init__(lambda tokens: tokens[:, self.order])
        self.register_buffer("order", order)


def true_order(model):
    """The place of each token of the first layer, found by comparing it with all patches."""
    seen, net = {}, model.base_model.model
    layer = next(iter(layers_of(model).values()))
    hook = layer.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0].detach()))
    x = images()
    model(x).sum().backward()
    hook.remove()
    in_order = net.cut(x).detach().flatten(2).transpose(1, 2)
    return torch.cdist(seen["tokens"][0], in_order[0]).argmin(1).tolist()


def recorded_order(model):
    layout = next(iter(layout_report(model).layers.values())).layout
    return None if layout is None else list(layout.order or range(SIDE**2))


def as_numpy(tensor):
    return tensor.numpy()


def as_dlpack(tensor):
    return torch.from_dlpack(tensor)


@pytest.mark.parametrize("view", [as_numpy, as_dlpack])
def test_an_order_that_is_rewritten_between_passes_is_seen(view, monkeypatch):
    traced, trace = [], PositionTracer.__init__
    model = adapted(Ordered(torch.arange(SIDE**2)))
    monkeypatch.setattr(PositionTracer, "__init__", lambda self, *given: traced.append(given) or trace(self, *given))
    shared = view(model.base_model.model.order)
    for _ in range(3):
        assert recorded_order_after(model) == list(range(SIDE**2))
    shared[:] = shared[ORDER]
    for _ in range(3):
        assert recorded_order_after(model) == ORDER.tolist()
    assert len(traced) == 2


def recorded_order_after(model):
    assert true_order(model) == model.base_model.model.order.tolist()
    return recorded_order(model)


def test_an_order_in_the_memory_of_an_array_that_is_too_large_to_compare_counts_as_unknown(monkeypatch):
    monkeypatch.setattr(contents, "MOST_VALUES", 16)
    model = adapted(Ordered(torch.from_numpy(ORDER.copy())))
    with pytest.warns(UserWarning, match="uses exact backpropagation"):
        true_order(model)
    assert recorded_order(model) is None
    model = adapted(Ordered(torch.tensor(ORDER)))
    assert true_order(model) == recorded_order(model)


class Rewriting(Ordered):
    """A model that rewrites the table through an array before it uses it."""

    def __init__(self):
        super().__init__(torch.arange(SIDE**2))
        self.array = np.zeros(2**17)  # larger than what is compared
        self.arrange = self.rewrite

    def rewrite(self, tokens):
        self.order.numpy()[:] = ORDER
        return tokens[:, self.order]


def test_an_order_that_a_pass_rewrites_before_it_is_used_counts_as_unknown():
    model = adapted(Rewriting())
    with pytest.warns(UserWarning, match="uses exact backpropagation"):
        true_order(model)
    assert recorded_order(model) is None


def through_numpy(tokens):
    array = tokens.numpy()
    array[:] = array[:, ORDER]
    return tokens


def through_an_array_of_a_view(tokens):
    array = np.asarray(tokens.transpose(1, 2))
    array[:] = array[:, :, ORDER]
    return tokens


def through_dlpack(tokens):
    other = torch.from_dlpack(tokens)
    other[:] = other[:, ORDER]
    return tokens


def through_dlpack_of_a_part(tokens):
    other = torch.from_dlpack(tokens[1:])
    other[:] = other[:, ORDER]
    return tokens


def through_a_capsule(tokens):
    other = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tokens))
    other[:] = other[:, ORDER]
    return tokens


def through_the_storage(tokens):
    other = torch.empty(0).set_(tokens.untyped_storage(), 0, tokens.shape, tokens.stride())
    other.copy_(tokens[:, ORDER].clone())
    return tokens


def by_another_storage(tokens):
    return tokens.set_(tokens[:, ORDER].contiguous())


def under_a_view(tokens):
    view = tokens[:]
    torch._foreach_copy_([tokens], [tokens[:, ORDER].clone()])
    return view


def _mix(tokens):
    tokens.copy_(tokens[:, ORDER])


torch.library.define("lbp_tests::roll", "(Tensor tokens, int shift, int axis) -> Tensor")
torch.library.impl("lbp_tests::roll", "CompositeImplicitAutograd")(lambda tokens, shift, axis: tokens[:, ORDER])
torch.library.define("lbp_tests::mix_", "(Tensor(a!) tokens) -> ()")
torch.library.impl("lbp_tests::mix_", "CPU")(_mix)


def by_an_extension(tokens):
    return torch.ops.lbp_tests.roll(tokens, 1, 1)


def by_an_extension_that_returns_nothing(tokens):
    torch.ops.lbp_tests.mix_(tokens)
    return tokens


CHANGES = [
    through_numpy, through_an_array_of_a_view, through_dlpack, through_dlpack_of_a_part, through_a_capsule,
    through_the_storage, by_another_storage, under_a_view, by_an_extension, by_an_extension_that_returns_nothing,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:Each forward pass is traced")
def test_tokens_that_are_changed_unseen_are_exact_with_one_warning(change):
    def arrange(tokens):
        return change(tokens.detach().clone()) + 0 * tokens.mean()

    model = adapted(Net(arrange))
    with pytest.warns(UserWarning, match="uses exact backpropagation") as caught:
        order = true_order(model)
    assert order == ORDER.tolist() or change is through_dlpack_of_a_part  # which changes the other image
    assert len([w for w in caught if "exact backpropagation" in str(w.message)]) == 1
    assert found(model) == {None}


def test_views_of_tokens_that_are_changed_in_their_places_keep_them():
    def arrange(tokens):
        tokens = tokens.clone()
        view, half = tokens.detach(), tokens[:, : SIDE**2 // 2]
        view.mul_(2)
        half += half.mean()
        tokens[:, 1:] += tokens[:, :1].mean()
        torch.nn.functional.relu(tokens, inplace=True)
        return tokens.contiguous()

    model = adapted(Net(arrange))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(images()).sum().backward()
    assert {layout.grid for layout in found(model)} == {(SIDE, SIDE)}


def test_a_parameter_whose_memory_sharded_training_has_freed_is_not_read():
    """Reading it would end the process."""
    model = adapted(Ordered(torch.arange(SIDE**2)))
    freed = torch.nn.Parameter(torch.zeros(8))
    model.base_model.model.register_parameter("freed", freed)
    for _ in range(2):  # a pass that is traced, and one that compares
        freed.untyped_storage().resize_(0)
        assert recorded_order_after(model) == list(range(SIDE**2))
        freed.untyped_storage().resize_(32)


def test_contents_are_compared_only_while_there_is_memory():
    tensor = torch.arange(4.0)
    held = contents.Contents(tensor)
    assert held.is_copied and held.match(tensor)
    tensor.untyped_storage().resize_(0)
    assert held.match(tensor) and not contents.Contents(tensor).is_copied
    tensor.untyped_storage().resize_(16)
    tensor.copy_(torch.ones(4))
    assert not held.match(tensor)
