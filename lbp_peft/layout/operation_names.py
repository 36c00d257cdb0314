"""The plain names of PyTorch's operations, and the kinds of operations that the tracer treats differently."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket


def name_of(function: object) -> str:
    """The plain name of an operation: "add" for `torch.add`, `Tensor.add_`, `Tensor.__iadd__` and `Tensor.__radd__`."""
    if function in _SPECIAL:
        return _SPECIAL[function]
    if isinstance(function, (OpOverload, OpOverloadPacket)) and not str(function).startswith("aten"):
        return str(function)  # an extension's, which may mean something else by the same name
    name = getattr(function, "__name__", "")
    return _PLAIN_NAMES.get(name, name if name.startswith("__") else name.rstrip("_").lstrip("_"))


_SPECIAL: dict[object, str] = {
    getattr(Tensor, name).__get__: plain
    for name, plain in {"T": "t_all", "mT": "adjoint", "mH": "adjoint", "H": "adjoint", "data": "clone"}.items()
}
_SPECIAL |= {F.unfold: "im2col", F.fold: "col2im"}  # `Tensor.unfold` is something else
_PLAIN_NAMES = {
    f"__{prefix}{name}__": plain
    for name, plain in {
        "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder",
        "pow": "pow", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    }.items()
    for prefix in ("", "i", "r")
} | {"__neg__": "neg", "__invert__": "bitwise_not", "__abs__": "abs", "__eq__": "eq", "__ne__": "ne", "__lt__": "lt",
     "__le__": "le", "__gt__": "gt", "__ge__": "ge"}  # fmt: skip


def names_in(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Operations that read only the shape, dtype and device of a tensor argument.
FILLED = names_in("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty empty_strided")
# Operations that create tensors without random numbers, though perhaps from numbers that Python code chose: see
# `dependencies.py`.
DATA_INDEPENDENT = FILLED | names_in("""
    arange zeros ones full eye empty linspace logspace range tril_indices triu_indices hann_window scalar_tensor
    tensor as_tensor asarray from_numpy new_tensor
""")
# Operations that draw random numbers.
RANDOM = names_in("""
    rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like uniform
    random exponential geometric cauchy log_normal gumbel_softmax rrelu dropout
    dropout1d dropout2d dropout3d alpha_dropout feature_dropout
""")

# Operations that ask whether values are finite. Models call them in training, to clamp values that have overflowed.
FINITENESS = names_in("isfinite isinf isnan")

# Operations by which Python code reads values of a tensor, on which its next operations may then depend.
READING = names_in("""
    item tolist __bool__ __int__ __float__ __complex__ __index__ __contains__ numpy __array__ equal allclose
    is_nonzero
""")


# Operations that give Python code the memory of a tensor.
LENDING = names_in("numpy __array__ __dlpack__")

# Operations that take one axis for channels and the others for rows and columns: (N, C, H, W).
SPATIAL = names_in("""
    conv1d conv2d conv3d conv_transpose2d max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d im2col
    interpolate pixel_unshuffle pixel_shuffle batch_norm instance_norm group_norm
""")


# Operations that mix channels by a layer's weight. The first of them makes tokens of the pixels of patches.
MIXING = names_in("conv1d conv2d conv3d linear matmul mm bmm addmm baddbmm einsum")
