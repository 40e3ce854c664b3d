"""A trial's run in MLflow is ranked as the sweep ranks it: by the best evaluation, which need not be the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe

from pipelines.run.history import add_trial_report
from pipelines.tuning.records import Records
from pipelines.tuning.report.results import best_row
from pipelines.tuning.tracking import SweepTracking
from pipelines.tuning.trial.row import TrialRow

CURVES = {0: (0.30, 0.40, 0.36), 1: (0.20, 0.35, 0.38), 2: (-1.0, -1.0)}  # the last has no objects to be measured on


class Run:
    """Stands in for a Tracker: keeps what it is told."""

    def __init__(self, logged: int = -1) -> None:
        self.logged = logged
        self.kept: dict[str, list[float]] = {}

    def last_step(self, metric: str) -> int:
        return self.logged

    def metrics(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        for _, values in rows:
            for name, value in values.items():
                self.kept.setdefault(name, []).append(value)

    def children(self, tag: str) -> dict[str, Any]:
        return {}


def curve(number: int, evaluations: int) -> tuple[tuple[float, float], ...]:
    return tuple((float(epoch + 1), ap) for epoch, ap in enumerate(CURVES[number][:evaluations]))


@pytest.mark.parametrize("heard", [0, 1, 2])  # evaluations that MLflow had when the driver was killed
def test_best_ap_of_a_trial_ends_as_the_ap_that_the_winner_is_chosen_by(heard: int, tmp_path: Path) -> None:
    records = Records(recipe(None, "name=sweep", f"output={tmp_path}"))
    tracking = SweepTracking(Run(), 5, records)  # type: ignore[arg-type]
    for number, aps in CURVES.items():
        run = tracking.trials[number] = Run(5 * heard if heard else -1)  # type: ignore[assignment]
        row = records.put(TrialRow(number, "running", curve=curve(number, heard + 1)))
        tracking._catch_up(row)
        for evaluations in range(heard + 2, len(aps) + 1):
            row = records.put(TrialRow(number, "finished", curve=curve(number, evaluations)))
            report = {
                "rows": [],
                "step": 5 * evaluations,
                "epochs": evaluations,
                "metrics": {"AP": aps[evaluations - 1]},
            }
            tracking.report(number, report)
        so_far = [max(aps[: count + 1]) for count in range(heard, len(aps))]
        assert run.kept.get("best/AP", []) == [ap for ap in so_far if ap >= 0]
    assert best_row(records.in_order()) == records.rows[0]  # though by the last value of val/AP it would be trial 1
    assert [tracking.trials[n].kept["best/AP"][-1] for n in (0, 1)] == [0.40, 0.38]  # type: ignore[attr-defined]


def test_a_trial_of_another_batch_size_is_caught_up_with_at_its_own_steps(tmp_path: Path) -> None:
    """The recipe's epoch has five steps, the trial's ten: MLflow lacks the second of two evaluations."""
    records = Records(recipe(None, "name=sweep", f"output={tmp_path}"))
    tracking = SweepTracking(Run(), 5, records)  # type: ignore[arg-type]
    row = records.put(TrialRow(0, "running", curve=((1.0, 0.2), (2.0, 0.3))))
    for step, ap in ((10, 0.2), (20, 0.3), (30, 0.4)):  # the last was not heard of
        losses = [(step, {"loss/total": 1.0})]
        add_trial_report(records.trial_folder(0), step, step // 10, {"AP": ap, "AP50": 2 * ap}, losses)
    run = tracking.trials[0] = Run(10)  # type: ignore[assignment]
    tracking._catch_up(row)
    assert {name: values for name, values in run.kept.items() if name != "epoch"} == {
        **{"val/AP": [0.3], "val/AP50": [0.6], "best/AP": [0.3], "loss/total": [1.0]}
    }
    assert list((tmp_path / "sweep/trials/0000/rows").iterdir()) == [tmp_path / "sweep/trials/0000/rows/000000020.json"]
