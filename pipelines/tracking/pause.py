"""How long an MLflow that keeps silent is asked no more: a training would wait for it at each of its reports."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

FIRST_S, LONGEST_S = 60.0, 600.0
SLOW_S = 0.5  # what fails sooner costs nothing: a value that is refused, a lock of a moment


class Pause:
    """Of one server or database, in this process. It begins with a failure that was waited for, and doubles with each after it."""

    def __init__(self) -> None:
        self.length_s, self.since = 0.0, 0.0

    def left_s(self, most_s: float = LONGEST_S) -> float:
        """Seconds until it may be asked again, for a request that waits at most so long after a failure."""
        return max(0.0, self.since + min(self.length_s, most_s) - time.monotonic())

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Around a request."""
        began = time.monotonic()
        try:
            yield
        except Exception:
            self.since = time.monotonic()
            if self.since - began > SLOW_S:
                self.length_s = min(2 * self.length_s, LONGEST_S) or FIRST_S
            raise
        self.length_s = 0.0


_pauses: dict[str, Pause] = {}


def pause_of(uri: str) -> Pause:
    """All runs there share it: a sweep's trials would each wait otherwise."""
    return _pauses.setdefault(uri, Pause())
