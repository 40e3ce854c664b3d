"""Trials of sweeps on a real Ray: failed, stopped early, members of a population."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import processes_of_ray
from sweeps import cluster, config, rows_of, work  # noqa: F401  (fixtures)

from pipelines.caching import driver as cache_teacher
from pipelines.run.folder import TRIAL, Folder
from pipelines.run.ownership import check_ours
from pipelines.tuning import driver as tune
from pipelines.tuning.engine import run_tuner
from pipelines.tuning.records import Records, trial_config
from pipelines.tuning.search.request import SearchRequest, check_request
from pipelines.tuning.sweep import DONE
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import replace_fields, to_tree
from qskd.errors import QskdError

pytestmark = pytest.mark.slow
TRIAL_PROCESSES = ("ImplicitFunc", "TrainController", "RayTrainWorker")


def trial_processes() -> list[int]:
    """The ids of this test's own processes of Ray that belong to a trial."""
    found = []
    for process in processes_of_ray():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(name in word for word in process.cmdline() for name in TRIAL_PROCESSES):
                found.append(process.pid)
    return found


class StopAtOnce:
    """A conductor of trials that ASHA stops at their first evaluation, one after the other. Notes which processes each had
    when it was stopped. The sweep ends when `released` says so of the last one's, or else when patience does."""

    def __init__(self, jobs: list[Job], released: Callable[[list[int]], bool], patience_s: float) -> None:
        self.jobs, self.released, self.patience_s = jobs, released, patience_s
        self.others = trial_processes()  # of sweeps before this one, on the same Ray
        self.stopped: list[list[int]] = []
        self.begun, self.stopped_at, self.in_time = 0, 0.0, False

    def next_job(self) -> Any:
        if self.begun > len(self.stopped):
            return DONE if self._late() else None
        if self.begun < len(self.jobs):
            self.begun += 1
            return self.jobs[self.begun - 1]
        self.in_time = self.released(self.stopped[-1])
        return DONE if self.in_time or self._late() else None

    def _late(self) -> bool:
        return bool(self.stopped) and time.monotonic() - self.stopped_at > self.patience_s

    def heard(self, number: int, report: dict[str, Any], stop: bool) -> None:
        assert "failed" not in report, report
        if stop:
            self.stopped.append([each for each in trial_processes() if each not in self.others])
            self.stopped_at = time.monotonic()

    def ended(self, number: int) -> None:
        pass

    def lost(self, number: int) -> None:
        raise AssertionError(f"trial {number} lost its process")

    def has_given_up(self) -> bool:
        return False


def stop_at_once(config: Config, conductor: StopAtOnce, folder: Path) -> None:
    search = check_request(SearchRequest(("loss_weights",), asha=True, grace_epochs=1), config)
    run_tuner(conductor, config, search, 200, [TrialRow(99, "finished", curve=((1.0, 1.0),))], str(folder))


# The first of this file: what sweeps before it left behind on the same Ray would be counted too.
def test_a_stopped_trial_of_two_workers_leaves_no_process_and_holds_no_cpu(
    work: Path, cluster: str, tmp_path: Path
) -> None:
    import ray

    there = ray.cluster_resources()["CPU"]

    def released(processes: list[int]) -> bool:
        free = ray.available_resources().get("CPU", 0.0)  # Tune keeps a hundredth while it waits for the next trial
        return not set(processes) & set(trial_processes()) and free > there - 0.5

    long = config(work, "stopped-2", "training.epochs=200", "compute.workers=2", "teacher.cache.path=")
    Folder(trial_config(long, 0)).write(TRIAL, "{}")  # a driver's first: that it began the trial
    # It takes a second, and a busy machine more; what is not ended on purpose is there when the sweep ends.
    conductor = StopAtOnce([Job(0, to_tree(trial_config(long, 0)))], released, patience_s=120)
    stop_at_once(long, conductor, tmp_path)
    assert len(conductor.stopped[0]) >= 4, conductor.stopped  # the trial, its controller, two workers
    assert conductor.in_time, ray.available_resources()


RATES = """
FIELDS = ("training.learning_rate", "student.init")

def recipe_point(config):
    return {"kind": "mild"}

def suggest(trial, config):
    kind = trial.suggest_categorical("kind", ("mild", "gentle", "explosive", "absent"))
    if kind == "absent":
        return {"student.init": "/no/such/detector"}
    return {"training.learning_rate": {"mild": 1e-3, "gentle": 1e-4, "explosive": 1e30}[kind]}
"""
REASONS = {"explosive": "the loss is not finite", "absent": "/no/such/detector"}


