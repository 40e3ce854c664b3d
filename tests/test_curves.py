"""A store that does not answer for a while, here sqlite locked by another connection, costs a run none of its curves."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
from test_pipelines import SIZES, make_work

import pipelines.cluster.start  # noqa: F401  (sets Ray's environment before anything imports Ray)
from pipelines.reporting.progress import TrackingCallback
from pipelines.run.folder import Folder
from pipelines.run.tracked import RUN, open_for
from pipelines.tracking import curves, pause
from pipelines.tracking.curves import ROWS, end_run, fill_in, is_complete, kept_rows, tell
from pipelines.tracking.tracker import Tracker
from pipelines.training import driver as distill
from pipelines.tuning.records import Records
from pipelines.tuning.tracking import SweepTracking
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import load


def recipe(root: Path, *more: str) -> Config:
    named = [f"output={root}/runs", "name=it", f"tracking.uri=sqlite:///{root}/a.db", "tracking.experiment=e"]
    return load(None, [*named, *more])


@pytest.fixture(autouse=True, scope="module")
def short_waits() -> Iterator[None]:
    """MLflow has sqlite wait 20 s for a lock, at each request."""

    def shortened(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 20"), parameters

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", shortened, retval=True)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", shortened)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tables: making them takes seconds."""
    root = tmp_path_factory.mktemp("store")
    Tracker.open(recipe(root), "train")
    return root / "a.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "a.db").write_bytes(empty_store.read_bytes())
    return tmp_path


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    holder = sqlite3.connect(root / "a.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.close()


def report(step: int) -> dict[str, Any]:
    rows = [(at, {"loss/total": at / 7, "loss/lapd class": 1.0}) for at in (step - 5, step)]
    evaluation = {"evaluation": {"AP": step / 1000, "AP75": -1.0}} if step % 20 == 0 else {}
    return {"step": step, "epoch": step // 20, "rows": rows, **evaluation}


def history(tracker: Tracker, metric: str) -> list[tuple[int, float, int]]:
    client = mlflow.MlflowClient(tracker.uri)
    return sorted((each.step, each.value, each.timestamp) for each in client.get_metric_history(tracker.run_id, metric))


def status(tracker: Tracker) -> str:
    return str(mlflow.MlflowClient(tracker.uri).get_run(tracker.run_id).info.status)


def files(tracker: Tracker, place: str | None = None) -> set[str]:
    found = mlflow.MlflowClient(tracker.uri).list_artifacts(tracker.run_id, place)
    return {each.path for each in found if not each.is_dir}.union(*(files(tracker, f.path) for f in found if f.is_dir))


def told(tracker: Tracker, folder: Folder, root: Path) -> TrackingCallback:
    """Ten reports, of which five fall on a locked store."""
    callback = TrackingCallback(tracker, folder)
    for step in range(10, 31, 10):
        callback.write(report(step))
    with locked(root):
        for step in range(40, 81, 10):
            callback.write(report(step))
    for step in range(90, 101, 10):
        callback.write(report(step))
    return callback


def assert_whole(tracker: Tracker, folder: Folder) -> None:
    """Every point once, at the step and the time of when it was measured."""
    times = {step: time_ms for time_ms, step, _ in kept_rows(folder)[0]}
    expected = [(step, step / 7, times[step]) for step in range(5, 101, 5)]
    assert [(step, value) for step, value, _ in history(tracker, "loss/total")] == [each[:2] for each in expected]
    assert [step for step, _, _ in history(tracker, "loss/lapd class")] == list(range(5, 101, 5))
    assert [each[:2] for each in history(tracker, "val/AP")] == [(step, step / 1000) for step in range(20, 101, 20)]
    for step, _, when in history(tracker, "loss/total"):
        assert abs(when - times[step]) < 1000


def test_rows_that_a_locked_store_did_not_take_are_filled_in_and_counted(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(root)
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    told(tracker, folder, root)
    assert len(history(tracker, "loss/total")) == 10
    assert fill_in(tracker, folder, "it")
    assert "it: MLflow had missed 13 of 25 rows; they are filled in" in capsys.readouterr().out
    assert_whole(tracker, folder)
    assert end_run(tracker, folder, config)  # the second time there is nothing to do
    assert not capsys.readouterr().out
    assert_whole(tracker, folder)
    assert status(tracker) == "FINISHED"
    assert is_complete(folder)


def test_rows_of_a_pause_after_a_store_that_was_waited_for_are_filled_in(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "SLOW_S", 0.0)  # the lock's 20 ms are a long wait
    config = recipe(root)
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    told(tracker, folder, root)
    assert len(history(tracker, "loss/total")) == 6  # the last two reports fell on the pause, though the store was free
    assert not fill_in(tracker, folder, "it")  # nor is it asked on the way
    assert fill_in(tracker, folder, "it", patience=1.0)  # but at the end
    assert "it: MLflow had missed 18 of 25 rows; they are filled in" in capsys.readouterr().out
    assert end_run(tracker, folder, config)  # it answers again
    assert_whole(tracker, folder)
    assert status(tracker) == "FINISHED"


def test_a_run_that_ended_while_the_store_was_locked_says_so_and_its_command_fills_in_later(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "WAIT_S", 0.1)
    make_work(root, 8, 4)
    config = recipe(root, *SIZES, f"data.train={root}/train", f"data.val={root}/val")
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    told(tracker, folder, root)
    with locked(root):
        assert not end_run(tracker, folder, config, patience=0.3)
    assert "MLFLOW AT" in caplog.text
    assert "13 of 25 rows could not be logged" in caplog.text
    assert "pytest" in caplog.text  # the command that this program was started with
    assert not is_complete(folder)
    result = distill.RunResult(folder.path, "student", {"AP": 0.1}, tracker.run_id, 1.0)
    folder.write_record("result.json", json.dumps(result.__dict__))
    for name in ("student/config.json", "evaluation/evaluation.json", "inheritance.txt"):
        folder.write(name, "{}")
    assert status(tracker) == "RUNNING"
    with locked(root):  # the curves arrive, and then it is gone again
        assert not end_run(tracker, folder, config, whole=True)
    assert "DOES NOT HAVE ALL OF THE RUN'S FILES" in caplog.text
    assert not is_complete(folder)
    assert distill.run(config, "train") == result  # as `qskd train` again: nothing is trained
    assert "missed 13 of 25 rows" in capsys.readouterr().out
    assert_whole(tracker, folder)
    assert {"config.yaml", "inheritance.txt", "student/config.json", "student/MLmodel"} <= (there := files(tracker))
    assert "evaluation/evaluation.json" in there
    assert status(tracker) == "FINISHED"
    assert json.loads(folder.read(RUN))["complete"]
    with locked(root):  # a complete run's store is not asked again
        assert distill.run(config, "train") == result


def test_a_run_whose_files_are_not_taken_is_finished_in_mlflow_and_told_again_by_its_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(root)
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    tell(tracker, folder, "1", [(1, {"loss/total": 1.0})])
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
        assert not end_run(tracker, folder, config)
    assert status(tracker) == "FINISHED"
    assert not is_complete(folder)
    assert end_run(tracker, folder, config)
    assert is_complete(folder)


def test_a_store_that_answers_within_the_patience_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(root)
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    told(tracker, folder, root)
    holder = locked(root)
    holder.__enter__()
    waited = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            holder.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", wait)
    assert fill_in(tracker, folder, "it", patience=60.0)
    monkeypatch.undo()
    assert len(waited) >= 3
    assert_whole(tracker, folder)


def test_a_run_that_goes_on_keeps_each_row_once_and_drops_those_it_makes_again(root: Path) -> None:
    config = recipe(root)
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    told(tracker, folder, root)
    again = TrackingCallback(tracker, folder)  # another controller, from an older checkpoint
    again.write(report(60))
    assert max(step for _, step, _ in kept_rows(folder)[0]) == 60
    for step in range(70, 101, 10):
        again.write(report(step))
    again.write({**report(100), "rows": []}, replace=False)  # what Ray knew of it when a controller died: less
    assert len(kept_rows(folder)[0]) == 25
    fill_in(tracker, folder, "it")
    assert_whole(tracker, folder)


def test_a_damaged_file_of_rows_is_named_and_costs_no_others(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = recipe(root)
    folder = Folder(config)
    tracker = open_for(folder, config, "train")
    told(tracker, folder, root)
    path = Path(folder.root, ROWS, "000000050.json")
    for content in (path.read_bytes()[: path.stat().st_size // 2], b"", b'{"time_ms": 1, "rows": [3]}'):
        caplog.clear()
        path.write_bytes(content)
        assert len(kept_rows(folder)[0]) == 23
        assert str(path) in caplog.text
    assert fill_in(tracker, folder, "it")
    assert [step for step, _, _ in history(tracker, "loss/total")] == [s for s in range(5, 101, 5) if s not in (45, 50)]


def test_trials_and_their_sweep_get_what_a_locked_store_did_not_take_at_once_or_when_the_sweep_goes_on(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(root, "name=sweep")
    records = Records(config)
    parent = open_for(records.folder, config, "sweep")
    tracking = SweepTracking(parent, 10, records)

    def train(number: int, state: Any, end_locked: bool) -> None:
        row = records.put(TrialRow(number, "running"))
        row = records.put(TrialRow(number, "running", run_id=tracking.begin(row, config)))
        for epoch in range(1, 5):
            with locked(root) if epoch in (2, 3) else contextlib.nullcontext():
                curve = (*row.curve, (float(epoch), 0.1 * epoch))
                row = records.change(number, curve=curve, state=state if epoch == 4 else "running")
                rows = [(10 * epoch - 5, {"loss/total": 1.0}), (10 * epoch, {"loss/total": 2.0})]
                tracking.report(
                    number, {"step": 10 * epoch, "epochs": epoch, "metrics": {"AP": 0.1 * epoch}, "rows": rows}
                )
                tracking.leader(4 * number + epoch, row)
                if epoch == 2:
                    tracking.costs(number, {"latency_ms": 3.0})
                    tracking.parameters(TrialRow(number, parameters={"loss.weight": 0.5}), 20)
        with locked(root) if end_locked else contextlib.nullcontext():
            tracking.end(row)

    def whole(number: int) -> bool:
        run = Tracker(parent.uri, records.rows[number].run_id)
        steps = {name: [each[0] for each in sorted(history(run, name))] for name in ("loss/total", "val/AP", "best/AP")}
        assert status(run) == "FINISHED"
        single = history(run, "cost/latency_ms") and history(run, "search/loss.weight")
        return bool(single) and list(steps.values()) == [list(range(5, 41, 5)), [10, 20, 30, 40], [10, 20, 30, 40]]

    train(0, "finished", end_locked=False)
    assert records.rows[0].logged
    assert whole(0)
    train(1, "stopped", end_locked=True)
    assert not records.rows[1].logged
    assert "trial 1: MLFLOW AT" in caplog.text
    tracking.settle("sweep")
    assert whole(1)
    train(2, "finished", end_locked=True)
    again = Records(config)  # another driver
    SweepTracking(parent, 10, again)
    assert all(row.logged for row in again.rows.values())
    assert whole(2)
    tracking.settle("sweep")
    assert [each[0] for each in sorted(history(parent, "best/AP"))] == list(range(1, 13))
