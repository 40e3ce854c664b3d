"""From a run's own words to its row on the board: its record of reports, and what its processes post meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from pipelines.reporting.board import Row
from pipelines.reporting.pulse import forget, heard
from pipelines.reporting.words import Shown, line_text
from pipelines.run.folder import Folder
from pipelines.run.history import read_history
from qskd.datasets.order.schedule import Schedule
from qskd.errors import QskdError
from qskd.evaluation.shown import measured

log = logging.getLogger("qskd")
PATIENCE_S = 5.0


class Watch:
    """A thread that does `look` about once a second; a context manager. subject: what is posted of it is forgotten at the end."""

    def __init__(self, subject: str, every_s: float = 1.0) -> None:
        self.subject, self.every_s, self.stopped = subject, every_s, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def look(self) -> None:
        raise NotImplementedError

    def last_look(self) -> None:
        """What remains to be said at the end. Does not ask Ray, which may be gone."""

    def _run(self) -> None:
        while not self.stopped.wait(self.every_s):
            self._safely(self.look)

    def _safely(self, look: Callable[[], None]) -> None:
        try:
            look()
        except (QskdError, OSError) as error:  # only what is shown: the work may well go on
            log.warning("no progress can be shown for now: %s", error)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(PATIENCE_S)
        self._safely(self.last_look)
        if not self.thread.is_alive():  # else it waits for a Ray that does not answer
            forget(self.subject)


class CountWatch(Watch):
    """Moves a row by the images that processes say they have done. left: how many of the row's are yet to be done now."""

    def __init__(self, row: Row, subject: str, left: int) -> None:
        super().__init__(subject)
        self.row, self.before = row, row.shown.total - left
        forget(subject)  # of a program that was killed

    def look(self) -> None:
        done = sum(int(each.get("images", 0)) for each in heard(self.subject).values())
        if done:  # a process that was lost has its work done again
            self.row.at(min(self.before + done, self.row.shown.total))


class TrainingWatch(Watch):
    """Prints each new entry of a run's record as a line, and moves its bar in between.

    another: the driver is another process. What is in the folder counts from the moment it speaks: before that it may be a
    run's that is about to be deleted.
    """

    def __init__(self, row: Row, folder: Folder, schedule: Schedule, another: bool = False) -> None:
        super().__init__(folder.path)
        self.row, self.folder, self.schedule, self.another = row, folder, schedule, another
        if not another:
            forget(self.subject, "worker")  # what a killed run of before said
        self.printed: set[int] | None = None if another else self._steps_there()
        if self.printed:
            row.shown.done = max(self.printed)

    def _steps_there(self) -> set[int]:
        return {entry["step"] for entry in read_history(self.folder)}

    def look(self) -> None:
        said = heard(self.subject)
        if self.printed is None and said:
            self.printed = self._steps_there()
        self._print_reports(said.get("worker", {}))
        self._move(said.get("worker", {}), said.get("driver", {}))

    def last_look(self) -> None:
        self._print_reports({})

    def _print_reports(self, worker: dict[str, Any]) -> None:
        if self.printed is None:
            return
        for entry in read_history(self.folder):
            if entry["step"] not in self.printed:
                self.printed.add(entry["step"])
                self.row.shown.numbers |= numbers_of(entry)
                fields = {"run": self.row.shown.name, "step": entry["step"]}
                fields |= {**entry.get("training", {}), **measured(entry["evaluation"])}
                left_s = time_left(self.schedule, entry["step"], worker)
                self.row.line(progress_line(self.row.shown.name, entry, self.schedule.total_steps, left_s), **fields)

    def _move(self, worker: dict[str, Any], driver: dict[str, Any]) -> None:
        if self.another and driver.get("doing"):
            self.row.stage(driver["doing"])
        elif "step" in worker:
            step, doing = int(worker["step"]), worker.get("doing", "")
            ended = step // self.schedule.steps_per_epoch
            if ended and self.schedule.evaluates_after(ended - 1) and not self._has_printed(ended):
                self.row.hold_line()
            numbers: dict[str, float | str] = {
                name: worker[name] for name in ("loss", "images_per_s") if name in worker
            }
            self.row.at(step, doing, time_left(self.schedule, step, worker), numbers)
        elif worker.get("doing"):
            self.row.stage(worker["doing"])

    def _has_printed(self, epochs: int) -> bool:
        """The report at the end of so many epochs."""
        return min(epochs * self.schedule.steps_per_epoch, self.schedule.total_steps) in (self.printed or ())


def time_left(schedule: Schedule, step: int, worker: dict[str, Any]) -> float | None:
    """Seconds, from what the worker says of a step's and an evaluation's; None before it can know."""
    if not worker.get("step_s"):
        return None
    epochs = range(step // schedule.steps_per_epoch, schedule.epochs_begun)
    evaluations = sum(schedule.evaluates_after(epoch) for epoch in epochs)
    return float((schedule.total_steps - step) * worker["step_s"] + evaluations * worker.get("evaluation_s", 0.0))


def numbers_of(entry: dict[str, Any]) -> dict[str, float]:
    """What the row shows of an entry of the record."""
    found = {name: entry["evaluation"][name] for name in ("AP", "AP50") if name in entry["evaluation"]}
    training = entry.get("training", {})
    names = {"loss": "loss/total", "images_per_s": "speed/images_per_s"}
    return found | {name: training[of] for name, of in names.items() if of in training}


def progress_line(name: str, entry: dict[str, Any], total_steps: int, left_s: float | None = None) -> str:
    return line_text(Shown(name, total_steps, "step", entry["step"], dict(numbers_of(entry)), left_s=left_s))
