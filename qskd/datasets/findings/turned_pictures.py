"""How the boxes of pictures that EXIF turns were read, over a whole dataset: where nothing tells, and where sizes contradict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Literal

from qskd.datasets.findings.finding import Finding, Tally
from qskd.datasets.pictures.facts import PictureFacts, Size, seen_by_header
from qskd.errors import QskdError


def drawn_on(pictures: Iterable[tuple[Size, Callable[[], bytes]]]) -> Literal["upright", "stored"] | None:
    """What the boxes of a dataset refer to where EXIF turns a picture, as far as all of its sizes that can tell agree. None: no
    size tells, or they contradict each other. pictures: of each the listed size (width, height), and what reads its file, which
    is not asked of square ones; what can't be read tells nothing."""
    told: set[Literal["upright", "stored"]] = set()
    for size, read in pictures:
        seen = None
        if size[0] != size[1]:
            with contextlib.suppress(QskdError, OSError):
                seen = seen_by_header(read())
        if seen and seen.upright != seen.stored and size in (seen.upright, seen.stored):
            told.add("upright" if size == seen.upright else "stored")
        if len(told) == 2:
            return None
    return told.pop() if told else None


class TurnedPictures:
    """Collects how the boxes of pictures were read; `findings` says what is doubtful in that."""

    def __init__(self) -> None:
        self._undecided, self._upright, self._stored = Tally(), Tally(), Tally()

    def add(self, name: str, facts: PictureFacts) -> None:
        """name: of the picture, for the examples."""
        if facts.turned:
            tally = self._undecided if facts.undecided else self._stored if facts.boxes_turned else self._upright
            tally.add(name)

    def findings(self) -> list[Finding]:
        undecided = self._undecided.finding(
            "exif-undecided",
            "of {count}, sizes can't tell what the boxes of turned pictures (EXIF) refer to",
            "They were read against the upright picture. Were they drawn on the stored pixels, they are in the wrong places.",
            "draw a few of them: `qskd explain` with --annotations; then pass --exif upright or --exif stored",
        )
        if not (self._upright.count and self._stored.count):
            return undecided
        mixed = Finding(
            "exif-mixed-readings",
            self._upright.count + self._stored.count,
            f"of the turned pictures (EXIF), {self._upright.count} are listed with the size of the upright picture, and "
            f"{self._stored.count} with that of the stored pixels",
            (*self._upright.examples[:2], *self._stored.examples[:2]),
            "The boxes of each were read against the picture of its size. Two tools that were joined? Then it is right.",
            "draw some of both: `qskd explain` with --annotations; were all drawn on one of them, pass --exif upright or stored",
        )
        return [*undecided, mixed]
