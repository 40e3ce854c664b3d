"""The next batches, made by a thread while the step works: fetched, unpacked, and on their way to the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

READ_AHEAD = 2  # batches
T = TypeVar("T")


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, made by a thread that stays a few ahead; decoding and copying leave Python's lock to the training."""
    ready: queue.Queue[Any] = queue.Queue(READ_AHEAD)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(end)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
