"""What the controller does with a report: MLflow, a progress file, and from that file lines on the driver's terminal."""

from __future__ import annotations

import logging
import threading
from typing import Any

import ray.train

from pipelines.run.folder import Folder
from pipelines.run.history import add_report, last_step, read_history
from pipelines.run.logs import say
from pipelines.tracking.curves import forget_after, tell
from pipelines.tracking.tracker import Tracker
from pipelines.training.checkpoint_list import keep_list, last_report
from qskd.errors import QskdError

log = logging.getLogger("qskd")


class TrackingCallback(ray.train.UserCallback):
    """Runs in Ray Train's controller: the only writer of the MLflow run while training lasts."""

    def __init__(self, tracker: Tracker, folder: Folder) -> None:
        self.tracker, self.folder = tracker, folder
        self.logged: dict[str, int] = {}  # metric -> its last step in MLflow
        self.written = -1  # the last report's step; -1 before the first of this process

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called when all workers have reported; metrics[0] is rank 0's (see `Worker.report`)."""
        keep_list(self.folder)
        self.write({**metrics[0], "rows": mean_rows([worker["rows"] for worker in metrics])})

    def catch_up(self, workers: int) -> None:
        """Write down a report that Ray took and the run did not: the controller died in between. Of the losses Ray keeps only
        rank 0's; those of one among several workers are left out."""
        last = last_report(self.folder)
        if last is not None and last[0]["step"] > last_step(read_history(self.folder)):
            self.write({**last[0], "rows": last[0]["rows"] if workers == 1 else []}, replace=False)

    def write(self, report: dict[str, Any], replace: bool = True) -> None:
        """To the run's own record of rows, MLflow and the progress file. replace: what that record has of the same step."""
        rows = [(step, row) for step, row in report["rows"] if self._is_new("loss/total", step)]
        everything = list(report["rows"])
        evaluation = {f"val/{name}": value for name, value in report.get("evaluation", {}).items() if value >= 0}
        if evaluation:
            evaluation |= self._best(report["step"], evaluation.get("val/AP", -1.0))
            everything.append((report["step"], {**evaluation, "epoch": report["epoch"] + 1}))
            if self._is_new("val/AP", report["step"]):
                rows.append(everything[-1])
        if self.written < 0 or report["step"] <= self.written:
            forget_after(self.folder, report["step"])
        self.written = report["step"]
        tell(self.tracker, self.folder, f"{report['step']:09d}", everything, rows, replace)
        found = report.get("evaluation", {})
        add_report(self.folder, report["step"], report["epoch"] + 1, found, report["rows"])

    def _best(self, step: int, ap: float) -> dict[str, float]:
        """The best evaluation so far, and its step: MLflow lists a metric's last value, which of val/AP is the last one's."""
        aps = [(entry["evaluation"].get("AP", -1.0), -entry["step"]) for entry in read_history(self.folder)]
        best, at = max([(ap, -step), *(each for each in aps if -each[1] < step)])
        return {"best/AP": best, "best/step": float(-at)} if best >= 0 else {}

    def _is_new(self, metric: str, step: int) -> bool:
        """After a restart some steps are reported a second time."""
        if metric not in self.logged:
            self.logged[metric] = self.tracker.last_step(metric)
        is_new = step > self.logged[metric]
        self.logged[metric] = max(step, self.logged[metric])
        return is_new


def mean_rows(of_workers: list[list[tuple[int, dict[str, float]]]]) -> list[tuple[int, dict[str, float]]]:
    """Workers' rows averaged: each worker's value of a term is its own total over the mean count, so that the average is
    the term of the global batch. Of memory the largest counts: it is the one that ends a run."""

    def joined(name: str, values: list[float]) -> float:
        return max(values) if name.startswith("memory/") else sum(values) / len(values)

    return [
        (same_step[0][0], {name: joined(name, [row[name] for _, row in same_step]) for name in same_step[0][1]})
        for same_step in zip(*of_workers, strict=True)
    ]


def progress_line(name: str, entry: dict[str, Any], total_steps: int) -> str:
    parts = [f"{name}  step {entry['step']:>{len(str(total_steps))}}/{total_steps}"]
    training = entry.get("training", {})
    if training:
        parts.append(f"loss {training['loss/total']:7.3f}  {training['speed/images_per_s']:6.1f} images/s")
    evaluation = entry["evaluation"]
    if evaluation:
        parts.append(f"AP {evaluation['AP']:.3f}  AP50 {evaluation['AP50']:.3f}")
    return "  ".join(parts)


class ProgressPrinter:
    """A thread on the driver that prints each new entry of the progress file; a context manager."""

    def __init__(self, folder: Folder, name: str, total_steps: int, every_s: float = 1.0) -> None:
        self.folder, self.name, self.total_steps, self.every_s = folder, name, total_steps, every_s
        self.printed = {entry["step"] for entry in read_history(folder)}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _print_new(self) -> None:
        for entry in read_history(self.folder):
            if entry["step"] not in self.printed:
                self.printed.add(entry["step"])
                numbers = {"run": self.name, "step": entry["step"], **entry.get("training", {}), **entry["evaluation"]}
                say(progress_line(self.name, entry, self.total_steps), **numbers)

    def _watch(self) -> None:
        while not self.stopped.wait(self.every_s):
            try:
                self._print_new()
            except (QskdError, OSError) as error:  # only lines on a terminal: the training may well go on
                log.warning("no progress can be shown for now: %s", error)

    def __enter__(self) -> ProgressPrinter:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._print_new()
