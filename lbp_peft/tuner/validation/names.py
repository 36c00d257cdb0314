"""Checks names of adapters and modules, and suggests corrections of mistyped ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from .patterns import show

_MAX_LENGTH = 200  # in characters; file systems allow 255 bytes
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])", re.IGNORECASE)
# PEFT names these for models of these tasks, whether the model has them or not.
_OF_TASKS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


def check_adapter_name(name: object, field: str) -> None:
    """Refuse names that are unsafe for a folder: PEFT saves an adapter in a folder of its name and splits keys at dots.

    Args:
        name: The name of an adapter.
        field: The field that holds the name, for the message.

    Raises:
        ValueError: `name` is not a string, is empty or too long, or leads to another folder on some operating system.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= _MAX_LENGTH
        or not name.isprintable()
        or name != name.strip()
        or set(name) & set('/\\:.<>|?*"')
        or _DEVICES.fullmatch(name)
        or not is_free_in_dictionaries(name)
    ):
        raise ValueError(
            f"{field} has an adapter called {show(name)}. Adapters are saved in folders of their names, so a name must "
            "not be empty, long, that of a device or that of a method of nn.ModuleDict, nor hold control characters or "
            r'any of / \ : . < > | ? * ".'
        )


def is_free_in_dictionaries(name: str) -> bool:
    """Whether PyTorch's dictionaries of modules and parameters, which hold the adapters, accept a name as a key."""
    is_attribute = hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict, name) or name == "training"
    return bool(name) and "." not in name and not is_attribute


def is_module_name(name: object) -> bool:
    """Whether `name` can be a module's name or the end of one. PEFT reads some of these as regular expressions."""
    return isinstance(name, str) and re.fullmatch(r"[\w.\-]+", name) is not None


def unknown_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names that are neither a module's name nor the part of one that follows a dot."""
    known = [f".{name}" for name, _ in model.named_modules(remove_duplicate=False)]
    return sorted(name for name in names if not any(module_name.endswith(f".{name}") for module_name in known))


def unmatched_modules_to_save(model: nn.Module, names: Iterable[str], task_type: str | None) -> list[str]:
    """The names with which no module's name ends, except those that PEFT itself adds for a task."""
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    added = _OF_TASKS.get(str(getattr(task_type, "value", task_type)), set())
    return [
        name for name in names if name not in added and not any(module_name.endswith(name) for module_name in known)
    ]


def did_you_mean(model: nn.Module, name: str) -> str:
    """A sentence, to be appended to a message, that suggests similar module names; "" for a model without modules."""
    ends: dict[str, None] = {}
    for known, _ in model.named_modules():
        parts = known.split(".")
        ends |= {".".join(parts[start:]): None for start in range(len(parts))}
    close = difflib.get_close_matches(name, [end for end in ends if end], n=3)
    if not close:
        close = [child for child, _ in model.named_children()][:8]
        return f" The model consists of {', '.join(close)}." if close else ""
    return f" Did you mean {' or '.join(repr(similar) for similar in close)}?"
