"""The next batches, fetched by a thread while the step works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from pipelines.feed.stream import Share

READ_AHEAD = 2  # batches


def read_ahead(shares: Iterator[Share]) -> Iterator[Share]:
    """The same, read by a thread that stays a few batches ahead; decoding leaves Python's lock to the training."""
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
            for share in shares:
                if not put(share):
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
