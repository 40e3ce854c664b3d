"""What the controller does with a report: MLflow, and the run's own record, from which the driver's terminal has its lines."""

from __future__ import annotations

from typing import Any

import ray.train

from pipelines.run.best import keep_best
from pipelines.run.folder import Folder
from pipelines.run.history import add_report, last_step, read_history
from pipelines.tracking.curves import forget_after, tell
from pipelines.tracking.tracker import Tracker
from pipelines.training.checkpoint_list import keep_list, last_report
from qskd.evaluation.shown import measured


class TrackingCallback(ray.train.UserCallback):
    """Runs in Ray Train's controller: the only writer of the MLflow run while training lasts."""

    def __init__(self, tracker: Tracker, folder: Folder) -> None:
        self.tracker, self.folder = tracker, folder
        self.logged: dict[str, int] = {}  # metric -> its last step in MLflow
        self.written = -1  # the last report's step; -1 before the first of this process

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called when all workers have reported; metrics[0] is rank 0's (see `Worker.report`)."""
        keep_list(self.folder)
        if checkpoint is not None:
            keep_best(self.folder, metrics[0], checkpoint.filesystem, checkpoint.path)
        self.write({**metrics[0], "rows": mean_rows([worker["rows"] for worker in metrics])})

    def catch_up(self, workers: int) -> None:
        """Write down a report that Ray took and the run did not: the controller died in between. Of the losses Ray keeps only
        rank 0's; those of one among several workers are left out."""
        last = last_report(self.folder)
        if last is not None:  # its student too: a run of before kept none
            keep_best(self.folder, last[0], self.folder.filesystem, f"{self.folder.root}/{last[1]}")
        if last is not None and last[0]["step"] > last_step(read_history(self.folder)):
            self.write({**last[0], "rows": last[0]["rows"] if workers == 1 else []}, replace=False)

    def write(self, report: dict[str, Any], replace: bool = True) -> None:
        """To the run's own record of rows, MLflow and the progress file. replace: what that record has of the same step."""
        rows = [(step, row) for step, row in report["rows"] if self._is_new("loss/total", step)]
        everything = list(report["rows"])
        evaluation = {f"val/{name}": value for name, value in measured(report.get("evaluation", {})).items()}
        if evaluation:
            evaluation |= self._best(report["step"], evaluation.get("val/AP", -1.0))
            if "evaluations_since_best" in report:
                evaluation["best/evaluations_since"] = float(report["evaluations_since_best"])
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
