"""How far a program is: one bar in a terminal, lines that grep finds elsewhere, JSON where logs are JSON.

    with progress("cache", 6000) as row:
        row.stage("starting Ray")
        row.at(640)

A process has one board. What asks for progress while another does gets a row of its own below it, so that no two bars fight
for the terminal's last line. What is printed meanwhile, on either stream, goes above the bars.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipelines.reporting.pulse import Pulse
from pipelines.reporting.words import Shown, line_text
from pipelines.run.logs import as_json, say

if TYPE_CHECKING:
    from rich.live import Live

Way = Literal["bar", "lines", "hidden"]
SPEED_OVER_S = 30.0  # images/s are those of this long
FIRST_LINE_S, LONGEST_LINE_S = 10.0, 60.0  # between two lines: a tenth of the time so far, but within these


class Row:
    """What one piece of work says: a stage it is in, or how far it is."""

    def __init__(self, shown: Shown, way: Way, pulse: Pulse) -> None:
        self.shown, self.way, self.pulse = shown, way, pulse
        self.begun = self.said_at = time.monotonic()
        self.seen: deque[tuple[float, int]] = deque()

    def stage(self, doing: str) -> None:
        """What goes on before the first step, after the last, or between two; a line of its own where there is no bar."""
        if doing == self.shown.doing:
            return
        self.shown.doing, self.shown.since = doing, time.monotonic()
        self.pulse.tell(doing=doing)
        if self.way == "lines" and doing:
            self.line(f"{self.shown.name}  {doing}", run=self.shown.name, doing=doing)

    def at(
        self, done: int, doing: str = "", left_s: float | None = None, numbers: Mapping[str, float | str] | None = None
    ) -> None:
        """How far the work is; `numbers` (of `words.NUMBERS`) replace those of the same name. left_s, and images/s where images
        are counted: from the speed of late, unless given. doing: of a pause in the steps."""
        now, shown = time.monotonic(), self.shown
        if doing.split(" ")[0] != shown.doing.split(" ")[0]:
            shown.since = now
            self.pulse.tell(doing="")
        if done < shown.done:  # begun again from a checkpoint
            self.seen.clear()
        shown.done, shown.doing = done, doing
        new = dict(numbers or {})
        speed = self._speed(now, done)
        if speed and shown.unit == "images":
            new["images_per_s"] = speed
        shown.numbers |= new
        if left_s is None and speed and shown.total:
            left_s = (shown.total - done) / speed
        shown.left_s = left_s
        since_last = min(max((now - self.begun) / 10, FIRST_LINE_S), LONGEST_LINE_S)
        if self.way == "lines" and done and now - self.said_at >= since_last:
            fields = {shown.unit: done, "of": shown.total, **new}
            self.line(line_text(shown), run=shown.name, **fields)

    def _speed(self, now: float, done: int) -> float:
        """Of the last half minute; 0 while that can't be known."""
        if done and (not self.seen or done != self.seen[-1][1]):
            self.seen.append((now, done))
        while len(self.seen) > 2 and now - self.seen[0][0] > SPEED_OVER_S:
            self.seen.popleft()
        if len(self.seen) < 2:
            return 0.0
        (first_at, first), (last_at, last) = self.seen[0], self.seen[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0

    def hold_line(self) -> None:
        """No line for a while: one that says more is about to come."""
        self.said_at = time.monotonic()

    def line(self, text: str, **fields: Any) -> None:
        """A line that stays: above the bar, where there is one."""
        self.said_at = time.monotonic()
        if self.way != "hidden":
            say(text, **fields)


class Board:
    """The rows of this process, the newest last, and the bars of those that have one."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.live: Live | None = None
        self.lock = threading.RLock()

    def add(self, row: Row) -> None:
        with self.lock:
            self.rows.append(row)
            if row.way == "bar" and self.live is None:
                from pipelines.reporting.bars import open_bars

                self.live = open_bars(lambda: [each.shown for each in list(self.rows) if each.way == "bar"])

    def remove(self, row: Row) -> None:
        with self.lock:
            self.rows.remove(row)
            if self.live is not None and not any(each.way == "bar" for each in self.rows):
                self.live.stop()
                self.live = None


_board = Board()
_shown_elsewhere = False


def show_elsewhere() -> None:
    """This process's rows are shown by the one that started it: stages are posted for that one, and nothing is printed."""
    global _shown_elsewhere
    _shown_elsewhere = True


def way_here() -> Way:
    """Bars where standard output is a terminal that can move its cursor; lines elsewhere, and where logs are JSON."""
    can = not as_json() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return "bar" if can else "lines"


@contextlib.contextmanager
def progress(name: str, total: int = 0, unit: str = "images", quiet: bool = False, subject: str = "") -> Iterator[Row]:
    """A row of the board, for as long as the work lasts. total: images or steps; 0: not known. subject: of `Pulse`, for a row
    that is shown elsewhere."""
    pulse = Pulse(subject if _shown_elsewhere else "", "driver")
    hidden = _shown_elsewhere or (quiet and not as_json())
    row = Row(Shown(name, total, unit), "hidden" if hidden else way_here(), pulse)
    _board.add(row)
    try:
        yield row
    finally:
        _board.remove(row)


def current() -> Row:
    """The newest row: of the work that asks."""
    return _board.rows[-1]


def stage(doing: str) -> None:
    """The stage of whatever is shown now: for work that does not know who waits for it. Nothing where nobody does."""
    if _board.rows:
        _board.rows[-1].stage(doing)
