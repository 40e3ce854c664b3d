"""Sweeps on a real Ray and a real MLflow store: killed, gone on with, looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sweeps import cluster, config, rows_of, work  # noqa: F401  (fixtures)
from test_pipelines import killing

from pipelines.caching import driver as cache_teacher
from pipelines.tuning import driver as tune
from pipelines.tuning.search.request import SearchRequest
from pipelines.tuning.trial.row import TrialRow
from qskd.config.recipe import flatten, load, to_tree, to_yaml
from qskd.errors import QskdError

pytestmark = pytest.mark.slow


def outcome(row: TrialRow) -> tuple[Any, ...]:
    """What may not depend on how often the driver was killed."""
    return row.number, row.state, row.parameters, row.overrides, row.curve, row.metrics, row.parameters_m, row.reason


SEARCH = ("loss_weights", "query_selection", "student_architecture")
ONE_AT_A_TIME = ["--trials", "5", "--at-once", "1", "--at-most-parameters", "0.06"]
ASKED = tune.TuneRequest(SearchRequest(SEARCH, trials=5), at_most_parameters="0.06", at_once=1)


@pytest.fixture(scope="module")
def undisturbed(work: Path, cluster: str) -> tune.SweepResult:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGUSR1)]
    result = tune.run(config(work, "undisturbed"), ASKED)
    assert [
        signal.getsignal(each) for each in (signal.SIGINT, signal.SIGUSR1)
    ] == before  # Ctrl-C ends what comes after it
    return result


def test_every_epoch_reaches_asha_and_the_first_trial_is_the_recipe(undisturbed: tune.SweepResult) -> None:
    rows = undisturbed.rows
    assert len(rows) == 5
    assert rows[0].overrides == {}
    assert {row.state for row in rows} == {"finished", "stopped"}
    for row in rows:
        assert [epochs for epochs, _ in row.curve] == list(range(1, len(row.curve) + 1))
        assert len(row.curve) == 3 if row.state == "finished" else len(row.curve) < 3
        # ASHA's rung at one epoch: below the best third of those before it.
        before = sorted((other.curve[0][1] for other in rows[: row.number]), reverse=True)
        if row.state == "stopped" and len(row.curve) == 1:
            assert row.curve[0][1] < before[max(0, len(before) // 3 - 1)]
        assert row.parameters_m is not None
        assert row.parameters_m <= 0.06
        assert row.latency_ms is not None
        assert row.latency_ms > 0


def test_a_sweep_in_mlflow_is_a_parent_with_children_and_a_registered_model(
    work: Path, undisturbed: tune.SweepResult
) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    parent = client.get_run(undisturbed.run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{undisturbed.run_id}'", max_results=100
    )
    by_number = {int(run.data.tags["qskd.trial"]): run for run in children}
    assert len(children) == 5
    assert sorted(by_number) == list(range(5))
    for row in undisturbed.rows:
        run = by_number[row.number]
        assert (run.info.run_id, run.info.status) == (row.run_id, "FINISHED")
        assert run.data.tags["qskd.state"] == row.state
        logged = [metric.value for metric in client.get_metric_history(row.run_id, "val/AP")]
        assert logged == pytest.approx([ap for _, ap in row.curve])
        assert run.data.metrics["best/AP"] == pytest.approx(row.best_ap)
        assert run.data.params["student.queries"] == str(row.overrides.get("student.queries", 8))
        assert client.get_metric_history(row.run_id, "loss/total")
    listed = {each.path for each in client.list_artifacts(undisturbed.run_id)}
    assert listed >= {"best.yaml", "config.yaml", "report"}
    best = undisturbed.best
    assert best is not None
    version = client.get_model_version_by_alias("undisturbed", "best")
    assert (version.run_id, str(version.version)) == (best.run_id, undisturbed.version)
    student = Path(mlflow.artifacts.download_artifacts(version.source))
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {each.name for each in student.iterdir()}


def test_the_best_recipe_is_one_that_distill_takes(work: Path, undisturbed: tune.SweepResult) -> None:
    from pipelines.training.plan import make_plan

    found = load(undisturbed.best_recipe)
    best = undisturbed.best
    assert best is not None
    assert found.name == "undisturbed-best"
    flat = flatten(to_tree(found))
    assert {name: flat[name] for name in best.overrides} == best.overrides
    make_plan(found, "distill")
    for row in undisturbed.rows:
        own = load(Path(undisturbed.folder, "trials", f"{row.number:04d}", "recipe.yaml"))
        assert own == found.model_copy(update={"name": own.name}) or row.number != best.number
        assert own.name == f"undisturbed-trial-{row.number:04d}"


def test_the_same_command_again_trains_nothing(work: Path, undisturbed: tune.SweepResult) -> None:
    again = tune.run(config(work, "undisturbed"), ASKED)
    assert again.rows == undisturbed.rows
    assert again.version == undisturbed.version


def test_an_end_of_the_search_without_a_signal_is_not_called_ctrl_c(
    work: Path, cluster: str, undisturbed: tune.SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_search", lambda *_: False)
    with pytest.raises(QskdError, match=r"(?s)Ray Tune ended the search: 0 of 5 trials.*the same command goes on"):
        tune.run(config(work, "unexplained"), ASKED)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s  # a busy machine takes minutes to start
    while not ready() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert ready()


def start(recipe: Path, spaces: Sequence[str], options: Sequence[str], cluster: str) -> subprocess.Popen[str]:
    named = [part for space in spaces for part in ("--space", space)]
    command = [sys.executable, "-m", "pipelines.tune", str(recipe), *named, *options]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killing_a_trial_killing_the_driver_and_ctrl_c_change_nothing(
    work: Path, cluster: str, undisturbed: tune.SweepResult
) -> None:
    killed = config(work, "killed")
    recipe = work / "killed.yaml"
    recipe.write_text(to_yaml(killed))

    def heard() -> int:
        return sum(len(row.curve) for row in rows_of(killed))

    reached = [1]  # the first driver lives to hear of an epoch after its trial's process died
    with killing("ImplicitFunc", heard) as victims:
        for how in (signal.SIGKILL, signal.SIGINT):
            process = start(recipe, SEARCH, ONE_AT_A_TIME, cluster)
            wait_for(lambda: bool(victims) and heard() > reached[-1], process)
            os.killpg(process.pid, how) if how == signal.SIGKILL else process.send_signal(how)
            out, _ = process.communicate(timeout=300)
            reached.append(heard())
            if how == signal.SIGINT:
                assert process.returncode == 130
                assert "the same command goes on with it" in out
                assert "killed.yaml --space loss_weights" in out
    total = sum(len(row.curve) for row in undisturbed.rows)
    assert reached[-1] < total
    result = tune.run(killed, ASKED)
    assert [outcome(row) for row in result.rows] == [outcome(row) for row in undisturbed.rows]
    for row in result.rows:
        one, other = (
            load_file(f"{work}/runs/{name}/trials/{row.number:04d}/student/model.safetensors")
            for name in ("undisturbed", "killed")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    experiment = client.get_run(result.run_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result.run_id}'", max_results=100)
    assert sorted(int(run.data.tags["qskd.trial"]) for run in children) == list(range(5))
    for row in result.rows:
        steps = [metric.step for metric in client.get_metric_history(row.run_id, "val/AP")]
        assert steps == [3 * round(epochs) for epochs, _ in row.curve]
        same = next(each for each in undisturbed.rows if each.number == row.number)
        for metric in ("loss/total", "val/AP50"):  # none lost with the process that had them, none twice
            of_both = [[m.step for m in client.get_metric_history(each.run_id, metric)] for each in (row, same)]
            assert of_both[0] == of_both[1]
        assert client.get_run(row.run_id).info.status == "FINISHED"


def test_one_cache_serves_all_trials(work: Path, undisturbed: tune.SweepResult) -> None:
    done = cache_teacher.run(config(work, "undisturbed"), quiet=True)
    assert (done.images, done.total) == (0, 48)
    sizes = {row.overrides.get("student.resize.size", 64) for row in undisturbed.rows}
    assert len(sizes) > 1
