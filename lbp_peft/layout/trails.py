"""What is known about the tensors of a forward pass that is being traced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .contents import Contents, storage_of, version_of
from .positions import FIRST_TEXT, equal

# The reason why positions were lost, if no operation of the pass has lost them.
_UNSEEN = "a change in place"


@dataclass(frozen=True)
class Origin:
    """Where the tokens of an input begin.

    Attributes:
        name: The name of the layer that made tokens of an image, such as the patch embedding, or of the model's
            argument.
        steps: The number of operations since then.
        is_layer: Whether the name is that of a layer.
    """

    name: str
    steps: int = 0
    is_layer: bool = False


@dataclass(frozen=True)
class Trail:
    """What the tracer knows about a tensor that depends on the input.

    Attributes:
        positions: The positions of its elements, in its shape; None if no element has one.
        origins: The origins of its tokens, by the number of the input.
        lost_by: The name of the operation after which positions were no longer known; "" if there was none.
        is_certain: Whether it is certain which axis of the input runs over channels, as it is after a convolution.
        of_mask: Whether it depends only on attention masks.
    """

    positions: Tensor | None
    origins: Mapping[int, Origin] = field(default_factory=dict)
    lost_by: str = ""
    is_certain: bool = True
    of_mask: bool = False


def advance_origins(trails: list[Trail]) -> dict[int, Origin]:
    """The origins of an operation's result: for each input, that of a layer, if any, and the one farthest back."""
    farthest: dict[int, Origin] = {}
    for trail in [trail for trail in trails if not trail.of_mask] or trails:
        for source, origin in trail.origins.items():
            other = farthest.get(source)
            if other is None or (origin.is_layer, origin.steps) > (other.is_layer, other.steps):
                farthest[source] = origin
    return {source: replace(origin, steps=origin.steps + 1) for source, origin in farthest.items()}


def origins_after_layer(origins: dict[int, Origin], layer: str) -> dict[int, Origin]:
    """The origins of a layer's output: images are followed from the first layer, which embeds their patches."""
    return {
        source: replace(origin, name=layer, steps=0, is_layer=True)
        if source < FIRST_TEXT and not origin.is_layer
        else origin
        for source, origin in origins.items()
    }


class Trails:
    """Which tensors depend on the input, and which are certain not to.

    The version of each tensor is remembered with it. If a tensor that is used has a version that no operation of this
    pass gave it, something else (`Tensor.set_`, or an extension) has changed it, and nothing is known about it any
    longer.

    Args:
        model_tensors: The model's tensors, which are constants.
    """

    def __init__(self, model_tensors: Iterable[Tensor]) -> None:
        self._trails: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # Tensors that are known to depend neither on the input nor on random numbers, each with those of the model that
        # it was computed from.
        self._constants: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # The versions that operations of this pass have given to the memory at an address.
        self._versions: dict[int, set[int]] = {}
        # The values of the model's tensors when the pass began.
        self._contents: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor in model_tensors:
            self.put_constant(tensor, (tensor,))
            self._contents[tensor] = Contents(tensor)

    def get(self, tensor: Tensor) -> Trail | None:
        """The trail of a tensor; None if it is not known to depend on the input."""
        trail, version = self._trails.get(tensor, (None, 0))
        if trail is not None and trail.positions is not None and not self._is_current(tensor, version):
            trail = replace(trail, positions=None, lost_by=trail.lost_by or _UNSEEN)
            self._trails[tensor] = trail, version
        return trail

    def made_of(self, tensor: Tensor) -> tuple[Tensor, ...] | None:
        """The model's tensors that a constant was computed from; None if it is not certain to be a constant."""
        made_of, version = self._constants.get(tensor, (None, 0))
        return made_of if made_of is not None and self._is_current(tensor, version) else None

    def contents(self, tensor: Tensor) -> Contents | None:
        """The values of one of the model's tensors; None if they were changed in this pass, or cannot be relied on."""
        contents = self._contents.get(tensor)
        return contents if contents is not None and contents.match(tensor) and contents.is_reliable else None

    def put(self, tensor: Tensor, trail: Trail) -> None:
        """Follow a tensor from here."""
        self._trails[tensor] = trail, version_of(tensor)
        self._constants.pop(tensor, None)

    def put_constant(self, tensor: Tensor, made_of: tuple[Tensor, ...]) -> None:
        """Treat a tensor as a constant that is computed from these tensors of the model."""
        self._constants[tensor] = made_of, version_of(tensor)

    def forget_constant(self, tensor: Tensor) -> None:
        """No longer treat a tensor as a constant."""
        self._constants.pop(tensor, None)

    def note_version(self, tensor: Tensor) -> None:
        """Record that an operation of this pass has changed a tensor in place."""
        self._versions.setdefault(_address(tensor)[0], set()).add(version_of(tensor))

    def note_change(self, tensor: Tensor, before: Trail | None) -> None:
        """Record that an operation has changed a tensor in place. Its views keep their trails if no element moved.

        Args:
            tensor: The tensor, whose new trail has been put.
            before: The trail that it had before.
        """
        after = self.get(tensor) or Trail(None)
        old, new = None if before is None else before.positions, after.positions
        if old is not None and new is not None and equal(old, new):
            return
        for other in self._sharing_memory(tensor):
            self.put(other, Trail(None, after.origins, after.lost_by or _UNSEEN))

    def lose(self, tensor: Tensor, why: str) -> None:
        """Record that a tensor was changed, or may be changed unnoticed: its trail and those of its views are lost."""
        for other in [tensor, *self._sharing_memory(tensor)]:
            if (trail := self.get(other)) is not None:
                self.put(other, replace(trail, positions=None, lost_by=trail.lost_by or why))
            self.forget_constant(other)

    def source_of(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The model's tensors that a tensor was computed from, even if it was changed since."""
        made_of: tuple[Tensor, ...] = self._constants.get(tensor, ((), 0))[0]
        return made_of

    def lend(self, tensor: Tensor, to: str) -> None:
        """Record that Python code gets access to a tensor's memory, and may change it there unnoticed."""
        contents = self._contents.get(tensor)
        if contents is None or not contents.is_copied:  # else it is compared when it is used
            self.lose(tensor, to)

    def _is_current(self, tensor: Tensor, version: int) -> bool:
        now = version_of(tensor)
        if now == version:
            return True
        known = self._versions.get(_address(tensor)[0], ())
        return now > version and all(later in known for later in range(version + 1, now + 1))

    def _sharing_memory(self, tensor: Tensor) -> Iterator[Tensor]:
        for tensors in (self._trails, self._constants):
            for other in list(tensors.keys()):
                if other is not tensor and shares_memory(other, tensor):
                    yield other


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory of two tensors overlaps, or is of one allocation."""
    (start, end), (other_start, other_end) = _address(a), _address(b)
    return start < other_end and other_start < end


def _address(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends; (0, 0) if it has none.

    The storage of a tensor without values has none, but its own address serves as well.
    """
    storage = storage_of(tensor)
    if storage is None:
        return 0, 0
    if storage.device.type == "meta":
        return storage._cdata, storage._cdata + 1
    try:
        start = storage.data_ptr()  # zero if it is empty
    except (NotImplementedError, RuntimeError):
        return 0, 0
    return (start, start + storage.nbytes()) if start else (0, 0)
