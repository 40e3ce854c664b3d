"""A sweep's row on the board: steps of all trials, as its records and the trials at work have them."""

from __future__ import annotations

import time

from pipelines.reporting.board import Row
from pipelines.reporting.pulse import heard
from pipelines.reporting.watch import Watch
from pipelines.tuning.records import ENDED, Records
from pipelines.tuning.report.results import best_row


class SweepWatch(Watch):
    """steps: of a whole trial, and of an epoch. The row's total is all trials' at full length: one that is stopped early, or
    fails, leaves nothing to do."""

    def __init__(self, row: Row, records: Records, steps: tuple[int, int], trials: int) -> None:
        super().__init__(records.folder.path)
        self.row, self.records, (self.steps, self.steps_per_epoch), self.trials = row, records, steps, trials
        row.shown.total = trials * self.steps
        self.first: tuple[float, int] | None = None

    def look(self) -> None:
        at_work = heard(self.subject, below=True)
        rows = list(self.records.rows.values())  # the sweep's own thread adds to them
        done, speed, doing = 0, 0.0, ""
        for row in rows:
            said = at_work.get(f"trials/{row.number:04d}#worker", {})
            if row.state in ENDED:
                done += self.steps
                continue
            done += min(self.steps, max(round(row.epochs * self.steps_per_epoch), int(said.get("step", 0))))
            if row.state == "running":
                speed += said.get("images_per_s", 0.0)
                doing = doing or said.get("doing", "starting the trials")
        numbers: dict[str, float | str] = {"trials": f"{sum(row.state in ENDED for row in rows)}/{self.trials}"}
        if speed:
            numbers["images_per_s"] = speed
        best = best_row(rows)
        if best is not None:
            numbers["best"] = f"{best.best_ap:.3f} (trial {best.number})"
        self.row.at(done, "" if speed else doing, self._time_left(done), numbers)

    def _time_left(self, done: int) -> float | None:
        """At the speed since the first look: a trial's early end is a leap, and of late there may have been none."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        spent_s, gained = now - self.first[0], done - self.first[1]
        return (self.row.shown.total - done) * spent_s / gained if gained > 0 else None
