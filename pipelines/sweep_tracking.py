"""A sweep in MLflow: one run, and a child for each trial. Only the driver writes, so that a sqlite store will do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipelines.sweep_trials import TrialRow
from pipelines.tracking import Tracker
from qskd.config import Config
from qskd.errors import QskdError

log = logging.getLogger("qskd")
NUMBER, STATE, REASON = "qskd.trial", "qskd.state", "qskd.reason"
ALIAS = "best"
TAG_LENGTH = 5000  # MLflow's limit, for servers of any age


class SweepTracking:
    """The parent run and its children by trial number."""

    def __init__(self, parent: Tracker, resumed: bool) -> None:
        self.parent = parent
        self.trials: dict[int, Tracker] = {}
        # Of a driver that was killed between opening a child and writing down its id.
        self.orphans = parent.children(NUMBER) if resumed else {}

    def begin(self, row: TrialRow, config: Config) -> str:
        """Open the trial's run, or go on with the one it has; its id, "" when the server does not answer."""
        run_id = row.run_id or self.orphans.get(str(row.number), "")
        named = config.model_copy(
            update={"tracking": config.tracking.model_copy(update={"run_name": f"trial {row.number}"})}
        )
        try:
            tracker = Tracker.open(named, "trial", run_id, self.parent.run_id, {NUMBER: str(row.number)})
        except QskdError as error:
            log.warning("trial %d has no MLflow run: %s", row.number, error)
            return run_id
        self.trials[row.number] = tracker
        if not run_id:
            tracker.params({f"search/{name}": value for name, value in row.parameters.items()})
        tracker.tag(STATE, "running")
        return tracker.run_id

    def report(self, number: int, report: Mapping[str, Any]) -> None:
        tracker = self.trials.get(number)
        if tracker is None:
            return
        rows = [(int(step), values) for step, values in report["rows"]]
        found = {f"val/{name}": value for name, value in report["metrics"].items() if value >= 0}
        tracker.metrics([*rows, (report["step"], {**found, "epoch": report["epochs"]})])

    def costs(self, number: int, measured: Mapping[str, float]) -> None:
        if number in self.trials:
            self.trials[number].metrics([(0, {f"cost/{name}": value for name, value in measured.items()})])

    def parameters(self, row: TrialRow, step: int) -> None:
        """Of a member of a population, from a step on: as metrics, since a run's parameters can't change."""
        numbers = {
            f"search/{name}": float(value)
            for name, value in row.parameters.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if row.number in self.trials:
            self.trials[row.number].metrics([(step, numbers)])

    def end(self, row: TrialRow) -> None:
        """How the trial ended, which an MLflow status alone can't say."""
        tracker = self.trials.pop(row.number, None)
        if tracker is None:
            return
        tracker.tag(STATE, row.state)
        if row.reason:
            tracker.tag(REASON, row.reason[:TAG_LENGTH])
        tracker.finish("FAILED" if row.state == "failed" else "FINISHED")

    def interrupt(self) -> None:
        """The driver stops here; the same runs go on when the sweep does."""
        for tracker in self.trials.values():
            tracker.finish("KILLED")
        self.parent.finish("KILLED")
