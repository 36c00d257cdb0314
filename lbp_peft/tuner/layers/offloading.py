"""Offloads the base weight of a layer while the layer computes with a trained copy of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...layout import LayoutFinder
from .storage import FileStamp, copy_to_file, copy_to_host_memory, release_pages

RESIDENT, DROPPED = "resident", "dropped"
BASE_WEIGHTS = ("auto", RESIDENT, "cpu", "disk", DROPPED)
_LEAST_BYTES = 2**16  # smaller weights are not worth a file


class OffloadedBaseWeight(nn.Module):
    """The part of an adapted layer that offloads its base weight, and reloads it where it is needed.

    It is offloaded at the end of the first backward pass that trains a copy of it, which is before an optimiser has any
    state. Until then, libraries that wrap the model for training find ordinary parameters. It always remains the
    parameter of the base layer, so that state dicts, copies and pickles are complete. The weight of a layer on a CPU is
    then mapped from a file and need not be reloaded; that of a layer on a GPU is kept on the CPU.

    Attributes:
        lbpwht_base_weights: Where the base weight is to be offloaded while an adapter is active, by name of the
            adapter.
        is_dropped: Whether the layer has no base weight any more.
    """

    lbpwht_base_weights: dict[str, str]
    is_dropped = False

    if TYPE_CHECKING:  # attributes of the layer
        layer_name: str
        finder: LayoutFinder
        lbpwht_weight: nn.ParameterDict
        merged: bool
        _unmerged: tuple[Tensor | None, Tensor | None] | None
        get_base_layer: Callable[[], Any]
        weights_in_effect: Callable[[], list[str]]

    def _init_offloading(self) -> None:
        self.lbpwht_base_weights = {}
        self._is_on_host = False
        self._offloaded_address = 0  # of the values, which may be replaced
        self._file: FileStamp | None = None
        self._lost_with: str | None = None  # a file that was overwritten before the weight was read from it

    # Offloading

    @property
    def base_weight_is_offloaded(self) -> bool:
        """Whether the base weight was offloaded, so that it takes no memory of the layer's device, or was dropped."""
        weight = self.get_base_layer()._parameters.get("weight")
        is_in_file = weight is not None and 0 != weight.data_ptr() == self._offloaded_address
        return self.is_dropped or self._is_on_host or is_in_file

    @property
    def _may_be_gone(self) -> bool:
        """Whether the base weight has to be checked before it is used."""
        return self.is_dropped or self._file is not None or self._lost_with is not None

    def offload_base_weight(self) -> None:
        """Offload the base weight as the active adapter wants it, if only that adapter's weight is in use."""
        names = self.weights_in_effect()
        weight = self.get_base_layer()._parameters.get("weight")
        if len(names) != 1 or weight is None or weight.data_ptr() == self._offloaded_address:
            return
        where, trained = self.lbpwht_base_weights[names[0]], self.lbpwht_weight[names[0]]
        if not self._can_offload(weight, where) or trained.device != weight.device:
            return
        self._file = None
        if where == DROPPED:
            self.drop_base_weight()
        elif _is_on_cpu(weight):
            if not self._offload_to_disk(weight):
                return
        else:
            on_disk = where == "disk" and self._offload_to_disk(weight)
            if not on_disk:
                weight.data = copy_to_host_memory(weight)
            self._is_on_host = True
        self._offloaded_address = weight.data_ptr()

    def _can_offload(self, weight: Tensor, where: str) -> bool:
        """Whether the weight may be offloaded: FSDP, ZeRO-3 and accelerate manage the values of weights themselves."""
        base = self.get_base_layer()
        if where == RESIDENT or type(weight) is not nn.Parameter or weight.is_meta or weight.requires_grad:
            return False
        if hasattr(weight, "ds_status") or "_hf_hook" in vars(base) or not weight.is_contiguous():
            return False
        if not _is_on_cpu(weight):
            return True
        return where == "disk" or where == DROPPED or (where == "auto" and weight.nbytes >= _LEAST_BYTES)

    def _offload_to_disk(self, weight: Tensor) -> bool:
        if _is_on_cpu(weight) and (file := release_pages(weight)) is not None:
            self._file = file
            return True
        try:
            weight.data = copy_to_file(weight)
        except OSError as error:
            instead = "in memory" if _is_on_cpu(weight) else "in the CPU's memory"
            self.finder.warn_once(
                "base weights on disk",
                f"The base weight of {self.layer_name}, and of layers like it, stays {instead} while adapters are "
                f"trained: it cannot be put on the disk ({error.strerror or error}). Set the environment variable "
                'TMPDIR to a folder on a disk with enough space, or base_weights="resident" to silence this.',
            )
            return False
        return True

    def drop_base_weight(self) -> None:
        """Leave the layer without its base weight for good, unless its copy has no values yet."""
        weight = self.get_base_layer().weight
        if any(copy.is_meta for copy in self.lbpwht_weight.values()):
            return
        self._dropped_dtype = weight.dtype
        self.get_base_layer()._parameters["weight"] = None
        self.is_dropped = True

    # Reloading

    def reload_base_weight(self) -> None:
        """Move the base weight back to the layer's device."""
        if self._is_on_host and self._unmerged is None:
            weight = self.get_base_layer().weight
            weight.data = weight.data.to(self._device_of_copies())
            self._is_on_host = False

    def check_base_weight(self, operation: str) -> None:
        """Check that the base weight is available.

        Args:
            operation: The operation that needs it, as the beginning of a sentence.

        Raises:
            ValueError: it was dropped.
            RuntimeError: the file to which it was offloaded has been overwritten.
        """
        if self.is_dropped:
            raise ValueError(
                f"{operation} needs the base weight of {self.layer_name}, which is gone: with "
                'base_weights="dropped" it is itself trained. Save the adapter (save_pretrained) and load it into the '
                "base model again, or train with another base_weights."
            )
        overwritten = self._overwritten_file()
        if overwritten is not None:
            raise RuntimeError(
                f"{operation} needs the base weight of {self.layer_name}, which is offloaded to {overwritten}. That "
                "file was overwritten since the model was loaded from it. The adapter's weights are intact: save them "
                "(save_pretrained) and load them into the base model again. Save to another folder than the base "
                'model\'s, or set base_weights="resident".'
            )

    def _overwritten_file(self) -> str | None:
        """The overwritten file with which the base weight was lost; None if it was not lost."""
        if self._file is not None and self._file.was_overwritten():
            return self._file.path
        return self._lost_with

    def _base_weight_on_device(self, weight: Tensor) -> Tensor:
        """A base weight, on the layer's device."""
        self.check_base_weight("Comparing, combining or disabling adapters")
        return weight.to(self._device_of_copies()) if self._is_on_host else weight

    def _device_of_copies(self) -> torch.device:
        return next((copy.device for copy in self.lbpwht_weight.values()), torch.device("cpu"))

    def _reload_if_needed(self) -> None:
        """Reload the base weight if it is needed, after adapters were switched, disabled or deleted."""
        if self._is_on_host and len(self.weights_in_effect()) != 1:
            self.reload_base_weight()
        self._watch_training()

    def _watch_training(self) -> None:
        """Have the base weight offloaded at the end of the next backward pass that trains a copy of it."""
        weight = self.get_base_layer()._parameters.get("weight")
        for name in self.weights_in_effect():
            trained = self.lbpwht_weight[name]
            if weight is None or not trained.requires_grad or type(trained) is not nn.Parameter or trained.is_meta:
                continue
            hooks = getattr(trained, "_post_accumulate_grad_hooks", None) or {}
            if self._can_offload(weight, self.lbpwht_base_weights[name]) and not any(
                isinstance(hook, _OffloadHook) and hook.layer() is self for hook in hooks.values()
            ):
                hook = _OffloadHook(weakref.ref(self))
                hook.handle = trained.register_post_accumulate_grad_hook(hook)

    # Changes of the layer by nn.Module or PEFT

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Any:
        self.reload_base_weight()
        overwritten = self._overwritten_file()
        result = super()._apply(fn, recurse)
        weight = self.get_base_layer()._parameters.get("weight")
        if self._file is not None and self._unmerged is None and weight.data_ptr() != self._offloaded_address:
            self._file, self._lost_with = None, overwritten  # the values come from the file
        if self.is_dropped:
            self._dropped_dtype = fn(torch.empty(0, dtype=self._dropped_dtype)).dtype
        self._watch_training()
        return result

    def train(self, mode: bool = True) -> Any:
        result = super().train(mode)
        self._watch_training()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lost_with": self._overwritten_file()}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({"_lost_with": None, **state})
        self._offloaded_address, self._file = 0, None  # the values of a copy are in memory
        self._watch_training()


class _OffloadHook:
    """A hook on a trained parameter that offloads the base weight once the whole backward pass is over.

    It does not do so earlier, since the pass may go through parts of the graph in which the base weight was used.
    """

    handle: RemovableHandle

    def __init__(self, layer: Callable[[], OffloadedBaseWeight | None]):
        self.layer = layer

    def __call__(self, _: Tensor) -> None:
        self.handle.remove()
        layer = self.layer()
        if layer is not None:
            torch.autograd.Variable._execution_engine.queue_callback(layer.offload_base_weight)


def _is_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu"
