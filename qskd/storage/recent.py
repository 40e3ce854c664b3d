"""A store in memory, bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

Key = tuple[Any, ...]


class Recent:
    """A least-recently-used store, bounded by the bytes of what it holds."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self.held_bytes = limit_bytes, 0
        self._entries: OrderedDict[Key, tuple[Any, int]] = OrderedDict()

    def get(self, key: Key) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def take(self, key: Key) -> Any:
        """`get`, and let it go."""
        value, size_bytes = self._entries.pop(key, (None, 0))
        self.held_bytes -= size_bytes
        return value

    def put(self, key: Key, value: Any, size_bytes: int) -> None:
        if size_bytes > self._limit:
            return
        self.held_bytes += size_bytes - self._entries.pop(key, (None, 0))[1]
        self._entries[key] = value, size_bytes
        while self.held_bytes > self._limit:
            self.held_bytes -= self._entries.popitem(last=False)[1][1]
