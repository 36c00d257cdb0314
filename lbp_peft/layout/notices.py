"""Warnings about one model, one for each cause. Some are only given when their cause has occurred several times."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch

from .descriptions import changed
from .inputs import TENSORS
from .records import NOT_TRACED

# The number of times that a cause has to occur before there is a warning.
_MANY_VALUES = 8
_MANY_PASSES = 3


class Notices:
    """Gives each warning about a model once, and counts causes that need to occur several times."""

    def __init__(self) -> None:
        self._causes: set[str] = set()
        self._reset_counts()

    def _reset_counts(self) -> None:
        # The arguments and attributes of the last traced pass, and how often a single one of them was new.
        self._last_inputs: dict[str, Hashable] = {}
        self._num_values: Counter[str] = Counter()
        self._num_not_traced: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the causes that were warned of in copies and pickles, and reset the counts."""
        return {"_causes": self._causes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset_counts()

    def warn_once(self, cause: str, message: str) -> None:
        """Warn, unless there was a warning for the same cause about this model."""
        if not torch.compiler.is_dynamo_compiling() and cause not in self._causes:
            self._causes.add(cause)
            warnings.warn(message, stacklevel=3)

    def note_decisions(self, decided_by: str) -> None:
        """Warn that each pass is traced because of what the model's code does, such as "draws random numbers"."""
        self.warn_once(
            "decisions",
            f"Each forward pass is traced, which takes time: the model's Python code {decided_by}, and may "
            "choose by it where tokens go. Have tensor operations choose instead, or set such numbers once, as "
            "attributes of a module.",
        )

    def note_inputs(self, inputs: dict[str, Hashable]) -> None:
        """Count a pass that is traced because these arguments and attributes occur for the first time."""
        differing, self._last_inputs = changed(self._last_inputs, inputs), inputs
        if len(differing) != 1 or TENSORS in differing:
            return
        (name,) = differing
        self._num_values[name] += 1
        if self._num_values[name] >= _MANY_VALUES:
            self.warn_once(
                f"values of {name}",
                f"Forward passes are traced again and again, which takes time, because {name} has a new value "
                "each time, and the model's Python code may choose by it where tokens go. Pass numbers as tensors, and "
                "leave out arguments and attributes that the model does not need.",
            )

    def note_left_out(self, names: list[str]) -> None:
        """Warn of layers that the default targets leave out, though they are in the encoder as a pass shows."""
        self.warn_once(
            "left out",
            f"{_listed(names)} not adapted, though patches of the image pass through, between adapted layers or in "
            "parts of the model that are like blocks of the encoder. By default, the layers in the blocks of the "
            "encoder are adapted, as far as they can be found without data. Set target_modules to the layers that you "
            "want: targets_from finds them.",
        )

    def note_without_patches(self, names: list[str]) -> None:
        """Warn of layers that the default targets contain, though no patches of an image pass through."""
        self.warn_once(
            "without patches",
            f"{_listed(names)} adapted, though no patches of the image pass through, but words of a text or one token "
            "of each image. By default, the layers in the blocks of the encoder are adapted, as far as they can be "
            "found without data. Set target_modules to the layers that you want: targets_from finds those that patches "
            "pass through.",
        )

    def note_read_without_a_call(self, layer_names: list[str]) -> None:
        """Warn of adapted layers whose weights the model reads instead of calling the layers."""
        self.warn_once(
            "read without a call",
            f"{layer_names[0]} uses exact backpropagation, as do any layers like it: the model reads its weight "
            "without calling it. Leave it out with exclude_modules to silence this.",
        )

    def note_not_traced(self, layer_name: str) -> None:
        """Count a call of a layer that was not in the trace of its pass."""
        self._num_not_traced[layer_name] += 1
        if self._num_not_traced[layer_name] >= _MANY_PASSES:
            self.warn_once(
                "not traced",
                f"{layer_name} uses exact backpropagation in some of the forward passes, as may other layers: "
                f"{NOT_TRACED.why_unknown}, and that has happened {_MANY_PASSES} times. {NOT_TRACED.remedy}",
            )


def _listed(names: list[str]) -> str:
    """Some names and the number of the others, as the subject of a sentence with its verb."""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{listed} {'are' if len(names) > 1 else 'is'}"
