"""Caches of bounded size."""

from __future__ import annotations

import threading
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

_lock = threading.Lock()


class BoundedCache(dict[Key, Value]):
    """A dictionary that drops its oldest entry when it would exceed `limit` entries.

    A look-up costs the same as in any dictionary. Copies and pickles keep the limit.

    Args:
        limit: The largest number of entries.
    """

    limit = 64

    def __init__(self, limit: int = 64):
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Key, value: Value) -> None:
        with _lock:
            if key not in self and len(self) >= self.limit:
                del self[next(iter(self))]
            super().__setitem__(key, value)

    def __reduce__(self) -> tuple:
        return type(self), (self.limit,), None, None, iter(self.items())


class ScratchCache(BoundedCache[Key, Value]):
    """A [`BoundedCache`] whose copies and pickles are empty, for entries that mean nothing elsewhere."""

    def __reduce__(self) -> tuple:
        return type(self), (self.limit,)