def test_trials_that_cannot_be_trained_fail_with_their_reason_and_the_sweep_goes_on(work: Path, cluster: str) -> None:
    import mlflow

    (work / "rates.py").write_text(RATES)
    search = SearchRequest((str(work / "rates.py"),), trials=7, algorithm="random", asha=False)
    result = tune.run(config(work, "failing", "seed=4"), tune.TuneRequest(search, trial_epochs=1, at_once=1))
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    kinds = {row.number: row.parameters["rates.kind"] for row in result.rows}
    assert set(kinds.values()) == {"mild", "gentle", "explosive", "absent"}
    for row in result.rows:
        reason = REASONS.get(kinds[row.number], "")
        run = client.get_run(row.run_id)
        if reason:
            assert row.state == "failed"
            assert reason in row.reason
            assert run.info.status == "FAILED"
            assert reason in run.data.tags["qskd.reason"]
        else:
            assert (row.state, len(row.curve), run.info.status) == ("finished", 1, "FINISHED")
    assert result.best is not None


def test_a_sweep_whose_machines_fail_ends_as_a_failure_and_the_same_command_goes_on(
    work: Path, cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where a trial would put its checkpoints, as on a node that may not write there. How many must fail so is said
    in test_sweep_failures: here it is the only one."""
    import mlflow

    one = config(work, "broken", "teacher.cache.path=", "compute.max_failures=1")
    search = SearchRequest(("loss_weights",), trials=1, algorithm="random", asha=False)
    asked = tune.TuneRequest(search, trial_epochs=1, at_once=1)
    put, blocks = Records.put, {}

    def blocked(self: Records, row: TrialRow) -> TrialRow:
        blocks[row.number] = Path(self.trial_folder(row.number).root, "checkpoints")
        blocks[row.number].parent.mkdir(parents=True, exist_ok=True)
        blocks[row.number].touch()
        return put(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "put", blocked)
        with pytest.raises(QskdError, match="1 trials failed, 1 by faults of their machines") as told:
            tune.run(one, asked)
    assert str(blocks[0]) in told.value.found
    assert capsys.readouterr().out.count("a fault of its machine: ") == 2  # it is tried twice
    rows = rows_of(one)
    assert [row.state for row in rows] == ["running"]
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    assert [client.get_run(row.run_id).info.status for row in rows] == ["KILLED"]
    blocks[0].unlink()
    result = tune.run(one, asked)
    assert [row.state for row in result.rows] == ["finished"]
    assert [(row.parameters, row.run_id) for row in result.rows] == [(row.parameters, row.run_id) for row in rows]


def test_a_population_moves_its_weights_and_its_worst_go_on_from_its_best(
    work: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tune.TuneRequest(SearchRequest(("loss_weights",), trials=4, algorithm="pbt"), at_once=2)
    result = tune.run(config(work, "population"), asked)
    assert [row.state for row in result.rows] == ["finished"] * 4
    assert [[epochs for epochs, _ in row.curve] for row in result.rows] == [[1, 2, 3]] * 4
    printed = capsys.readouterr().out
    assert printed.count("takes over the weights of trial") == 2  # one of four, at each of two generations

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    moved = [
        row
        for row in result.rows
        if len({metric.value for metric in client.get_metric_history(row.run_id, "search/loss_weights.agfd")}) > 1
    ]
    assert moved
    first = Folder(config(work, "population"))
    assert json.loads(first.read("sweep.json"))["asked"]["algorithm"] == "pbt"
    check_ours(first, restart=True)  # knows the name of every file that is left


def test_a_stopped_trials_process_and_cpus_go_to_the_next(work: Path, cluster: str, tmp_path: Path) -> None:
    import ray

    long = config(work, "stopped", "training.epochs=200")
    cache_teacher.run(long, quiet=True)
    # A trial holds all CPUs there are: the second can only start with those of the first.
    all_cpus = replace_fields(long, {"compute.threads_per_worker": int(ray.cluster_resources()["CPU"])}, "test")
    jobs = [Job(number, to_tree(trial_config(long, number))) for number in range(2)]
    for number in range(2):
        Records(long).put(TrialRow(number, "running"))
    conductor = StopAtOnce(jobs, lambda _: True, patience_s=240)
    stop_at_once(all_cpus, conductor, tmp_path)
    (one,), (other,) = conductor.stopped
    assert one == other
