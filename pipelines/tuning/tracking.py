"""A sweep in MLflow: one run, and a child for each trial. Only the driver writes, so that a sqlite store will do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipelines.run.history import Rows, read_history, rows_until
from pipelines.tracking.curves import PATIENCE_S, fill_in, tell
from pipelines.tracking.tracker import Tracker
from pipelines.tuning.records import ENDED, Records
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.errors import QskdError
from qskd.evaluation.shown import measured

log = logging.getLogger("qskd")
NUMBER, STATE, REASON = "qskd.trial", "qskd.state", "qskd.reason"
ALIAS = "best"
TAG_LENGTH = 5000  # MLflow's limit, for servers of any age


class SweepTracking:
    """The parent run and its children by trial number."""

    def __init__(self, parent: Tracker, steps_per_epoch: int, records: Records) -> None:
        self.parent, self.steps_per_epoch, self.records = parent, steps_per_epoch, records
        past = records.in_order()
        self.trials: dict[int, Tracker] = {}
        self.there = parent.children(NUMBER) if past else {}
        for row in past:  # ended, but the driver was killed before it could say so, or MLflow did not answer
            run_id, status = self.there.get(str(row.number), ("", ""))
            if run_id and row.state in ENDED and (status not in ("FINISHED", "FAILED") or not row.logged):
                self.trials[row.number] = Tracker(parent.uri, run_id)
                self._catch_up(row)
                self.end(row)

    def begin(self, row: TrialRow, config: Config) -> str:
        """Open the trial's run, or go on with the one it has; its id, "" when the server does not answer."""
        # Looked for as well: a driver may have been killed between opening a run and writing down its id.
        run_id = row.run_id or self.there.get(str(row.number), ("", ""))[0]
        named = config.model_copy(
            update={"tracking": config.tracking.model_copy(update={"run_name": f"trial {row.number}"})}
        )
        try:
            tracker = Tracker.open(named, "trial", run_id, self.parent.run_id, {NUMBER: str(row.number)})
        except QskdError as error:
            log.warning("trial %d has no MLflow run: %s", row.number, error)
            return run_id
        self.trials[row.number] = tracker
        if run_id:
            self._catch_up(row)
        else:
            tracker.params({f"search/{name}": value for name, value in row.parameters.items()})
        tracker.tag(STATE, "running")
        return tracker.run_id

    def _catch_up(self, row: TrialRow) -> None:
        """An evaluation is in the row before it is in MLflow: log what a killed driver had no time to."""
        tracker = self.trials[row.number]
        logged, lost = tracker.last_step("val/AP"), tracker.last_step("loss/total")
        history = read_history(self.records.trial_folder(row.number))
        evaluated = [entry for entry in history if entry["evaluation"]]
        known = len(evaluated) >= len(row.curve)  # else somebody deleted a damaged history
        best = -1.0
        for number, (epochs, ap) in enumerate(row.curve):
            # An epoch of the trial's may have other steps than the recipe's: a space may search training.batch_size.
            step = evaluated[number]["step"] if known else round(epochs * self.steps_per_epoch)
            best = max(best, ap)
            if step > logged:
                rows = [(at, values) for at, values in rows_until(history, step) if at > lost]
                found = evaluated[number]["evaluation"] if known else {"AP": ap}
                self._log(row.number, step, epochs, found, best, rows, replace=False)

    def report(self, number: int, report: Mapping[str, Any]) -> None:
        if number in self.trials:
            rows = [(int(step), values) for step, values in report["rows"]]
            best = self.records.rows[number].best_ap  # the row has heard this evaluation
            self._log(number, report["step"], report["epochs"], report["metrics"], best, rows)

    def _log(
        self,
        number: int,
        step: int,
        epochs: float,
        metrics: Mapping[str, float],
        best: float,
        rows: Rows,
        replace: bool = True,
    ) -> None:
        found = {f"val/{name}": value for name, value in measured(metrics).items()}
        if best >= 0:  # MLflow sorts runs by a metric's last value, and a sweep chooses by the best evaluation
            found["best/AP"] = best
        self._tell(number, f"{step:09d}", [*rows, (step, {**found, "epoch": epochs})], replace)

    def _tell(self, number: int, name: str, rows: Rows, replace: bool = True) -> None:
        tell(self.trials[number], self.records.trial_folder(number), name, rows, replace=replace)

    def leader(self, heard: int, best: TrialRow) -> None:
        """The best trial after so many evaluations of all trials together."""
        values = {"best/AP": best.best_ap, "best/trial": float(best.number)}
        tell(self.parent, self.records.folder, f"{heard:09d}", [(heard, values)])

    def costs(self, number: int, measured: Mapping[str, float]) -> None:
        if number in self.trials:
            self._tell(number, "costs", [(0, {f"cost/{name}": value for name, value in measured.items()})])

    def parameters(self, row: TrialRow, step: int) -> None:
        """Of a member of a population, from a step on: as metrics, since a run's parameters can't change."""
        numbers = {
            f"search/{name}": float(value)
            for name, value in row.parameters.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if row.number in self.trials:
            self._tell(row.number, f"search-{step:09d}", [(step, numbers)])

    def end(self, row: TrialRow) -> None:
        """How the trial ended, which an MLflow status alone can't say."""
        tracker = self.trials.pop(row.number, None)
        if tracker is None:
            return
        tracker.tag(STATE, row.state)
        if row.reason:
            tracker.tag(REASON, row.reason[:TAG_LENGTH])
        whole = fill_in(tracker, self.records.trial_folder(row.number), f"trial {row.number}")
        if tracker.finish("FAILED" if row.state == "failed" else "FINISHED") and whole:
            self.records.change(row.number, logged=True)

    def settle(self, name: str) -> None:
        """At the sweep's end: once more what MLflow did not take of trials that have ended, and of the sweep itself."""
        whole = fill_in(self.parent, self.records.folder, name, PATIENCE_S)
        for row in self.records.in_order() if whole else ():
            if row.run_id and not row.logged:
                self.trials[row.number] = Tracker(self.parent.uri, row.run_id)
                self.end(row)

    def interrupt(self) -> None:
        """The driver stops here; the same runs go on when the sweep does."""
        for tracker in self.trials.values():
            tracker.finish("KILLED")
        self.parent.finish("KILLED")
