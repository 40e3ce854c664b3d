"""Whether a worker waits for its data, and how many readers would be enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

WAIT_SHARE = 0.2  # of the time, beyond which it is said
WARM_UP_STEPS = 40  # the first batches wait for the readers to start


def enough_readers(readers: int, wait_share: float) -> int:
    """Readers that would give batches as fast as they are used, where so many let the worker wait for this share of its time."""
    return math.ceil(readers / max(1 - wait_share, 0.01))


def hungry(wait_share: float, readers: int, who: str) -> str:
    """What to say of it."""
    return (
        f"{who} waited for data {wait_share:.0%} of its time with {readers} reader(s): compute.loader_workers="
        f"{enough_readers(readers, wait_share)} would be enough, where there are CPUs for them"
    )


class Hunger:
    """Looks at a worker's rows of measurements, and says it once."""

    def __init__(self, readers: int, who: str) -> None:
        self.readers, self.who, self.said, self.first = readers, who, False, -1

    def look(self, rows: Sequence[tuple[int, dict[str, float]]]) -> str:
        """rows: (step, measurements) since the last report. A sentence, or nothing."""
        if self.first < 0 and rows:
            self.first = rows[0][0]
        shares = [row["speed/loader_wait_share"] for step, row in rows if step >= self.first + WARM_UP_STEPS]
        share = sum(shares) / len(shares) if shares else 0.0
        if self.said or share <= WAIT_SHARE:
            return ""
        self.said = True
        return hungry(share, self.readers, self.who)
